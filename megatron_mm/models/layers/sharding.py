"""Which positions of the text a process holds, and the collectives that layers add to megatron-core's.

Text of a microbatch is [R rows, T tokens]. Context parallelism cuts each row into 2·CP equal chunks and gives process r
the chunks r and 2·CP-1-r (zigzag: causal attention then costs every process the same); the local text [R, T/CP] is
flattened row by row. Sequence parallelism then cuts these positions into TP contiguous pieces.

Shape suffixes: R rows, T tokens of a row, L = T/CP local tokens of a row, S = R·L local positions.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import distributed

from megatron_mm.platform import collectives


def zigzag_slice(values_RT: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """This process's part of every row, [R, T, …] -> [R, T/CP, …].

    Raises:
        ValueError: the row does not divide into 2·CP chunks.
    """
    if cp_size == 1:
        return values_RT
    rows, length = values_RT.shape[:2]
    if length % (2 * cp_size):
        raise ValueError(f"a row of {length} tokens does not divide into {2 * cp_size} chunks (2 × context parallel)")
    chunks = values_RT.reshape(rows, 2 * cp_size, length // (2 * cp_size), *values_RT.shape[2:])
    return torch.stack((chunks[:, cp_rank], chunks[:, 2 * cp_size - 1 - cp_rank]), dim=1).flatten(1, 2)


def local_text(values_RT: torch.Tensor) -> torch.Tensor:
    """This context-parallel process's part of every row, [R, T, …] -> [R, L, …]."""
    return zigzag_slice(
        values_RT, parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    )


def gathered_text(values_RT: torch.Tensor, cp_size: int) -> torch.Tensor:
    """All positions of every row in the order in which `gather_context` returns them, [R, T, …] -> [R, T, …]."""
    return torch.cat([zigzag_slice(values_RT, cp_size, rank) for rank in range(cp_size)], dim=1)


def sequence_parallel_slice(values_S: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel process's contiguous piece of dimension 0.

    Raises:
        ValueError: it does not divide.
    """
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if values_S.shape[0] % size:
        raise ValueError(f"{values_S.shape[0]} positions do not divide over {size} sequence-parallel processes")
    return values_S.chunk(size, dim=0)[rank]


class _GatherContext(torch.autograd.Function):
    """[R, L, …] of every process -> [R, CP·L, …]; the gradient is summed and scattered back."""

    @staticmethod
    def forward(ctx, local, group):
        ctx.group, size = group, group.size()
        gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
        collectives.all_gather_single(gathered, local.contiguous(), group=group)
        return gathered.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        size = ctx.group.size()
        rows, length = gradient.shape[0], gradient.shape[1] // size
        pieces = gradient.reshape(rows, size, length, *gradient.shape[2:]).transpose(0, 1).contiguous()
        local = torch.empty_like(pieces[0])
        collectives.reduce_scatter_single(local, pieces.flatten(0, 1), group=ctx.group)
        return local, None


def gather_context(local: torch.Tensor, in_order: bool = False) -> torch.Tensor:
    """Keys or values of all positions, [R, L, …] -> [R, T, …].

    Process by process (see `gathered_text`), which is cheaper and enough where a mask says what is seen, or in order.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return local
    gathered = _GatherContext.apply(local, group)
    if not in_order:
        return gathered
    chunks = gathered.unflatten(1, (2 * group.size(), -1)).unbind(1)
    return torch.cat(chunks[::2] + chunks[::-2], dim=1)


class _ExchangeHeads(torch.autograd.Function):
    """[R, L, G, …] -> [R, T, G/CP, …] in order of the row, or the way back; the gradient takes the other way."""

    @staticmethod
    def forward(ctx, values, group, to_tokens):
        ctx.group, ctx.to_tokens = group, to_tokens
        return _tokens_of_heads(values, group) if to_tokens else _heads_of_tokens(values, group)

    @staticmethod
    def backward(ctx, gradient):
        exchange = _heads_of_tokens if ctx.to_tokens else _tokens_of_heads
        return exchange(gradient, ctx.group), None, None


def _all_to_all(values: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """[CP, …], one piece for each process -> one piece from each."""
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    distributed.all_to_all_single(received, values.contiguous(), group=group)
    return received


def _tokens_of_heads(values_RLG: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Each process gives the others their heads of its tokens, and puts the chunks that it gets in order."""
    pieces = _all_to_all(values_RLG.unflatten(2, (group.size(), -1)).movedim(2, 0), group)
    early, late = pieces.chunk(2, dim=2)  # process r has chunks r and 2·CP-1-r
    return torch.cat((*early.unbind(0), *late.flip(0).unbind(0)), dim=1)


def _heads_of_tokens(values_RTG: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Each process gives the others its heads of their tokens."""
    chunks = values_RTG.unflatten(1, (2 * group.size(), -1)).movedim(1, 0)
    early, late = chunks.chunk(2)
    pieces = _all_to_all(torch.cat((early, late.flip(0)), dim=2), group)
    return pieces.movedim(0, 2).flatten(2, 3)


def heads_for_tokens(values_RLG: torch.Tensor) -> torch.Tensor:
    """All heads of this process's tokens, [R, L, G, …] -> its share of the heads of all tokens, [R, T, G/CP, …]."""
    return _ExchangeHeads.apply(values_RLG, parallel_state.get_context_parallel_group(), True)


def tokens_for_heads(values_RTG: torch.Tensor) -> torch.Tensor:
    """The way back, [R, T, G/CP, …] -> [R, L, G, …]."""
    return _ExchangeHeads.apply(values_RTG, parallel_state.get_context_parallel_group(), False)


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_over_context(value: torch.Tensor) -> torch.Tensor:
    """The sum over context parallelism; the loss of each process counts, so the gradient is summed as well."""
    group = parallel_state.get_context_parallel_group()
    return value if group.size() == 1 else _SumOverContext.apply(value, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        # megatron-core's own `_reduce` changes its argument in place, and drops the result if that is not contiguous.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradient_over_tp(value: torch.Tensor) -> torch.Tensor:
    """`value`, its gradient summed over tensor parallelism: for a weight that each process applies to its own heads."""
    group = parallel_state.get_tensor_model_parallel_group()
    return value if group.size() == 1 else _SumGradient.apply(value, group)
