"""What a process holds of a run: rectangular regions of weights and optimizer state, and which of them it writes.

Names and places of weights are megatron-core's (`sharded_state_dict` of its layers). Its own writers gather a process's
optimizer state before they write, and keep a pickle; here each process writes what it holds, and of what several
processes hold alike each writes its share, so that nothing is gathered and nothing written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_mm.checkpoints.regions import rectangles
from megatron_mm.checkpoints.slots import Slot


@dataclass(frozen=True)
class Held:
    """A tensor that a process holds, in one or more blocks of rows, each a region of a tensor of the checkpoint."""

    name: str
    """In this process; copies of a tied weight have one key and two names."""
    key: str
    parameter: torch.Tensor
    blocks: tuple[ShardedTensor, ...]
    replica: tuple[int, ...]
    """Which copy it is: (of a tied weight, over tensor parallelism, over data and context parallelism)."""

    @property
    def is_first(self) -> bool:
        """Whether this process or others of its data-parallel group write it, not those of another group."""
        return not any(self.replica[:-1])

    def slots(self) -> Iterator[Slot]:
        """Its blocks."""
        for block in self.blocks:
            yield Slot(self.key, tuple(block.global_shape), tuple(block.global_offset), block.data)

    def pieces(self, begin: int, end: int, flat: torch.Tensor, prefix: str = "") -> Iterator[Slot]:
        """The regions that elements of the flattened tensor fill.

        Args:
            begin: first element.
            end: one past the last.
            flat: [end - begin] values, of the parameter or of something with an element for each of its own.
            prefix: of the key.
        """
        first = 0
        for block in self.blocks:
            size = block.data.numel()
            low, high = max(begin - first, 0), min(end - first, size)
            at = first + low - begin
            for offsets, sizes in rectangles(tuple(block.local_shape), low, high):
                count = 1
                for extent in sizes:
                    count *= extent
                place = tuple(base + offset for base, offset in zip(block.global_offset, offsets))
                yield Slot(f"{prefix}{self.key}", tuple(block.global_shape), place, flat[at : at + count].view(sizes))
                at += count
            first += size


def held(entries: dict) -> list[Held]:
    """What a process holds, from the entries of its `sharded_state_dict`, in their order.

    Raises:
        ValueError: a weight is split otherwise than by its first dimension.
    """
    found = []
    for name, entry in entries.items():
        if isinstance(entry, ShardedTensorFactory):
            blocks = tuple(piece for piece in nested_values(entry.build()) if isinstance(piece, ShardedTensor))
        elif isinstance(entry, ShardedTensor):
            blocks = (entry,)
        else:
            continue
        _check_rows(name, entry.data, blocks)
        replica = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
        found.append(Held(name, entry.key, entry.data, blocks, replica))
    return found


def _check_rows(name: str, whole: torch.Tensor, blocks: Sequence[ShardedTensor]) -> None:
    """Blocks of rows follow each other in the memory of the parameter."""
    at = whole.storage_offset()
    for block in blocks:
        if len(blocks) > 1 and not (block.data.is_contiguous() and block.data.storage_offset() == at):
            raise ValueError(f"{name}: checkpoints know weights that are split by their first dimension alone")
        at += block.data.numel()


def shares(items: Iterable[tuple[Held, torch.Tensor, str]]) -> Iterator[Slot]:
    """Of what all processes of a data-parallel group hold alike, what this one writes: as many elements as the others.

    Args:
        items: (what it belongs to, values in its shape, prefix of the key), in the same order everywhere.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    items = [item for item in items if item[0].is_first]
    total = sum(tensor.numel() for _, tensor, _ in items)
    first = 0
    for item, tensor, prefix in items:
        rank = item.replica[-1]
        low, high = total * rank // group.size(), total * (rank + 1) // group.size()
        begin, end = max(low - first, 0), min(high - first, tensor.numel())
        first += tensor.numel()
        if begin < end or (tensor.numel() == 0 and rank == 0):
            yield from item.pieces(begin, end, tensor.detach().reshape(-1)[begin:end], prefix)
