"""The full recipes as their scripts launch them, without starting anything."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from megatron_mm.config.load import parse_command_line
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.config.validate import parallel_sizes
from megatron_mm.platform import setup
from tests.support import programs

ROOT = Path(__file__).resolve().parents[2]
FULL = ("synapse-70b", "avt-33b", "vlm-14b", "perceiver-fusion-xl", "dual-encoder")
#: Every full recipe, and the first phase of those that have two.
PHASES = [*((name, "joint") for name in FULL), ("vlm-14b", "mae"), ("dual-encoder", "mae")]
#: The environment of one task of Slurm, so that the script runs Python itself.
_TASK = {"SLURM_NTASKS": "8", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def script(name: str, kind: str = "sh") -> Path:
    """The launch script of a full recipe."""
    return ROOT / "examples" / name.replace("-", "_") / f"pretrain.{kind}"


def words(name: str, *options: str, **environment: str) -> list[str]:
    """What the script of a full recipe gives to pretrain_multimodal.py."""
    with tempfile.TemporaryDirectory() as folder:
        python, said = Path(folder, "python"), Path(folder, "words")
        python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >{said}\n")
        python.chmod(0o755)
        path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        given = {"DATA": "data", "TOKENIZER": "tokenizer.model", **_TASK, **path, **environment}
        subprocess.run([script(name), *options], env=given, check=True)
        program, *rest = said.read_text().split("\0")[:-1]
    assert program == "pretrain_multimodal.py"
    return rest


def launched(name: str, phase: str = "joint", *options: str) -> tuple[Config, ParallelSizes]:
    """What the script of a full recipe launches in a phase, and its layout."""
    setup.apply_platform()
    config = parse_command_line(words(name, "--dry-run", *options, PHASE=phase)).config
    return config, parallel_sizes(config, config.parallel.world_size)


def dry_run(name: str, phase: str, output: Path) -> dict:
    """What the script of a full recipe finds in a dry run, at the number of GPUs of its recipe."""
    command = [script(name), "--dry-run", "--dry-run-json", output]
    environment = programs.environment(PHASE=phase)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


def estimates(config: Config, sizes: ParallelSizes) -> list[float]:
    """What the partitioner takes for the memory of a process of each stage, in bytes."""
    from megatron_mm.models.phases import LAST_PHASE
    from megatron_mm.planner.assembly import Assembly

    assembly = Assembly.of(config, sizes, iteration=LAST_PHASE)
    cuts = assembly.cuts
    return [assembly.memory(chunk, *cuts[chunk : chunk + 2]) for chunk in range(sizes.chunks)]
