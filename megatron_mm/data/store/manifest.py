"""Manifests: what a dataset holds, what made it, of which sources; with checksums of its files and of itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence

from megatron_mm.config.documents import load_json
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import open_file
from megatron_mm.platform.atomic_files import sync

MANIFEST, CHECKSUM = "manifest.json", "checksum"
_CHUNK = 1 << 20


def sha256(path: str) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_file(path) as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def describe_sources(inputs: Sequence[str]) -> list[dict]:
    """Names and sizes of input files."""
    return [{"name": os.path.basename(path), "bytes": os.path.getsize(path)} for path in inputs]


def write_manifest(path: str, manifest: dict, base: str, names: Sequence[str]) -> None:
    """Writes a manifest with sizes and checksums of files.

    Tables and indexes get a SHA-256 each; the documents of a `.bin` have a CRC-32 each in `.crc`.

    Args:
        base: what stands before each name: a folder with its separator, or the prefix of a text shard.
        names: of the files.
    """
    files = {}
    for name in sorted(names):
        files[name] = {"bytes": os.path.getsize(base + name)}
        if not name.endswith(".bin"):
            files[name]["sha256"] = sha256(base + name)
    manifest = {**manifest, "files": files}
    manifest[CHECKSUM] = _digest(manifest)
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        sync(stream)


def _digest(manifest: dict) -> str:
    rest = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_manifest(path: str) -> dict:
    """A manifest; an older one has no checksum.

    Raises:
        DataError: not JSON, not of a manifest's fields, or it does not have its own checksum.
    """
    try:
        value = load_json(path)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if CHECKSUM in value and value[CHECKSUM] != _digest(value):
            raise ValueError("its checksum is another")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if (problem := _problem(value)) is not None:
        raise DataError(f"{path}: damaged ({problem})")
    return value


def _problem(manifest: dict) -> str | None:
    """What readers of any manifest could not work with, or should not: a file that lies elsewhere."""
    for name in ("counts", "tokenizer", "files"):
        if not isinstance(manifest.get(name, {}), dict):
            return f"{name} is no object"
    if not isinstance(manifest.get("tokenizer", {}).get("identity", ""), str):
        return "tokenizer.identity is no checksum"
    sources, counts = manifest.get("sources", []), manifest.get("counts", {})
    if not isinstance(sources, list) or not all(isinstance(s, dict) and {"name", "bytes"} <= s.keys() for s in sources):
        return "sources is no list of names and sizes"
    if wrong := [name for name, count in counts.items() if type(count) is not int or count < 0]:
        return f"counts.{wrong[0]} is no number of things"
    for name, stated in manifest.get("files", {}).items():
        if os.path.basename(name) != name or name in ("", ".", ".."):
            return f"files names {name!r}, which is not beside it"
        if not isinstance(stated, dict) or type(stated.get("bytes")) is not int:
            return f"files.{name} states no bytes"
    return None


def differs_from_folder(path: str, form: str, files: re.Pattern[str]) -> str | None:
    """What tells that a path is no folder with a manifest of a format, or holds more than its files; None: it is one.

    Args:
        form: the manifest's "format".
        files: matches the names of its files but for the manifest's.
    """
    if not os.path.isdir(path):
        return f"is no folder of the format {form!r}"
    names = sorted(os.listdir(path))
    if MANIFEST not in names or not is_of(os.path.join(path, MANIFEST), form):
        return f"holds no {MANIFEST} of the format {form!r}"
    other = next((name for name in names if name != MANIFEST and not files.fullmatch(name)), None)
    return None if other is None else f"holds {other}, which is not of the format {form!r}"


def is_of(path: str, form: str) -> bool:
    """Whether a file is a manifest of a format, damaged or not."""
    try:
        return load_json(path)["format"] == form
    except (OSError, ValueError, LookupError, TypeError):
        return False


def damaged_files(manifest: dict, base: str) -> list[str]:
    """What differs from the manifest's sizes and checksums, one message a file."""
    problems = []
    for name, expected in manifest.get("files", {}).items():
        path = base + name
        if not os.path.isfile(path):
            problems.append(f"{path}: missing")
        elif os.path.getsize(path) != expected["bytes"]:
            problems.append(f"{path}: {os.path.getsize(path)} bytes; it was written with {expected['bytes']}")
        elif "sha256" in expected and sha256(path) != expected["sha256"]:
            problems.append(f"{path}: its SHA-256 is not the one with which it was written")
    return problems
