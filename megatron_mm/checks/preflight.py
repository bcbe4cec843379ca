"""Pre-flight: what a run needs from its machines, checked before it trains (`pretrain_multimodal.py --check`).

After the comparison with which every run begins (training/start.py): a matrix product on every device, an all-reduce of
every group and a message to the next pipeline stage, each compared with its right value and timed, free memory and free
disk.

Devices of a cluster are bought alike, so each is compared with the median of its kind; a slow one is named with host
and local rank, because every step of the whole run waits for it. A CPU's processes share cores: there speeds are shown,
not judged. A process that hangs is ended by the watchdog, with stacks.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.local import LocalCopies
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.models.phases import LAST_PHASE
from megatron_mm.planner.assembly import Assembly
from megatron_mm.planner.memory import checkpoint_bytes
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.training import identity
from megatron_mm.training.identity import Place, gathered, located, shortened, told
from megatron_mm.training.start import start
from megatron_mm.training.tracking import peak_tflops

#: A device that takes so many times the median for a product is slow. Clocks and temperatures of healthy ones differ by
#: a few percent; a throttled or shared one is off by far more.
SLOW_PRODUCT = 1.3
#: As much for a collective, which shares switches with its neighbours.
SLOW_COLLECTIVE = 1.5
#: Share of the data sheet's peak that a large bf16 product must reach: whole training steps reach more than 0.4 of it
#: (gpu_checks.py), and they do other work besides.
LEAST_OF_PEAK = 0.5
#: Share of a device's memory that must be free; what is less is another process.
LEAST_FREE = 0.9


@dataclass(frozen=True)
class Measured:
    """What a process measured of a kind of work that several do together."""

    kind: str
    ranks: tuple[int, ...]
    """Those that did it together: a group, or sender and receiver."""
    sent: float
    """Bytes that each sends."""
    seconds: float
    right: bool
    """The result was the right one."""


@dataclass(frozen=True)
class Product:
    """What a process measured of its device."""

    device: str
    seconds: float
    tflops: float
    digest: int
    """Of the result's bits; the same on the same devices."""
    free: int
    total: int
    """Bytes of the device's memory; 0 and 0 on a CPU."""


def run_from_command_line(config: Config, sizes: ParallelSizes) -> None:
    """`pretrain_multimodal.py --check`: everything, with the data opened, as a table and OUTPUT/preflight.json.

    Raises:
        ValueError: what is wrong, all of it; the same on every process.
    """
    device, watchdog = start(config, sizes)
    if dist.get_rank() == 0:
        print("code, versions, settings, data: the same on all processes; the checkpoint folder is shared", flush=True)
    watchdog.beat("opening the data")
    build_datasets(config)
    watchdog.beat("measuring devices and collectives")
    check(config, sizes, device)
    watchdog.stop()


def check(
    config: Config,
    sizes: ParallelSizes,
    device: torch.device,
    product: Callable[[torch.device], Product] | None = None,
    judged: bool | None = None,
) -> None:
    """Measures devices, collectives, memory and disk, and prints what was found. Collective.

    Args:
        product: measures a device; None: `multiply`.
        judged: whether a slow device is an error; None: on CUDA.

    Raises:
        ValueError: what is wrong, all of it; the same on every process.
    """
    judged = device.type == "cuda" if judged is None else judged
    products = gathered((product or multiply)(device))
    together = gathered([*reductions(device), *messages(device)])
    local = _local_copies(config)
    places = gathered(Place.own())
    problems: list[str] = []
    if dist.get_rank() == 0:
        lines, problems = _products(products, places, peak_tflops(config), judged)
        for found in (_together(together, places, judged), _disk(config), (local, [])):
            lines, problems = [*lines, *found[0]], [*problems, *found[1]]
        hosts = len({place.host for place in places})
        print(f"pre-flight on {device.type}; processes: {sizes.world}, hosts: {hosts}", flush=True)
        print(*(f"  {line}" for line in lines), sep="\n", flush=True)
        figures = {
            "passed": not problems,
            "problems": problems,
            "places": [vars(place) for place in places],
            "products": [vars(own) for own in products],
            "groups": [asdict(group) for group in _groups(together, places)],
        }
        write_figures(Path(config.logging.output, "preflight.json"), figures)
    problems = told(problems)
    if problems:
        raise ValueError("\n  ".join(["pre-flight failed:", *shortened(problems)]))
    if dist.get_rank() == 0:
        print("pre-flight passed", flush=True)


