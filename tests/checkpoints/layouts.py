"""Checkpoints saved in one layout and loaded in others: weights and optimizer state are the same, digit for digit.

    python -m tests.checkpoints.layouts [--saved TP2xDP2+distopt] [--systems dual_encoder …] [--before]

Each small system trains two steps and saves; each other layout loads that and, without a step, saves again. Truth: what
the first checkpoint holds, every tensor of it whole; a copy of it in another layout must have the same bits. With
`--before` the first checkpoints are the fixtures of the five systems, in the format of before.

The systems have tied weights over stages (dual encoder, PerceiverFusion) and, in one case, frozen nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.support.checkpoints import plain_tensors
from tests.support.programs import TORCHRUN

#: Ten layouts that load; between them they have every kind of parallelism, of one to eight processes.
LAYOUTS = (
    "DP1", "TP2", "TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "DP2+distopt", "PP2xDP2+distopt",
    "TP2xPP2xDP2+SP+distopt+full+reduce+gather",
)  # fmt: skip
SYSTEMS = ("synapse", "avt", "vlm", "perceiver_fusion", "dual_encoder", "dual_encoder with a frozen text encoder")


@dataclass
class Task:
    """What the processes of a layout do with one system."""

    system: str
    layout: str
    save: str
    load: str = ""
    """A folder of checkpoints; none: two steps of training come before the save."""


def _config(system: str, load: str):
    from megatron_mm.config.load import load_saved_config
    from megatron_mm.config.schema import NodeGroupConfig
    from megatron_mm.config.section import changed
    from tests.support import recipes

    if system == "of before":
        (folder,) = Path(load).glob("iter_*")
        return changed(load_saved_config(folder / "config.yaml"), {"data.tokenizer": None})
    small = {
        "synapse": recipes.small_config, "avt": recipes.small_avt, "vlm": recipes.small_vlm,
        "perceiver_fusion": recipes.small_perceiver_fusion, "dual_encoder": recipes.small_dual_encoder,
    }  # fmt: skip
    name, _, frozen = system.partition(" ")
    config = small[name]()
    if not frozen:
        return config
    groups = [NodeGroupConfig(nodes=["text.*", "fusion.output"], frozen_iters=-1)]
    return changed(config, {"optimizer.groups": groups})


def run_task(task: Task) -> None:
    """Trains or loads, and saves. Collective."""
    from megatron.core import parallel_state

    from megatron_mm.checkpoints import checkpoint
    from megatron_mm.checkpoints.save import save
    from megatron_mm.checks.layouts import for_layout, parse_layout
    from megatron_mm.config.validate import parallel_sizes
    from megatron_mm.data.reading.generated import GeneratedRows
    from megatron_mm.pipeline.schedule import run_batch
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.platform import setup
    from megatron_mm.training.optimizer import Optimizer

    config = for_layout(_config(task.system, task.load), parse_layout(task.layout), 3, pool=4, global_batch=8)
    sizes = parallel_sizes(config, setup.world_size())
    device = setup.initialize(sizes, seed=1)
    pipeline = Assembly.of(config, sizes).build(device, seed=3)
    optimizer = Optimizer(config, pipeline)
    if task.load:
        position = checkpoint.load(checkpoint.find(Path(task.load)), pipeline, optimizer)
    else:
        rows, rank, own = GeneratedRows(config), parallel_state.get_data_parallel_rank(), 4 // sizes.dp
        for step in range(2):
            optimizer.zero_grad()
            begins = [8 * step + 4 * pool + own * rank for pool in range(2)]
            run_batch(pipeline, [rows.microbatch(range(at, at + own), pipeline.fields()) for at in begins])
            optimizer.step(optimizer.gradient_norm(), 8)
        position = checkpoint.Position(2, 16)
    save(config, Path(task.save), pipeline, optimizer, position)


def launch(tasks: list[Task], processes: int) -> None:
    """Runs tasks one after another in as many processes."""
    words = [*TORCHRUN, str(processes), "-m", "tests.checkpoints.layouts", "--tasks"]
    words.append(json.dumps([asdict(task) for task in tasks]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])


def processes_of(layout: str) -> int:
    """How many processes a layout has."""
    from tests.pipeline.toy import sizes_of

    return sizes_of(layout).world


def differences(one: Path, other: Path) -> list[str]:
    """What differs in the tensors of two folders of one checkpoint each."""
    (first,), (second,) = (list(folder.glob("iter_*")) for folder in (one, other))
    a, b = plain_tensors(first), plain_tensors(second)
    lines = [f"{key} is in one alone" for key in sorted(a.keys() ^ b.keys())]
    for key in sorted(a.keys() & b.keys()):
        if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key]):
            lines.append(f"{key} differs")
    return lines


def compare(firsts: dict[str, Path], system_of: dict[str, str], layouts: tuple[str, ...], work: Path) -> list[str]:
    """Loads checkpoints in layouts and saves them again; what differs then.

    Args:
        firsts: folders of one checkpoint each, by name.
        system_of: the system of each.
    """
    tasks: dict[int, list[Task]] = defaultdict(list)
    for name, first in firsts.items():
        for layout in layouts:
            target = work / f"{name} in {layout}"
            tasks[processes_of(layout)].append(Task(system_of[name], layout, str(target), str(first)))
    lines = []
    for processes, own in sorted(tasks.items()):
        launch(own, processes)
        for task in own:
            found = differences(Path(task.load), Path(task.save))
            print(f"{Path(task.save).name}: {f'{len(found)} tensors differ' if found else 'the same'}", flush=True)
            lines += [f"{Path(task.save).name}: {line}" for line in found]
    return lines


def saved_first(systems: tuple[str, ...], layout: str, work: Path) -> dict[str, Path]:
    """A checkpoint of each system, trained in a layout."""
    folders = {system: work / system for system in systems}
    launch([Task(system, layout, str(folder)) for system, folder in folders.items()], processes_of(layout))
    return folders


def of_before(work: Path) -> dict[str, Path]:
    """The fixtures' checkpoints of the five systems."""
    from tests.fixtures import archive, measure

    return {
        name: archive.unpack(archive.BEFORE / f"{name}.tar.gz", work / "before" / name) / "checkpoint"
        for name in measure.TINY
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved", default="TP2xDP2+distopt", help="layout of the first checkpoint")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="layouts that load it")
    parser.add_argument("--before", action="store_true", help="checkpoints of the format of before")
    parser.add_argument("--tasks", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tasks:
        from megatron_mm.platform import setup

        for fields in json.loads(args.tasks):
            run_task(Task(**fields))
        setup.shutdown()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        firsts = of_before(work) if args.before else saved_first(tuple(args.systems), args.saved, work)
        system_of = {name: "of before" if args.before else name for name in firsts}
        lines = compare(firsts, system_of, tuple(args.layouts), work)
    print("\n".join(lines) or "all are the same, digit for digit")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
