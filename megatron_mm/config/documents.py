"""JSON and YAML that others may have written, read as data: no type but the plain ones, no more than such files have.

A few lines of YAML can stand for billions of values, by names for what was said before; a line of brackets is nested
deeper than a parser goes; a name may lead to a pipe. Each is refused before it takes memory or time.
"""

from __future__ import annotations

import json
import os

import yaml

from megatron_mm.media.files import read_file

AnyPath = str | os.PathLike[str]
#: Longest file, in bytes. A list of the shards of a model or of a corpus has kilobytes.
MAX_JSON_BYTES, MAX_YAML_BYTES = 1 << 26, 1 << 22
#: Values that a YAML file may stand for, every alias counted as what it repeats.
MAX_VALUES = 1 << 20


def parse_json(content: str | bytes) -> object:
    """A JSON value.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def load_json(path: AnyPath, most_bytes: int = MAX_JSON_BYTES) -> object:
    """The JSON value of a file.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: no plain file, too long, no JSON, or nested too deeply.
    """
    return parse_json(read_file(path, most_bytes))


def load_yaml(path: AnyPath) -> object:
    """The YAML value of a file, of plain types alone.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: no plain file, too long, no YAML of plain types, nested too deeply, or standing for too many values.
    """
    text = read_file(path, MAX_YAML_BYTES).decode()
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _values(node, {})) > MAX_VALUES:
            raise ValueError(f"stands for {count} values by repeating itself; the limit is {MAX_VALUES}")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    except RecursionError:
        raise ValueError("YAML nested too deeply, or within itself") from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; one that holds itself exceeds the depth of recursion."""
    if id(node) in known:
        return known[id(node)]
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in below for part in pair]
    known[id(node)] = 1 + sum(_values(part, known) for part in below)
    return known[id(node)]