def multiply(device: torch.device) -> Product:
    """A matrix product that fills a device: bf16 on CUDA, as training uses, fp32 on a CPU.

    Every process multiplies the same matrices, so a device that computes wrongly shows as another result.
    """
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (256, torch.float32)
    free, total = torch.cuda.mem_get_info(device) if cuda else (0, 0)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    result = left @ right
    seconds = _timed(lambda: torch.mm(left, right, out=result), device, warm_up=20 if cuda else 1)
    bits = result.view(torch.int16 if cuda else torch.int32)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    return Product(name, seconds, 2 * size**3 / seconds / 1e12, int(bits.sum(dtype=torch.int64)), free, total)


def _timed(work: Callable[[], object], device: torch.device, warm_up: int, rounds: int = 5, times: int = 4) -> float:
    """Seconds of one piece of work: the median of rounds, after the clocks have risen."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        for _ in range(times):
            work()
        _wait(device)
        taken.append((time.perf_counter() - began) / times)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _elements(device: torch.device) -> int:
    """fp32 numbers of a message: 64 MiB, as buckets of gradients are, or 1 MiB on a CPU."""
    return 2**24 if device.type == "cuda" else 2**18


def reductions(device: torch.device) -> list[Measured]:
    """An all-reduce in each group of this process, whose sum is known. Collective."""
    groups = {
        "tensor parallel": parallel_state.get_tensor_model_parallel_group(),
        "context parallel": parallel_state.get_context_parallel_group(),
        "data parallel": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "all processes": dist.group.WORLD,
    }
    measured = []
    for kind, group in groups.items():
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            continue
        buffer = torch.full((_elements(device),), float(ranks.index(dist.get_rank()) + 1), device=device)
        dist.all_reduce(buffer, group=group)
        right = bool((buffer == len(ranks) * (len(ranks) + 1) // 2).all())
        buffer.zero_()
        dist.barrier()  # so that no group's time is the wait for another kind's
        seconds = _timed(lambda: dist.all_reduce(buffer, group=group), device, warm_up=2)  # noqa: B023
        sent = buffer.nbytes * 2 * (len(ranks) - 1) / len(ranks)  # of a ring, the least that any algorithm sends
        measured.append(Measured(f"all-reduce, {kind}", ranks, sent, seconds, right))
    return measured


def messages(device: torch.device) -> list[Measured]:
    """A message from each pipeline stage to the next, the last one's to the first. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank()
    if len(ranks) == 1:
        return []
    at = ranks.index(own)
    after, before = ranks[(at + 1) % len(ranks)], ranks[at - 1]
    sent = torch.full((_elements(device),), float(own), device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        pair = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, received, before, group)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()

    exchange()
    _wait(device)
    right = bool((received == float(before)).all())
    dist.barrier()
    seconds = _timed(exchange, device, warm_up=2)
    return [Measured("message, pipeline", (before, own), sent.nbytes, seconds, right)]


def _products(
    products: Sequence[Product], places: Sequence[Place], peak: float | None, judged: bool
) -> tuple[list[str], list[str]]:
    """Lines about devices, and what is wrong with them."""
    lines, problems = [], []
    names = list(dict.fromkeys(own.device for own in products))
    if len(names) > 1:
        problems.append("devices differ: " + "; ".join(
            f"{name} on {located([place for own, place in zip(products, places) if own.device == name])}"
            for name in names
        ))  # fmt: skip
    for name in names:
        alike = [(own, place) for own, place in zip(products, places) if own.device == name]
        median = statistics.median_low([own.seconds for own, _ in alike])
        slowest, where = max(alike, key=lambda pair: pair[0].seconds)
        speed = statistics.median(own.tflops for own, _ in alike)
        of_peak = f", {speed / peak:.0%} of {peak:g}" if peak else ""
        lines.append(f"matrix product, {name}: median {speed:.3g} TFLOP/s{of_peak}; slowest {slowest.tflops:.3g} on "
                     f"{located([where])}")  # fmt: skip
        usual = statistics.mode([own.digest for own, _ in alike])
        for own, place in alike:
            if own.digest != usual:
                problems.append(f"matrix product: {located([place])} computes another result than the other {name}")
            if judged and own.seconds > SLOW_PRODUCT * median:
                problems.append(f"matrix product: {located([place])} takes {own.seconds / median:.2f} times the median "
                                f"({own.tflops:.3g} TFLOP/s)")  # fmt: skip
            elif judged and peak and own.tflops < LEAST_OF_PEAK * peak:
                problems.append(f"matrix product: {located([place])} reaches {own.tflops:.3g} TFLOP/s of {peak:g}; at "
                                f"least {LEAST_OF_PEAK:.0%} is right")  # fmt: skip
            if own.total and own.free < LEAST_FREE * own.total:
                problems.append(f"memory: {own.free / 2**30:.1f} of {own.total / 2**30:.1f} GiB are free on "
                                f"{located([place])}; another process holds the rest")  # fmt: skip
    if any(own.total for own in products):
        least, where = min(zip(products, places), key=lambda pair: pair[0].free)
        lines.append(f"memory: at least {least.free / 2**30:.1f} of {least.total / 2**30:.1f} GiB free, on "
                     f"{located([where])}")  # fmt: skip
    return lines, problems


