"""Transformer Engine's communication buffers, by which a decoder's linear layers overlap tensor parallelism.

`performance.tp_comm_overlap` only marks the layers (settings.py); the buffers that they then look for are made once a
process, for activations of one size. Nobody has run this: it needs GPUs.
"""

from __future__ import annotations

from functools import cache

from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes


def start(config: Config, sizes: ParallelSizes) -> None:
    """Makes the buffers for the decoder of a run. Collective over tensor parallelism; a second call does nothing."""
    tokens = config.data.seq_length * config.training.micro_batch_size // sizes.cp
    _start(tokens, config.model.decoder.hidden_size, sizes.tp, config.performance.fp8_format != "none")


@cache
def _start(tokens: int, hidden_size: int, tp: int, fp8: bool) -> None:
    from transformer_engine.pytorch.module import initialize_ub

    initialize_ub(shape=[tokens, hidden_size], tp_size=tp, use_fp8=fp8, bootstrap_backend="nccl")
