"""The Transformer Engine backend: fused norms and linears, and FlashAttention on packed documents.

The same graph, parameter names and checkpoint keys as the local backend, whose key map gives its norms the names that
they have here, where they are part of the linear layer after them. Packing and rotary positions are those of
`attention` and `packing`, and so is context parallelism where Transformer Engine's does not serve; only kernels differ.
This file alone imports Transformer Engine, and it is imported only where that backend is chosen.

Linears, MLPs and norms of all layers are Transformer Engine's. In megatron-core's TransformerLayer a norm before
self-attention or MLP is part of the linear layer after it; it is a module of its own before cross-attention (as there),
in Conformer's blocks, where it follows the linear layer (Swin), and at the ends of stacks. What Transformer Engine
cannot express is torch's:

    where                          what                     why
    window_attention (Swin)        attention                scores have a learned bias, which needs a gradient
    relative_attention             queries, keys, values,   scores by distance; memory has no gradient to the hidden
    (Transformer-XL)               attention                states that one projection made it from
    conformer                      attention                scores by distance
                                   convolution, its norm    it has no depthwise convolution; channels are sharded
    memory_attention, perceiver    attention                masks of the memory are arbitrary; FlashAttention takes none
    cross_attention                norms of heads, gates    one weight for the heads of all processes
    text_ends                      embedding, vocabulary    megatron-core's own, vocabulary-parallel

Shape suffixes as in `attention`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn
from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams, get_attention_backend

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.layers.attention import AttentionPlan, SelfAttention, attention
from megatron_mm.models.layers.packing import MediaKeys, Segments, media_keys
from megatron_mm.platform.megatron_versions import mlp_part

#: Text plans hold segments for variable-length kernels, not masks.
PACKED = True
#: Class of a norm that is not part of the linear layer after it.
NORM = TENorm


class _Attention(TEDotProductAttention):
    """Transformer Engine's attention, with its context parallelism for the calls that ask for it."""

    def __init__(self, config: TransformerConfig, attention_type: str, layer_number: int = 1) -> None:
        super().__init__(config, layer_number, AttnMaskType.no_mask, attention_type, cp_comm_type=config.cp_comm_type)
        self.recompute = config.recompute_granularity == "selective"
        self.dropout = config.attention_dropout
        self.context, self.cp_size = (self.cp_group, self.cp_global_ranks, self.cp_stream), config.context_parallel_size
        self.groups = self.num_gqa_groups_per_partition

    @property
    def kind(self) -> tuple:
        """What Transformer Engine's choice of a kernel depends on, for one call."""
        config = self.config
        return (
            self.num_attention_heads // config.tensor_model_parallel_size,
            config.num_query_groups // config.tensor_model_parallel_size,
            config.kv_channels,
            config.params_dtype,
        )

    def kernel(self, form: str, mask: str, length: int) -> str | None:
        """The kernel that a call gets, by name; None: there is none."""
        heads, groups, width, dtype = self.kind
        asked = {
            "qkv_dtype": dtype,
            "qkv_layout": "_".join((form,) * 3),
            "num_heads": heads,
            "num_gqa_groups": groups,
            "max_seqlen_q": length,
            "max_seqlen_kv": length,
            "num_tokens_q": length if form == "thd" else 0,
            "num_tokens_kv": length if form == "thd" else 0,
            "head_dim_qk": width,
            "head_dim_v": width,
            "attn_mask_type": mask,
            "window_size": _window(mask),
            "bottom_right_diagonal": "causal" not in mask,
            "attention_dropout": self.dropout,
            "deterministic": self.deterministic,
            "softmax_scale": width**-0.5,
        }
        if mask == "causal" and self.cp_size > 1:
            asked |= {"context_parallel": True, "cp_comm_type": self.cp_comm_type, "cp_size": self.cp_size}
        known = {field.name for field in fields(AttentionParams)}  # more with each release
        flash, version, fused, _, unfused, _ = get_attention_backend(
            AttentionParams(**{name: value for name, value in asked.items() if name in known})
        )
        if flash:
            return f"FlashAttention {version}"
        if fused:
            return "cuDNN's fused attention"
        if unfused:
            return "Transformer Engine's unfused attention"
        return None

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: str,
        exchange: str = "none",
        **kinds: object,
    ) -> torch.Tensor:
        """One call of the kernel, past megatron-core's choice of mask types, recomputed if asked.

        Args:
            mask: Transformer Engine's name for what a query sees.
            exchange: of AttentionPlan: `core` is done here; after `heads`, tensors have a share of the heads.
        """

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            # Set for each call: recomputation may follow another microbatch's.
            self.num_gqa_groups_per_partition = self.groups // (self.cp_size if exchange == "heads" else 1)
            context = self.context if exchange == "core" else (None, None, None)
            self.set_context_parallel_group(*context, self.cp_comm_type)
            return super(TEDotProductAttention, self).forward(
                query, key, value, attn_mask_type=mask, window_size=_window(mask), **kinds
            )

        if self.recompute and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(attend, False, query, key, value)
        return attend(query, key, value)

    def run_segments(
        self,
        query_RLND: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: tuple[Segments, ...],
        mask: str,
        exchange: str = "none",
    ) -> torch.Tensor:
        """One call for each piece of a row; keys and values [positions, G, D] -> [R, L, N·D]."""
        rows, pieces = query_RLND.shape[0], []
        for call in calls:
            piece = self.run(
                query_RLND[:, call.begin : call.end].flatten(0, 1),
                key,
                value,
                mask,
                exchange,
                qkv_format="thd",
                cu_seqlens_q=call.query_bounds,
                cu_seqlens_kv=call.key_bounds,
                max_seqlen_q=call.longest_query,
                max_seqlen_kv=call.longest_key,
            )
            pieces.append(piece.view(rows, call.end - call.begin, -1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _window(mask: str) -> tuple[int, int]:
    """Keys before and after its own position that a query sees; -1: all."""
    return (-1, 0) if "causal" in mask else (-1, -1)


class CoreAttention(_Attention):
    """Attention of a sequence to itself: within documents of packed rows, or all of an image or a sound."""

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: object) -> None:
        super().__init__(config, "self", layer_number)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """[R, L, N, D], [R, T, G, D] -> [R, L, N·D]."""
        if plan.mask is not None:  # FlashAttention takes no arbitrary mask; torch's memory-efficient kernel does
            return attention(query, key, value, plan, self.dropout if self.training else 0.0).flatten(2)
        if not plan.segments:
            mask = "causal" if plan.causal else "no_mask"
            return self.run(query, key, value, mask, plan.exchange, qkv_format="bshd")
        mask = "padding"
        if plan.causal:  # documents that began in an earlier piece of the row have more keys than queries
            mask = "padding_causal_bottom_right" if plan.exchange == "gather" else "padding_causal"
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        return self.run_segments(query, key, value, plan.segments, mask, plan.exchange)


class MediaAttention(_Attention):
    """Attention of text to the media of its documents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, "cross")

    @staticmethod
    def keys(
        batch: Microbatch, media: tuple[tuple[str, int], ...], dtype: torch.dtype, cp_size: int, cp_rank: int
    ) -> MediaKeys:
        """The part of a cross plan that this core needs; `media` as of `media_keys`."""
        return media_keys(batch, media, cp_size, cp_rank)

    def forward(
        self,
        query: torch.Tensor,
        memories: Sequence[tuple[torch.Tensor, torch.Tensor]],
        keys: MediaKeys,
    ) -> torch.Tensor:
        """Queries [R, L, N, D]; of each memory keys and values of all its media, [I, M, G, D] -> [R, L, N·D]."""
        key, value = (_by_document(values, keys.order) for values in zip(*memories))
        return self.run_segments(query, key, value, keys.calls, "padding")


#: Calls that a class of core attention makes: kind, format and mask of Transformer Engine.
_CALLS = {
    CoreAttention: (
        ("packed rows", "thd", "padding_causal"),
        ("causal rows", "bshd", "causal"),
        ("whole sequences", "bshd", "no_mask"),
    ),
    MediaAttention: (("media of documents", "thd", "padding"),),
}


def kernels(modules: Iterable[nn.Module], length: int) -> set[str]:
    """What Transformer Engine will run for each kind of call of the attention in `modules`, of rows of `length` tokens.

    Not every module makes every call (a tower has no packed rows), so one without a kernel is named, and refused by
    Transformer Engine where it is made: packed rows have none in fp32 before 2.11.

    Raises:
        ValueError: a module can make no call at all.
    """
    chosen: dict[str, set[str]] = defaultdict(set)
    for core in {(type(module), module.kind): module for module in modules if isinstance(module, _Attention)}.values():
        found = {kind: core.kernel(form, mask, length) for kind, form, mask in _CALLS[type(core)]}
        if not any(found.values()):
            heads, groups, width, dtype = core.kind
            raise ValueError(
                f"Transformer Engine has no kernel for attention of {' or '.join(found)} ({heads} heads, "
                f"{groups} groups of {width}, {dtype}): install flash-attn, or change model.attention_backend, "
                "training.precision or model.backend; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints its reasons"
            )
        for kind, kernel in found.items():
            chosen[kernel or "no kernel"].add(kind)
    return {f"{kernel} ({', '.join(sorted(kinds))})" for kernel, kinds in chosen.items()}


def _by_document(media: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """All media positions and one of zeros, in the order of `MediaKeys`: [positions, G, D]."""
    nothing = media[0].new_zeros(1, *media[0].shape[2:])
    return torch.cat([*(values.flatten(0, 1) for values in media), nothing]).index_select(0, order)


def layer_submodules() -> TransformerLayerSubmodules:
    """Parts of a pre-norm layer of self-attention and MLP; norms live in the linear layers after them."""
    return TransformerLayerSubmodules(
        input_layernorm=IdentityOp,
        self_attention=ModuleSpec(
            module=SelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=TELayerNormColumnParallelLinear,
                core_attention=CoreAttention,
                linear_proj=TERowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=IdentityOp,
        mlp=mlp_part(MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)),
        mlp_bda=get_bias_dropout_add,
    )


def norm(config: TransformerConfig, hidden_size: int) -> nn.Module:
    """The norm that the configuration names."""
    module = TENorm(config, hidden_size, config.layernorm_epsilon)
    for parameter in module.parameters():  # on meta, Transformer Engine puts this off until it fills the weights
        parameter.sequence_parallel = config.sequence_parallel
    return module


def column_linear(config: TransformerConfig, input_size: int, output_size: int, bias: bool = False) -> nn.Module:
    """A linear layer whose output is sharded over tensor parallelism; called, it returns (output, None)."""
    return TEColumnParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
        tp_group=get_tensor_model_parallel_group(),
    )


def row_linear(config: TransformerConfig, input_size: int, output_size: int, bias: bool = False) -> nn.Module:
    """A linear layer whose input is sharded; its output is summed, and sequence-sharded under sequence parallelism."""
    return TERowParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=get_tensor_model_parallel_group(),
    )


def cross_core_attention(config: TransformerConfig) -> nn.Module:
    """Attention of text to media."""
    return MediaAttention(config)
