"""The Transformer Engine backend: fused norms and linears, and FlashAttention on packed documents.

The same graph, parameter names and checkpoint keys as the local backend, whose key map gives its norms the names that
they have here, where they are part of the linear layer after them. Packing, context parallelism and rotary positions
are those of `attention` and `packing`; only kernels differ. This file alone imports Transformer Engine, and it is
imported only where that backend is chosen. Numerics have not been run: no GPU was at hand.

Shape suffixes as in `attention`.
"""

from __future__ import annotations

import copy

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
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_mm.data.microbatch import Microbatch
from megatron_mm.models.layers.attention import AttentionPlan, SelfAttention, attention
from megatron_mm.models.layers.packing import MediaKeys, Segments, media_keys

#: Text plans hold segments for variable-length kernels, not masks.
PACKED = True
#: Class of a norm that is not part of the linear layer after it.
NORM = TENorm


class _Attention(TEDotProductAttention):
    """Transformer Engine's attention without its context parallelism: keys are gathered before, by `attention`."""

    def __init__(self, config: TransformerConfig, attention_type: str, layer_number: int = 1, **unused: object) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, layer_number, AttnMaskType.no_mask, attention_type)
        self.recompute = config.recompute_granularity == "selective"
        self.dropout = config.attention_dropout

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kinds: object) -> torch.Tensor:
        """One call of the kernel, past megatron-core's choice of mask types, recomputed if asked."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return super(TEDotProductAttention, self).forward(query, key, value, **kinds)

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
    ) -> torch.Tensor:
        """One call for each piece of a row; keys and values [positions, G, D] -> [R, L, N·D]."""
        rows, pieces = query_RLND.shape[0], []
        for call in calls:
            piece = self.run(
                query_RLND[:, call.begin : call.end].flatten(0, 1),
                key,
                value,
                qkv_format="thd",
                attn_mask_type=mask,
                cu_seqlens_q=call.query_bounds,
                cu_seqlens_kv=call.key_bounds,
                max_seqlen_q=call.longest_query,
                max_seqlen_kv=call.longest_key,
            )
            pieces.append(piece.view(rows, call.end - call.begin, -1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


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
            return self.run(query, key, value, qkv_format="bshd", attn_mask_type="causal" if plan.causal else "no_mask")
        mask = "padding"
        if plan.causal:
            mask = "padding_causal_bottom_right" if plan.gather else "padding_causal"
        return self.run_segments(query, key.flatten(0, 1), value.flatten(0, 1), plan.segments, mask)


class MediaAttention(_Attention):
    """Attention of text to the media of its documents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, "cross")

    @staticmethod
    def keys(
        batch: Microbatch, image_tokens: int, sound_tokens: int, dtype: torch.dtype, cp_size: int, cp_rank: int
    ) -> MediaKeys:
        """The part of a cross plan that this core needs."""
        return media_keys(batch, image_tokens, sound_tokens, cp_size, cp_rank)

    def forward(
        self,
        query: torch.Tensor,
        images: tuple[torch.Tensor, torch.Tensor],
        sounds: tuple[torch.Tensor, torch.Tensor],
        keys: MediaKeys,
    ) -> torch.Tensor:
        """Queries [R, L, N, D]; keys and values of all media, [I, M, G, D] -> [R, L, N·D]."""
        key, value = (_by_document(image, sound, keys.order) for image, sound in zip(images, sounds))
        return self.run_segments(query, key, value, keys.calls, "padding")


def _by_document(images: torch.Tensor, sounds: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """All media positions and one of zeros, in the order of `MediaKeys`: [positions, G, D]."""
    nothing = images.new_zeros(1, *images.shape[2:])
    return torch.cat((images.flatten(0, 1), sounds.flatten(0, 1), nothing)).index_select(0, order)


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
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear),
        ),
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
