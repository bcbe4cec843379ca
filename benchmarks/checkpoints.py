"""Saving and loading of checkpoints against the disk and against torch's own, interleaved in the same processes.

    python benchmarks/checkpoints.py [--layouts DP2 TP2xDP2] [--rounds 7] [--folder FOLDER] [--json FILE]

About 150 million parameters in fp32, distributed optimizer. In each round: a save as training makes it (copy, then a
process beside each rank writes), the same bytes written by as many `dd` with fdatasync at once, torch.distributed.
checkpoint's save of the same tensors; then each of the three reads. Also: how long training stands still against a copy
of the pieces in memory, how much memory a save takes, and, with one training process, how much a step slows down while
a save is written. At the end, computed from the same code, what synapse-70b writes on 256 GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from megatron_mm.config import outputs
from megatron_mm.platform.atomic_files import write_figures

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "megatron_mm" / "recipes"
#: Synapse-tiny, made wide and deep: its graph, with matrices as large as those of real models.
WIDE = {
    "model.decoder.hidden_size": 1024,
    "model.decoder.num_layers": 10,
    "model.decoder.num_attention_heads": 16,
    "model.decoder.num_query_groups": 4,
    "model.decoder.ffn_hidden_size": 2816,
    "model.decoder.vocab_size": 16384,
    "training.precision": "fp32",
    "parallel.use_distributed_optimizer": True,
}
#: The same for a machine with a minute's time.
NARROW = {**WIDE, "model.decoder.hidden_size": 256, "model.decoder.num_layers": 2, "model.decoder.ffn_hidden_size": 512}
#: Ratios that are promised: (figure, bound, whether it is the least).
PROMISED = {"written": (0.8, True), "against_torch": (1.0, True), "read": (0.8, True), "stands_still": (1.5, False)}


@dataclass
class Arguments:
    """What to measure."""

    layouts: tuple[str, ...] = ("DP2", "TP2xDP2")
    """Layouts; one process to each unit of parallelism."""
    rounds: int = 7
    """Rounds of each layout, interleaved."""
    steps: int = 7
    """Pairs of steps, with a save beside them and without."""
    folder: Path | None = None
    """Where to write; none: a temporary folder."""
    json: Path | None = None
    """File for the figures."""
    smoke: bool = False
    """A small model and two rounds, to see that it runs; the ratios mean nothing then."""


# ------------------------------------------------------------------------------------------ in each process of a run


def built(layout: str, smoke: bool):
    """Configuration, pipeline and optimizer of this process, its state filled with numbers that do not compress."""
    import torch

    from megatron_mm.checkpoints.checkpoint import weights_of
    from megatron_mm.checks.layouts import parse_layout
    from megatron_mm.config.load import load_config
    from megatron_mm.config.section import changed
    from megatron_mm.config.validate import parallel_sizes
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.platform import setup
    from megatron_mm.training.optimizer import Optimizer

    torch.set_num_threads(1)
    parsed = parse_layout(layout)
    changes = {**(NARROW if smoke else WIDE), "data.tokenizer": None}
    changes |= {f"parallel.{name}": value for name, value in parsed.parallel.items()}
    config = changed(load_config(RECIPES / "synapse-tiny.yaml"), changes)
    sizes = parallel_sizes(config, parsed.world_size)
    device = setup.initialize(sizes, config.training.seed)
    pipeline = Assembly.of(config, sizes, device.type).build(device, config.training.seed)
    optimizer = Optimizer(config, pipeline)
    for slot in optimizer.slots(weights_of(pipeline)):
        slot.tensor.uniform_(0.5, 1.0)
    return config, pipeline, optimizer


class Together:
    """Times what all processes do at once: from the moment at which all are ready to that at which all have ended."""

    def __call__(self, act: Callable[[], object]) -> float:
        import torch.distributed as dist

        dist.barrier()
        began = time.perf_counter()
        act()
        dist.barrier()
        return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drops files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def dd(*words: str) -> None:
    """Runs dd."""
    subprocess.run(["dd", "bs=4M", *words], check=True, capture_output=True)


class Memory:
    """The most memory that this process and its children have at a time, what they share counted once."""

    def __init__(self) -> None:
        self.most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        import psutil

        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0]) << 10
        return total

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, self._now())

    def close(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.most


def measure(layout: str, folder: Path, rounds: int, smoke: bool) -> dict:
    """Figures of a layout; the same on every process."""
    import torch
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    from megatron_mm.checkpoints import checkpoint
    from megatron_mm.checkpoints.checkpoint import Position, weights_of
    from megatron_mm.checkpoints.save import Saver, image_of
    from megatron_mm.platform.collectives import communication_device

    config, pipeline, optimizer = built(layout, smoke)
    rank, together = dist.get_rank(), Together()
    image = image_of(pipeline, optimizer)
    sizes = torch.tensor([float(image.size)], device=communication_device())
    dist.all_reduce(sizes)
    total = float(sizes)
    needed = sum(slot.tensor.nbytes for weight in weights_of(pipeline) for slot in weight.slots())
    needed += sum(slot.tensor.nbytes for slot in optimizer.slots(weights_of(pipeline)))
    # dd's input lies in memory, as the tensors do.
    source = Path("/dev/shm", f"checkpoint-benchmark-{os.getppid()}-{rank}")
    before = Memory._now()
    figures: dict[str, list[float]] = {name: [] for name in ("ours", "dd", "torch", "load", "dd_read", "torch_load")}
    figures |= {name: [] for name in ("still", "copy", "first_still")}
    saver = Saver(config, folder / "ours", in_background=True)
    saver.prepare(pipeline, optimizer)
    own = {f"{rank}/{number}": slot.tensor.detach() for number, slot in enumerate(image.slots)}
    spare: list[torch.Tensor] = []

    def copy() -> None:
        for one, slot in zip(spare, image.slots):
            one.copy_(slot.tensor)

    memory = Memory()
    peaks = []
    try:
        for number in range(rounds + 1):  # the first is not counted
            target = folder / "ours"
            shutil.rmtree(target, ignore_errors=True) if rank == 0 else None
            for name in ("dd", "torch"):
                shutil.rmtree(folder / name, ignore_errors=True) if rank == 0 else None
            dist.barrier()
            for name in ("ours", "dd", "torch"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            os.sync()

            def save(iteration: int = number + 1) -> None:
                began = time.perf_counter()
                saver.begin(pipeline, optimizer, Position(iteration, iteration))
                figures["still"].append(time.perf_counter() - began)
                saver.wait()

            figures["ours"].append(together(save))
            if number == 0:
                peaks.append(memory.close() - before)
                spare += [torch.empty_like(slot.tensor) for slot in image.slots]
                written = target / "iter_0000001"
                with open(source, "wb") as stream:
                    for chunk in image.chunks():
                        stream.write(chunk)
            figures["copy"].append(together(copy))
            figures["dd"].append(
                together(lambda: dd(f"if={source}", f"of={folder / 'dd' / str(rank)}", "conv=fdatasync"))
            )
            with contextlib.redirect_stderr(None):
                figures["torch"].append(together(lambda: (dcp.save(own, checkpoint_id=folder / "torch"), os.sync())))
            # Reading: what each needs, from the disk.
            written = target / f"iter_{number + 1:07d}"
            forget(folder)
            figures["load"].append(together(partial(checkpoint.load, written, pipeline, optimizer)))
            forget(folder)
            figures["dd_read"].append(together(lambda: read_with_dd(folder / "dd", rank, needed)))
            forget(folder)
            figures["torch_load"].append(together(lambda: dcp.load(own, checkpoint_id=folder / "torch")))
            if rank == 0:
                print(f"{layout}: round {number} of {rounds}", file=sys.stderr, flush=True)
    finally:
        saver.close()
        source.unlink(missing_ok=True)
    parameters = sum(p.numel() for chunk in pipeline.bare_chunks for p in chunk.parameters())
    result = {
        "layout": layout,
        "processes": dist.get_world_size(),
        "parameters": parameters,
        "bytes": total,
        "bytes_of_process": image.size,
        "bytes_read_by_process": needed,
        "seconds": {name: values[1:] for name, values in figures.items() if len(values) > 1},
        "first_still": figures["still"][0],
        "peak_bytes": max(peaks),
    }
    from megatron_mm.platform import setup

    setup.shutdown()
    return result


def read_with_dd(folder: Path, rank: int, needed: int) -> None:
    """Reads as many bytes as this process loads: its own file, and of the others what is left."""
    files = sorted(folder.iterdir())
    for path in [files[rank], *files[:rank], *files[rank + 1 :]]:
        count = -(-min(needed, path.stat().st_size) // (4 << 20))
        if count > 0:
            dd(f"if={path}", "of=/dev/null", f"count={count}")
        needed -= count * (4 << 20)


def slow_down(folder: Path, steps: int, smoke: bool) -> dict:
    """Steps of one process with a save being written beside them, against steps without, neighbours compared."""
    import resource

    from megatron_mm.checkpoints.checkpoint import Position
    from megatron_mm.checkpoints.save import Saver
    from megatron_mm.pipeline.schedule import run_batch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from train_step import Arguments as StepArguments
    from train_step import make_inputs

    config, pipeline, optimizer = built("DP1", smoke)
    batch, _ = make_inputs(config, StepArguments(rows=2, tokens=64 if smoke else 256))
    saver = Saver(config, folder / "beside", in_background=True)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        run_batch(pipeline, [batch])
        optimizer.step(optimizer.gradient_norm(), samples=2)
        return time.perf_counter() - began

    step()
    saver.prepare(pipeline, optimizer)
    ratios, during, alone, written = [], [], [], 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for number in range(steps):
        saver.begin(pipeline, optimizer, Position(number + 1, number + 1))
        beside = []
        while saver.busy:
            beside.append(step())
            if saver.poll() is not None:
                break
        quiet = [step() for _ in range(max(1, len(beside)))]
        # The last step of a save runs in part beside nothing.
        mean = statistics.mean(beside[:-1] or beside)
        during.append(mean)
        alone.append(statistics.mean(quiet))
        ratios.append(mean / statistics.mean(quiet))
        written += 1
    size = sum(path.stat().st_size for path in (folder / "beside").glob("iter_*/*.safetensors")) / max(
        1, len(list((folder / "beside").glob("iter_*")))
    )
    saver.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    from megatron_mm.platform import setup

    setup.shutdown()
    return {
        "ratios": ratios,
        "step_seconds": statistics.median(alone),
        "step_seconds_beside": statistics.median(during),
        "cpu_seconds_a_gb": cpu / (size * written / 1e9),
        "bytes": size,
    }


def planned(recipe: str = "synapse-70b", world: int = 256, node: int = 8) -> dict:
    """What the processes of a full recipe write, from the entries of its stages, without memory for them."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mm.checkpoints.checkpoint import weights_of
    from megatron_mm.config.load import load_config
    from megatron_mm.config.validate import parallel_sizes
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.platform import cpu, setup

    setup.apply_platform()
    config = load_config(RECIPES / f"{recipe}.yaml")
    sizes = parallel_sizes(config, world)
    stages = []
    cpu.set_device("meta")
    try:
        for stage in range(sizes.pp):
            rank = stage * sizes.world // sizes.pp
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            setup.initialize_groups(sizes, gloo=False)
            setup.seed_dropout(config.training.seed)
            with torch.device("meta"):
                pipeline = Assembly.of(config, sizes).build(torch.device("meta"), None)
            weights = [weight for weight in weights_of(pipeline) if weight.is_first]
            learned = sum(weight.parameter.numel() for weight in weights if weight.parameter.requires_grad)
            held = sum(weight.parameter.nbytes for weight in weights)
            stages.append((held + 12 * learned) / sizes.dp)
            setup.shutdown()
    finally:
        cpu.set_device("cpu")
    return {
        "recipe": recipe,
        "processes": world,
        "bytes_of_process": stages,
        "node": node,
        "total": sum(stages) * world / sizes.pp,
    }


