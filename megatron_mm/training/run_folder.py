"""The output folder of a run, looked at before anything is written there: what a run replaces has to be of a run.

A run writes its settings anew (config.yaml), cuts its figures back to the checkpoint that it goes on from
(metrics.jsonl) and, with --check, replaces preflight.json. Files of these names may be a user's own, such as a recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from megatron_mm.config.documents import load_yaml
from megatron_mm.config.outputs import Kind, check_file, check_place, figures
from megatron_mm.config.schema import Config

#: Sections that the settings of every run have.
_SECTIONS = {"model", "data", "training", "optimizer", "checkpoint", "logging"}


def _is_dumped(path: str) -> bool:
    """Whether a file is YAML as `dump_config` writes it: all sections, no comments, no layout of one's own."""
    tree = load_yaml(path)
    return tree.keys() >= _SECTIONS and yaml.safe_dump(tree, sort_keys=False) == Path(path).read_text()


def _are_metrics(path: str) -> bool:
    """Whether the first line is a record of an iteration, or one that a killed process did not finish."""
    begin = '{"iteration": '
    with open(path, encoding="utf-8") as stream:
        line = stream.readline(1 << 20)
    if not line.endswith("\n"):
        return line.startswith(begin) or begin.startswith(line)
    return json.loads(line).keys() >= {"iteration", "loss"}


SETTINGS, METRICS = Kind("the settings of a run", _is_dumped), Kind("the metrics of a run", _are_metrics)


def check(config: Config, measures: bool = False) -> None:
    """Raises OutputError where a run would replace what is not a run's, or where an output is no place for one.

    Args:
        measures: the run is a `--check`, which writes preflight.json.
    """
    output = config.logging.output
    check_place(output, "logging.output")
    if config.checkpoint.save is not None:
        check_place(config.checkpoint.save, "checkpoint.save")
    check_file(Path(output, "config.yaml"), "logging.output", SETTINGS)
    check_file(Path(output, "metrics.jsonl"), "logging.output", METRICS)
    if measures:
        check_file(Path(output, "preflight.json"), "logging.output", figures("passed"))
