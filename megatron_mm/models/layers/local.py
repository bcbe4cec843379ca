"""The local backend: megatron-core's parallel linears, our norms and attention, in megatron-core's TransformerLayer."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_mm.models.layers.attention import CoreAttention, SelfAttention
from megatron_mm.models.layers.elementwise import SwiGLU
from megatron_mm.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_mm.models.layers.media_attention import MediaAttention
from megatron_mm.models.layers.norms import Norm
from megatron_mm.platform.megatron_versions import mlp_part

#: Text plans hold masks.
PACKED = False
#: Class of a norm that is not part of the linear layer after it.
NORM = Norm


def layer_submodules() -> TransformerLayerSubmodules:
    """Parts of a pre-norm layer of self-attention and MLP.

    The key map gives a checkpoint the names that Transformer Engine's fused norms have, so both backends share it.
    """
    return TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        # megatron-core calls an activation module only where the configuration asks for one: for SwiGLU, here.
        mlp=mlp_part(
            MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear)
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def norm(config: TransformerConfig, hidden_size: int) -> nn.Module:
    """The norm that the configuration names."""
    return Norm(config, hidden_size, config.layernorm_epsilon)


def column_linear(config: TransformerConfig, input_size: int, output_size: int, bias: bool = False) -> nn.Module:
    """A linear layer whose output is sharded over tensor parallelism; called, it returns (output, None)."""
    return ColumnParallelLinear(
        input_size, output_size, config=config, init_method=config.init_method, bias=bias, gather_output=False,
        tp_group=get_tensor_model_parallel_group(),
    )


def row_linear(config: TransformerConfig, input_size: int, output_size: int, bias: bool = False) -> nn.Module:
    """A linear layer whose input is sharded; its output is summed, and sequence-sharded under sequence parallelism."""
    return RowParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_group=get_tensor_model_parallel_group(),
    )


def cross_core_attention(config: TransformerConfig) -> nn.Module:
    """Attention of text to media."""
    return MediaAttention(config)
