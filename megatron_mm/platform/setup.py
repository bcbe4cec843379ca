"""Start-up of a process: device, process group, megatron-core's parallel groups and random seeds.

`join` applies the CPU platform where CUDA is absent and reads torchrun's environment (or makes a world of one);
`initialize` does so where it was not done, and creates the groups for a layout. A training run compares its processes
between the two (training/start.py). Everything later asks megatron-core's parallel_state.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_mm.config.load import report
from megatron_mm.config.performance import Device
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import cpu, megatron_versions, stopping

#: What the groups of now were made for: (world, sizes, timeout, whether with gloo ones), None without groups.
_made: tuple | None = None


def apply_platform() -> torch.device:
    """Chooses the device of this process, redirecting megatron-core where there is no CUDA.

    Raises:
        ValueError: a megatron-core release that was not tried.
    """
    if torch.cuda.is_available() and not cpu.is_applied():
        megatron_versions.prepare()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    cpu.apply()
    return cpu.device()


def computing_device() -> Device:
    """What a run on this machine computes on."""
    if cpu.is_applied() or not torch.cuda.is_available():
        return Device("a CPU", None)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return Device(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def world_size() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def join(timeout_minutes: float = 10.0) -> torch.device:
    """Joins the group of all processes, from which nothing yet follows of their layout; a second call does nothing."""
    device = apply_platform()
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def initialize(sizes: ParallelSizes, seed: int, timeout_minutes: float = 10.0) -> torch.device:
    """Joins the process group, creates the parallel groups and seeds dropout.

    Args:
        sizes: the layout; its product must be the world size.

    Raises:
        ValueError: the layout does not fit the world size.
    """
    if sizes.world != world_size():
        raise ValueError(f"a layout of {sizes.world} processes was started on {world_size()}")
    device = join(timeout_minutes)
    initialize_groups(sizes, timeout_minutes)
    seed_dropout(seed)
    return device


def initialize_groups(sizes: ParallelSizes, timeout_minutes: float = 10.0, gloo: bool = True) -> None:
    """megatron-core's parallel groups for a layout: those that exist if they are the same, new ones otherwise."""
    global _made
    from megatron.core import parallel_state

    wanted = (dist.group.WORLD, sizes, timeout_minutes, gloo)
    if _made == wanted and parallel_state.model_parallel_is_initialized():
        return
    _drop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=gloo,
    )
    _made = wanted


def _drop_groups() -> None:
    """Ends megatron-core's groups. It forgets them itself, but torch would keep each with its sockets and threads."""
    global _made
    from megatron.core import parallel_state

    _made = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
            dist.destroy_process_group(group)


def seed_dropout(seed: int, iteration: int = 0) -> None:
    """Seeds the generators from which dropout draws (weights have their own, see models/initialization.py).

    Called before each step, so that a resumed run draws what an uninterrupted one would in the same layout. Stages and
    data-parallel processes differ; tensor-parallel ones agree outside the regions that megatron-core's tracker keeps.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank())
    key = hashlib.blake2b(f"{seed}/{iteration}/{place}".encode(), digest_size=4).digest()
    model_parallel_cuda_manual_seed(int.from_bytes(key, "little") >> 2, force_reset_rng=True)


def shutdown() -> None:
    """Leaves the process group."""
    _drop_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turns an error that a user can cause into one line, once for all ranks, and exit status 1.

    The first rank that fails prints; the launcher then ends the others. A rank that a signal is to end before the first
    step may lose the others before its own signal comes: it ends as they did.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("MEGATRON_MM_TRACEBACK"):
            raise
        _end_with(str(error))
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # raised by torch wherever the main thread is
            _end_with(f"rank {rank()}: a process that reads data died, out of memory perhaps: {error}")
        # A collective fails when another rank has ended: that rank has said why.
        time.sleep(0.5)
        if not _another_failed():
            stopping.end_as_told(within_seconds=1.5)
        if os.environ.get("MEGATRON_MM_TRACEBACK") or not _another_failed():
            raise
        stopping.exit_at_once(1)


def _end_with(problem: str) -> NoReturn:
    """Prints an error, unless another rank has, and ends this process."""
    sys.stdout.flush()
    if not _among_others():
        report(f"error: {problem}")
    elif _is_first_to_fail():
        print(f"error: {problem}", file=sys.stderr, flush=True)
    stopping.exit_at_once(1)


def _among_others() -> bool:
    """Whether there are ranks that could fail too: the fake group of a dry run has none, and no store."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def _another_failed() -> bool:
    try:
        return _among_others() and dist.distributed_c10d._get_default_store().add("megatron_mm/failures", 0) > 0
    except RuntimeError:  # the store ended with the launcher
        return True


def _is_first_to_fail() -> bool:
    return dist.distributed_c10d._get_default_store().add("megatron_mm/failures", 1) == 1