@dataclass(frozen=True)
class _Group:
    """What its members measured together; as slow as the slowest of them."""

    kind: str
    places: list[Place]
    seconds: float
    gigabytes_per_second: float

    def __str__(self) -> str:
        return f"{self.gigabytes_per_second:.3g} GB/s, {located(self.places)}"


def _groups(everyone: Sequence[Sequence[Measured]], places: Sequence[Place]) -> list[_Group]:
    """Each group once. Those within a host and those across hosts are kinds of their own: they use other wires."""
    slowest: dict[tuple[str, tuple[int, ...]], Measured] = {}
    for each in (each for own in everyone for each in own):
        known = slowest.setdefault((each.kind, each.ranks), each)
        if each.seconds > known.seconds:
            slowest[each.kind, each.ranks] = each
    groups = []
    for each in slowest.values():
        members = [places[rank] for rank in each.ranks]
        where = "across hosts" if len({place.host for place in members}) > 1 else "within a host"
        groups.append(_Group(f"{each.kind}, {where}", members, each.seconds, each.sent / each.seconds / 1e9))
    return groups


def _together(
    everyone: Sequence[Sequence[Measured]], places: Sequence[Place], judged: bool
) -> tuple[list[str], list[str]]:
    """Lines about collectives and messages, and what is wrong with them."""
    lines = []
    problems = [
        f"{each.kind}: {located([place])} received a wrong result"
        for own, place in zip(everyone, places)
        for each in own
        if not each.right
    ]
    groups = _groups(everyone, places)
    for kind in dict.fromkeys(group.kind for group in groups):
        alike = sorted((group for group in groups if group.kind == kind), key=lambda group: group.seconds)
        median = alike[(len(alike) - 1) // 2]
        lines.append(f"{kind}: {len(alike)} groups of {len(median.places)}, median "
                     f"{median.gigabytes_per_second:.3g} GB/s; slowest {alike[-1]}")  # fmt: skip
        for group in alike:
            if judged and group.seconds > SLOW_COLLECTIVE * median.seconds:
                problems.append(f"{kind}: {located(group.places)} takes {group.seconds / median.seconds:.2f} times the "
                                f"median ({group.gigabytes_per_second:.3g} GB/s)")  # fmt: skip
    return lines, problems


def _checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint, once all nodes learn that ever do."""
    assembly = Assembly.of(config, ParallelSizes(), iteration=LAST_PHASE)
    return checkpoint_bytes(assembly.graph, assembly.plan, assembly.settings.dtype)


def _local_copies(config: Config) -> list[str]:
    """Lines about local copies, which begin with a warning where they will not fit: without them the run trains too."""
    copies = LocalCopies.of(config, identity.checkpoint_root(config))
    if copies is None:
        return []
    room = copies.room(_checkpoint_bytes(config))
    return [copies.describe(), *(line if enough else f"warning: {line}" for line, enough in room)]


def _disk(config: Config) -> tuple[list[str], list[str]]:
    """A line about the checkpoint folder, and whether the checkpoints that are kept will not fit."""
    root = identity.checkpoint_root(config)
    root.mkdir(parents=True, exist_ok=True)
    each = _checkpoint_bytes(config)
    there = len(checkpoint_folder.checkpoints(root))
    # One more than is kept stands while it is written; with keep_last 0, room for the next two is all one can ask.
    wanted = max(1, config.checkpoint.keep_last + 1 - there) if config.checkpoint.keep_last else 2
    free = shutil.disk_usage(root).free
    line = f"disk: {free / 2**30:,.1f} GiB free in {root}; a checkpoint takes {each / 2**30:,.1f}, {wanted} are to come"
    short = f"{root} has {free / 2**30:,.1f} GiB free; {wanted} checkpoints of {each / 2**30:,.1f} GiB need more"
    return [line], [short] if free < wanted * each else []
