"""Forward and backward of each tower against the peer's module of the same shape, interleaved in one process.

    python benchmarks/towers.py [--cases vit swin] [--threads 2] [--json FILE]

Ours: the nodes that training runs, local backend, one process. Theirs: Hugging Face's module, with its SDPA attention
where it has one. Both have the same weights and inputs, and their outputs must agree, or the comparison would not be
one. Prints the medians and the median of the ratios of neighbouring runs. The cases are the modules of tower_cases/.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import tyro

from megatron_mm.config import outputs
from megatron_mm.platform.atomic_files import write_figures

LIMIT = 1.2

ROOT = Path(__file__).resolve().parents[1]

#: Towers whose speed is promised: a case that is missing is an error.
PROMISED = ("conformer", "mae", "perceiver", "swin", "vit")


@dataclass
class Arguments:
    """What to measure."""

    cases: tuple[str, ...] = ()
    """Cases by name; none: all."""
    steps: int = 15
    """Runs of each side that are measured."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """File for the figures."""
    smoke: bool = False
    """A few runs of small towers, to see that they agree; the ratios mean nothing then."""


class NotTheSameTower(Exception):
    """The two sides of a case do not compute the same."""


def known_cases() -> list[str]:
    """Names of the modules in tower_cases/."""
    return sorted(path.stem for path in (ROOT / "benchmarks" / "tower_cases").glob("*.py") if path.stem != "__init__")


def seconds(forward: Callable[[], object]) -> float:
    """Wall time of forward and backward."""
    began = time.perf_counter()
    forward().sum().backward()
    return time.perf_counter() - began


def median(values: list[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def measure(name: str, arguments: Arguments) -> dict:
    """Figures of one case.

    Raises:
        NotTheSameTower: names the case and the difference.
    """
    import torch

    case = import_module(f"benchmarks.tower_cases.{name}").build(arguments.smoke)
    with torch.no_grad():
        ours, theirs = case.ours().detach(), case.theirs().detach()
    if ours.shape != theirs.shape:
        raise NotTheSameTower(f"{name}: not the same tower: outputs {list(ours.shape)} against {list(theirs.shape)}")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= 1e-4:
        raise NotTheSameTower(f"{name}: not the same tower: outputs differ by {difference:.1e} of the largest")
    del ours, theirs
    for side in (case.ours, case.theirs):
        seconds(side)
    pairs = []
    for step in range(arguments.steps):
        if step % 2:
            theirs = seconds(case.theirs)
            pairs.append((seconds(case.ours), theirs))
        else:
            ours = seconds(case.ours)
            pairs.append((ours, seconds(case.theirs)))
    return {
        "case": name,
        "what": case.name,
        "ours_ms": 1e3 * median([a for a, _ in pairs]),
        "theirs_ms": 1e3 * median([b for _, b in pairs]),
        "ratio": median([a / b for a, b in pairs]),
    }


def main() -> int:
    """Measure; 1 if a case is missing, its sides disagree, or its ratio is above the limit; 2 for an unknown case."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        outputs.check_file(arguments.json, "--json", outputs.figures("cases"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = known_cases()
    unknown = [name for name in arguments.cases if name not in {*known, *PROMISED}]
    if unknown:
        print(f"error: --cases {' '.join(unknown)}: known cases are {', '.join(known)}", file=sys.stderr)
        return 2
    wanted = list(arguments.cases) or sorted({*known, *PROMISED})
    missing = [name for name in wanted if name not in known]
    if missing:
        files = ", ".join(f"benchmarks/tower_cases/{name}.py" for name in missing)
        print(f"error: a promised case is missing: {files}", file=sys.stderr)
        return 1
    if arguments.smoke:
        arguments.steps = 2
    sys.path.insert(0, str(ROOT))  # the cases are modules of the repository, not of the package
    import torch

    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.platform import setup

    torch.set_num_threads(arguments.threads)
    with contextlib.redirect_stdout(sys.stderr):  # libraries' notices do not belong to the table
        setup.initialize(ParallelSizes(), seed=1)
    figures = []
    print(f"forward + backward, {arguments.steps} runs of each side, {arguments.threads} threads")
    for name in wanted:
        try:
            figures.append(measure(name, arguments))
        except NotTheSameTower as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        gc.collect()
        row = figures[-1]
        print(f"  {name:<12} ours {row['ours_ms']:8.1f} ms  theirs {row['theirs_ms']:8.1f} ms  "
              f"ratio {row['ratio']:6.3f} (limit {LIMIT})  {row['what']}")  # fmt: skip
    write_figures(arguments.json, {"limit": LIMIT, "threads": arguments.threads, "cases": figures})
    slow = [row["case"] for row in figures if row["ratio"] > LIMIT]
    if slow and not arguments.smoke:
        print(f"above the limit: {', '.join(slow)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