# ------------------------------------------------------------------------------------------------------ the command


def started(what: str, processes: int, *words: str) -> dict:
    """Runs this file in processes of its own; what the first of them wrote."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_ROLE": what, "BENCHMARK_FILE": file.name}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [*launcher, __file__, *words], env={**environment, "PYTHONPATH": path}, check=False, stdout=sys.stderr
        )
        if done.returncode:
            raise RuntimeError(f"{what} ended with status {done.returncode}")
        return json.loads(Path(file.name).read_text())


def work() -> None:
    """What one of the started processes does."""
    role, words = os.environ["BENCHMARK_ROLE"], sys.argv[1:]
    if role == "measure":
        figures = measure(words[0], Path(words[1]), int(words[2]), words[3] == "smoke")
    elif role == "slow_down":
        figures = slow_down(Path(words[0]), int(words[1]), words[2] == "smoke")
    else:
        figures = planned()
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["BENCHMARK_FILE"]).write_text(json.dumps(figures))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(figures: dict) -> dict[str, list[float]]:
    """Of each round: rates against dd's and torch's, and time against a copy in memory."""
    seconds = figures["seconds"]
    pairs = {
        "written": ("dd", "ours"),
        "against_torch": ("torch", "ours"),
        "read": ("dd_read", "load"),
        "read_against_torch": ("torch_load", "load"),
        "stands_still": ("still", "copy"),
    }
    return {name: [a / b for a, b in zip(seconds[one], seconds[other])] for name, (one, other) in pairs.items()}


def report(figures: dict) -> bool:
    """Prints a layout's figures; whether what is promised holds."""
    seconds, found = figures["seconds"], ratios(figures)
    giga = figures["bytes"] / 1e9
    print(
        f"{figures['layout']}: {figures['processes']} processes, {figures['parameters'] / 1e6:.0f} M parameters on the "
        f"first, {giga:.2f} GB in all"
    )
    read = figures["bytes_read_by_process"] * figures["processes"] / 1e9
    for name, label, size in (
        ("ours", "save", giga),
        ("dd", "dd with fdatasync", giga),
        ("torch", "torch's save", giga),
        ("load", "load", read),
        ("dd_read", "dd, as many bytes", read),
        ("torch_load", "torch's load", read),
    ):
        middle = statistics.median(seconds[name])
        print(f"  {label:22} {middle:7.2f} s  {size / middle:6.2f} GB/s")
    still = statistics.median(seconds["still"])
    print(f"  training stands still  {still:7.2f} s, {figures['first_still']:.2f} s at the first save")
    beyond = (figures["peak_bytes"] - figures["bytes_of_process"]) / 2**20
    print(f"  memory beyond the pieces of a process: {beyond:.0f} MiB (limit 256)")
    kept = beyond <= 256
    for name, values in found.items():
        bound = PROMISED.get(name)
        said = f", {'at least' if bound[1] else 'at most'} {bound[0]}" if bound else ""
        print(f"  ratio {name:18} {spread(values)}{said}")
        if bound:
            middle = statistics.median(values)
            kept &= middle >= bound[0] if bound[1] else middle <= bound[0]
    return kept


