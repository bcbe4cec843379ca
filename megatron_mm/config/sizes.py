"""Sizes of the parallel groups: what a layout is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of the parallel groups, with whether text is sequence-parallel."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def chunks(self) -> int:
        """Pipeline chunks in all."""
        return self.pp * self.vpp

    @property
    def tp_cp(self) -> int:
        """Tensor- and context-parallel processes, which share each microbatch of a pipeline stage."""
        return self.tp * self.cp

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.tp * self.pp * self.cp * self.dp
