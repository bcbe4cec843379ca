"""Checks what only GPUs can show: each line a check with its numbers, PASS or FAIL; status 0 if none failed.

    python tools/check_gpus.py one          Transformer Engine against the local backend, MFU, memory, on one GPU
    python tools/check_gpus.py node         NCCL: layouts against one process, MFU, memory, on the GPUs of a node
    python tools/check_gpus.py two-nodes    pipeline and data parallel across nodes, save and resume, MFU

Called through examples/check_gpus.sh, which sets what the cluster needs; `two-nodes` on both nodes. What is compared,
by which bounds and why, is said in megatron_mm/checks/gpu_checks.py. Without CUDA the same checks compare the local
backend with itself under gloo: that shows that they run and can fail, not that a GPU is right.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.checks import gpu_checks
from megatron_mm.config.outputs import UsageError, check_file, check_place, figures
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """Checks of GPUs."""

    what: tyro.conf.Positional[Literal["one", "node", "two-nodes"]]
    """Which machines are checked."""
    output: Path = Path("outputs/check-gpus")
    """Folder of the runs, which all nodes must see; a new one, or one of earlier checks, whose runs are replaced."""
    steps: int = 20
    """Steps of each run, at least 4."""
    gpus: int | None = None
    """GPUs of a node; null: those that are there, or 4 processes on a CPU. `one` takes 1."""
    nodes: int = 2
    """Nodes of `two-nodes`."""
    node_rank: int = 0
    """Number of this node."""
    master_addr: str = "localhost"
    """The first node."""
    master_port: int = 29500
    """A port of it, and the next ten."""
    second: list[str] = field(default_factory=list)
    """Options for the second run of each comparison, to see it fail: --second optimizer.lr=4e-3 training.seed=2. The
    layouts are those of the checks."""
    json: Path | None = None
    """Also write the checks to this file."""


def main() -> int:
    """Prints a line for each check; 1 if one failed."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.steps < 4:
        raise UsageError(f"--steps is {arguments.steps}; a run needs at least 4 to be compared")
    cuda = torch.cuda.is_available()
    gpus = arguments.gpus or (torch.cuda.device_count() if cuda else 4)
    if arguments.what == "node" and gpus < 4:
        raise UsageError(f"--gpus is {gpus}; `node` needs at least 4 (`one` checks a single GPU)")
    if arguments.what == "one" and arguments.gpus not in (None, 1):
        raise UsageError(f"--gpus is {arguments.gpus}; `one` checks a single GPU (`node` those of a node)")
    if arguments.what != "two-nodes" and arguments.nodes not in (1, Arguments.nodes):
        raise UsageError(f"--nodes is {arguments.nodes}; `{arguments.what}` checks one node (`two-nodes` several)")
    second = [f"--{option}" for option in arguments.second]
    try:
        gpu_checks.check_second(arguments.what, second, arguments.steps)
        check_place(arguments.output, "--output")  # before it becomes absolute
        check_file(arguments.json, "--json", figures("check", "passed"))
        machines = gpu_checks.Machines(
            arguments.output.resolve(),
            cuda,
            gpus,
            arguments.nodes if arguments.what == "two-nodes" else 1,
            arguments.node_rank,
            arguments.master_addr,
            arguments.master_port,
            second,
        )
    except (ValueError, torch.distributed.DistError) as error:  # the latter: the first node is not to be reached
        raise UsageError(str(error)) from error
    first = arguments.node_rank == 0
    if first:
        where = torch.cuda.get_device_name() if cuda else "no CUDA: local backend, gloo; this says nothing about a GPU"
        print(f"checks of {arguments.what} ({where})", flush=True)
    checks = {"one": gpu_checks.one, "node": gpu_checks.node, "two-nodes": gpu_checks.two_nodes}[arguments.what]
    verdicts = []
    for verdict in checks(machines, arguments.steps):
        verdicts.append(verdict)
        if first or not verdict.passed:
            print(verdict, flush=True)
    write_figures(arguments.json, [asdict(verdict) for verdict in verdicts])
    failed = sum(verdict.passed is False for verdict in verdicts)
    if first:
        unmeasured = sum(verdict.passed is None for verdict in verdicts)
        word = "FAILED" if failed else "passed"
        print(f"{word}: {failed} of {len(verdicts)} checks failed, {unmeasured} not measured")
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main, left="")