def main() -> int:
    """Measure; 1 if something that is promised does not hold."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        outputs.check_file(arguments.json, "--json", outputs.figures("layouts"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.layouts = 2, 2, ("DP2",)
    from megatron_mm.checks.layouts import parse_layout

    size = "smoke" if arguments.smoke else "full"
    kept, all_figures = True, {"layouts": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for layout in arguments.layouts:
            words = (layout, str(Path(folder, layout)), str(arguments.rounds), size)
            figures = started("measure", parse_layout(layout).world_size, *words)
            shutil.rmtree(Path(folder, layout), ignore_errors=True)
            kept &= report(figures)
            all_figures["layouts"].append({**figures, "ratios": ratios(figures)})
        figures = all_figures["beside"] = started("slow_down", 1, folder, str(arguments.steps), size)
    print(
        f"one training process, {figures['bytes'] / 1e9:.2f} GB a save: a step takes {spread(figures['ratios'])} of "
        f"its time while a save is written (at most 1.1); {figures['cpu_seconds_a_gb']:.2f} CPU seconds a GB"
    )
    kept &= statistics.median(figures["ratios"]) <= 1.1
    plan = all_figures["planned"] = started("planned", 1)
    most = max(plan["bytes_of_process"])
    print(
        f"computed: {plan['recipe']} on {plan['processes']} GPUs writes {plan['total'] / 1e9:.0f} GB; a process at "
        f"most {most / 1e9:.2f} GB, a node of {plan['node']} {most * plan['node'] / 1e9:.1f} GB: "
        f"{most * plan['node'] / 2e9:.0f} s at 2 GB/s a node"
    )
    write_figures(arguments.json, all_figures)
    return 0 if kept or arguments.smoke else 1


if __name__ == "__main__":
    if "BENCHMARK_ROLE" in os.environ:
        work()
    else:
        sys.exit(main())
