"""Media that did not decode while training, under `data.on_corrupt: skip`: named once, counted at every step.

The reader puts zeros or silence in their place (data/reading/records.py). Which process reads a medium depends on the
layout, and several may read the same one, so the names travel to all and equal ones count once: the figures are those
of any other layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mm.config.schema import Config
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.platform.collectives import communication_device


class CorruptMedia:
    """Counts and names them.

    Args:
        config: `data.on_corrupt` says whether there can be any.
    """

    def __init__(self, config: Config) -> None:
        self.active = config.data.on_corrupt == "skip"
        self.total = 0
        """Readings that failed since this process began; the same medium counts in every epoch."""
        self._named: set[str] = set()

    def count(self, microbatches: list[Microbatch]) -> dict[str, int]:
        """Takes the microbatches of a step, and names what is new on rank 0. Collective over all processes.

        Returns:
            {"corrupt_media": readings that failed in this step}; {} where they stop the run.
        """
        if not self.active:
            return {}
        own = [message for batch in microbatches for message in batch.corrupt_media]
        found = torch.tensor([len(own)], device=communication_device())
        dist.all_reduce(found)
        if not found.item():
            return {"corrupt_media": 0}
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        messages = dict.fromkeys(message for messages in everyone for message in messages)
        for message in messages:
            if message not in self._named and dist.get_rank() == 0:
                print(f"warning: {message}; it is read as grey or as silence", flush=True)
        self._named.update(messages)
        self.total += len(messages)
        return {"corrupt_media": len(messages)}

    def report_lines(self) -> list[str]:
        """What happened, for the console."""
        if not self.total:
            return []
        return [f"{self.total} times a medium did not decode ({len(self._named)} records, named above)"]
