"""A run that met faults, compared with the run that met none: samples, losses and final weights.

    sample ids of every step      equal
    losses, also of validation    1e-5 relative
    weights of the last step      1e-4 relative, of each parameter's norm

A parameter whose norm is small beside the others' (a bias that began at zero) is measured by their typical size: what
layouts round otherwise is as large there as anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

import torch

from megatron_mm.checkpoints.reader import CheckpointReader
from tests.faults.training import STEPS, finished_checkpoints

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


def _lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _steps(ours: Path, theirs: Path, stopped: Collection[int]) -> list[str]:
    lines, truth = _lines(ours), _lines(theirs)
    numbers = [line["iteration"] for line in lines]
    if numbers != list(range(1, STEPS + 1)):
        return [f"metrics.jsonl holds the steps {numbers} instead of 1 to {STEPS}"]
    found = []
    for a, b in zip(lines, truth, strict=True):
        if a["sample_ids"] != b["sample_ids"] or a["consumed_samples"] != b["consumed_samples"]:
            found.append(f"step {a['iteration']} read other samples")
        for name in ("loss", "validation_loss"):
            if name == "validation_loss" and name not in a and a["iteration"] in stopped:
                continue
            if (name in a) != (name in b):
                found.append(f"step {a['iteration']} has {'a' if name in a else 'no'} {name}")
            elif name in a and not math.isclose(a[name], b[name], rel_tol=LOSS_TOLERANCE):
                found.append(f"{name} of step {a['iteration']} is {a[name]!r} instead of {b[name]!r}")
    return found


def weight_difference(ours: Path, theirs: Path) -> tuple[float, str]:
    """The largest relative difference between the weights of two checkpoints, and of which parameter it is."""
    reader, truth = CheckpointReader(ours), CheckpointReader(theirs)
    names = sorted(truth.weights())
    if missing := set(names) ^ reader.weights():
        return math.inf, min(missing)
    norms, differences = {}, {}
    for name in names:
        a, b = reader.read(name).double(), truth.read(name).double()
        root = math.sqrt(b.numel())
        norms[name], differences[name] = float(b.norm()) / root, float((a - b).norm()) / root
    typical = float(torch.tensor(list(norms.values())).median())
    relative = {name: differences[name] / max(norms[name], typical) for name in names}
    worst = max(relative, key=lambda name: relative[name] if math.isfinite(relative[name]) else math.inf)
    return (relative[worst] if math.isfinite(relative[worst]) else math.inf), worst


def differences(ours: Path, theirs: Path, stopped: Collection[int] = ()) -> list[str]:
    """What differs between the outputs of two runs that came to their ends; nothing if nothing does.

    Args:
        ours: the run that met faults.
        theirs: the run without faults.
        stopped: steps after which a signal stopped ours in order; such a step may be without validation.
    """
    found = _steps(ours, theirs, stopped)
    last, truth = (finished_checkpoints(output / "checkpoints").get(STEPS) for output in (ours, theirs))
    if last is None or truth is None:
        return [*found, f"there is no checkpoint of step {STEPS}"]
    try:
        difference, name = weight_difference(last, truth)
    except ValueError as error:
        return [*found, f"the last checkpoint cannot be read: {error}"]
    if difference > WEIGHT_TOLERANCE:
        found.append(f"weights differ by {difference:.1e}, most in {name}")
    return found
