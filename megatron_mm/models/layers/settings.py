"""What every layer is told (group sizes, precision, backend), and the megatron-core configuration made of it.

megatron-core's layers take a TransformerConfig each. One is made per stack (decoder, each tower), because width, norm,
activation and sharding differ: text follows the run's sequence and context parallelism, while a tower is whole on
every context-parallel process and never sequence-parallel (257 tokens divide by no TP). Pipeline parallelism is always
1 here: the graph owns stages, names and numbering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_mm.config.performance import PerformanceConfig
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import megatron_versions


@dataclass(frozen=True)
class LayerSettings:
    """What a run asks of all its layers.

    Attributes:
        dtype: precision of weights and activations in the layers.
        cp_comm_type: how attention meets the keys of other context-parallel processes, see `attention`.
        recompute: `selective` recomputes core attention in the backward pass; `full` belongs to the pipeline stage,
            which recomputes whole nodes.
    """

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    dtype: torch.dtype = torch.float32
    backend: Literal["local", "transformer_engine"] = "local"
    cp_comm_type: Literal["all_gather", "a2a", "p2p"] = "all_gather"
    recompute: Literal["none", "selective", "full"] = "none"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)


@dataclass(frozen=True)
class StackShape:
    """Sizes and kind of one stack of transformer layers.

    Attributes:
        num_layers: depth of the stack, which scales the initial weights of output projections.
        bias: biases in every linear layer.
        gated: SwiGLU-like MLP, activation(gate) · up.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    normalization: Literal["RMSNorm", "LayerNorm"]
    norm_epsilon: float
    activation: Callable[[torch.Tensor], torch.Tensor] = functional.gelu
    bias: bool = True
    gated: bool = False
    init_std: float = 0.02

    @classmethod
    def of(cls, part, **kind) -> StackShape:
        """The stack of a part, from the fields that all sections of stacks have; as many key-value heads as attention
        heads where it does not say.

        Args:
            part: its section.
            kind: the other attributes.
        """
        kind.setdefault("num_query_groups", getattr(part, "num_query_groups", part.num_attention_heads))
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
            if name not in kind:
                kind[name] = getattr(part, name)
        return cls(**kind)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def layer_config(
    settings: LayerSettings, shape: StackShape, *, sharded: bool, decoder: bool = False
) -> TransformerConfig:
    """The megatron-core configuration of one stack.

    Args:
        sharded: the stack follows sequence and context parallelism; otherwise it is whole on every process but for TP.
        decoder: a decoder's self-attention and MLP, whose tokens are as many in every microbatch and divide as FP8 and
            Transformer Engine's communication buffers need.

    Weights are left uninitialised (`perform_initialization=False`) on the platform's current device, which is meta in a
    dry run, so no process ever holds a full matrix; `models/initialization.py` fills them.

    Raises:
        ValueError: tensor parallelism would split a head.
    """
    sizes = settings.sizes
    for heads, kind in ((shape.num_attention_heads, "attention"), (shape.num_query_groups, "key-value")):
        if heads % sizes.tp:
            raise ValueError(f"{heads} {kind} heads do not divide over tensor parallel size {sizes.tp}")
    fused = settings.backend == "transformer_engine"
    selective = settings.recompute == "selective"
    performance = settings.performance
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        kv_channels=shape.head_dim,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=shape.activation,
        gated_linear_unit=shape.gated,
        add_bias_linear=shape.bias,
        hidden_dropout=settings.hidden_dropout,
        attention_dropout=settings.attention_dropout,
        init_method_std=shape.init_std,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=1,
        context_parallel_size=sizes.cp if sharded else 1,
        sequence_parallel=sharded and sizes.sequence_parallel and sizes.tp > 1,
        params_dtype=settings.dtype,
        bf16=settings.dtype is torch.bfloat16,
        autocast_dtype=settings.dtype,
        perform_initialization=False,
        gradient_accumulation_fusion=fused and performance.gradient_accumulation_fusion,
        fp8=performance.fp8_format if fused and decoder and performance.fp8_format != "none" else None,
        fp8_recipe=performance.fp8_recipe,
        tp_comm_overlap=fused and decoder and performance.tp_comm_overlap,
        # megatron-core's fused GELU is the tanh approximation, and quick-GELU is ours: only SwiGLU is fused.
        bias_activation_fusion=fused and shape.gated,
        use_te_activation_func=shape.gated and not fused,  # an activation module of our own, see layers/local.py
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=fused and shape.normalization == "LayerNorm",
        apply_rope_fusion=False,
        cp_comm_type=settings.cp_comm_type if sharded and sizes.cp > 1 else None,
        recompute_granularity="selective" if selective else None,
        recompute_modules=["core_attn"] if selective else None,
        **megatron_versions.no_cuda_graphs(),
    )
