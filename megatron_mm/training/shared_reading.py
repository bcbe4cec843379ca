"""One reader for a tensor-parallel group: its first process reads and decodes, the others receive its microbatches.

They need the same ones, and decoding costs more than sending: eight processes of a node would otherwise decode every
image eight times. Context-parallel processes and pipeline stages read for themselves; stages read different fields.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.media.errors import DataError
from megatron_mm.platform.collectives import communication_device


class SharedLoader:
    """An endless iterator over the microbatches of a tensor-parallel group. `next` is collective over the group.

    Args:
        make: makes the loader; called where it is read.
        num_microbatches: of an iteration.
    """

    def __init__(self, make: Callable[[], MicrobatchLoader], num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._first = parallel_state.get_tensor_model_parallel_src_rank()
        self._loader = make() if dist.get_rank() == self._first else None

    def __iter__(self) -> SharedLoader:
        return self

    def __next__(self) -> Microbatch:
        """The next microbatch, its tensors where collectives need them.

        Raises:
            DataError: the reading process could not read it; raised by all.
        """
        batch: Microbatch | None = None
        if self._loader is not None:
            try:
                batch = next(self._loader)
            except Exception as error:
                self._announce(error)
                raise
        batch = self._announce(batch)
        tensors = {name: value.to(communication_device()).contiguous() for name, value in batch.tensors.items()}
        for value in tensors.values():
            if value.numel():
                dist.broadcast(value, self._first, self._group)
        return batch.with_fields(tensors)

    def _announce(self, read: Microbatch | Exception | None) -> Microbatch:
        """Tells the group what was read, but for what its tensors hold; the receivers' tensors are empty."""
        message: list = [None]
        if isinstance(read, Exception):
            message = [str(read)]
        elif read is not None:
            shapes = {name: (value.shape, value.dtype) for name, value in read.tensors.items()}
            message = [(read.with_fields(dict.fromkeys(shapes)), shapes)]
        dist.broadcast_object_list(message, self._first, self._group)
        if read is not None:
            return read
        if isinstance(message[0], str):
            raise DataError(message[0])
        batch, shapes = message[0]
        device = communication_device()
        empty = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        return batch.with_fields(empty)

    def close(self) -> None:
        """Ends the reader's workers."""
        if self._loader is not None:
            self._loader.close()
