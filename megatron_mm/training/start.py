"""How every run begins: its processes join, compare what they have, and make the groups of the layout.

What differs between them (identity.py) would otherwise train, wrongly, or hang.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import setup
from megatron_mm.training import identity
from megatron_mm.training.resilience import Watchdog


def start(config: Config, sizes: ParallelSizes) -> tuple[torch.device, Watchdog]:
    """The beginning of every run: joins, compares what the processes have, makes the groups of the layout.

    Raises:
        ValueError: something differs, or the checkpoint folder is not shared or writable; the same on every process.
    """
    minutes = config.parallel.distributed_timeout_minutes
    watchdog = Watchdog(Path(config.logging.output), minutes)
    # The watchdog comes first: its stacks say more than a collective's own time-out.
    setup.join(timeout_minutes=minutes * 2)
    watchdog.beat("comparing code, settings and data of the processes")
    problems = identity.check(config)
    if problems:
        raise ValueError("\n  ".join(["processes must have the same, and share the checkpoint folder:", *problems]))
    watchdog.beat("making the groups of the layout")
    return setup.initialize(sizes, config.training.seed, timeout_minutes=minutes * 2), watchdog
