"""The Conformer tower on waveforms against transformers' Wav2Vec2ConformerModel.

The peer keeps its BatchNorm where the tower has LayerNorm: that is what its users run. For the outputs to agree all the
same, these norms have weight 0 here, so that either gives its bias; both are computed in full, forward and backward.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.tower_cases import TowerCase
from benchmarks.tower_cases.vit import Tower
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.parts.conformer.section import ConformerConfig


def sizes(smoke: bool) -> tuple[ConformerConfig, int]:
    """The tower and the number of sounds: five seconds each, or a tenth of one."""
    if smoke:
        shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "seconds": 0.1}
        return ConformerConfig(**shape, front_channels=16), 2
    shape = {"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 2048, "seconds": 5.0}
    return ConformerConfig(**shape, front_channels=256), 1


def make_batch(tower: ConformerConfig, sounds: int) -> Microbatch:
    """Random waveforms, one in each row."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(sounds)[:, None]
    return Microbatch(
        plan=MicrobatchPlan(sounds, 1, 1, sounds, 1, 1, True, 1),
        document_ids_RT=torch.zeros_like(row),
        position_ids_RT=torch.zeros_like(row),
        loss_mask_RT=torch.ones(sounds, 1),
        image_slots_RK=torch.full_like(row, -1),
        image_slot_documents_RK=torch.full_like(row, -2),
        sound_slots_RJ=row,
        sound_slot_documents_RJ=torch.zeros_like(row),
        waveforms_AN=torch.randn(sounds, tower.num_samples, generator=generator),
    )


def make_peer(tower: ConformerConfig) -> nn.Module:
    """Hugging Face's module of the same shape."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    config = Wav2Vec2ConformerConfig(
        hidden_size=tower.hidden_size, num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.num_attention_heads, intermediate_size=tower.ffn_hidden_size,
        conv_depthwise_kernel_size=tower.conv_kernel_size, layer_norm_eps=tower.layernorm_epsilon,
        conv_dim=[tower.front_channels] * len(tower.front_kernels), conv_kernel=tower.front_kernels,
        conv_stride=tower.front_strides, conv_bias=True, feat_extract_norm="layer", hidden_act="swish",
        position_embeddings_type="relative", hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        feat_proj_dropout=0.0, conformer_conv_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Wav2Vec2ConformerModel(config).train()


def give_weights(ours: Tower, peer: nn.Module, tower: ConformerConfig) -> None:
    """Makes the peer's weights ours."""
    found = {name.removeprefix("built.").replace("/", "."): value for name, value in ours.named_parameters()}
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for entry in names_of(conformer_nodes(tower, LayerSettings(), 0.02, "peer")):
            if entry.training.endswith("depthwise_layernorm.weight"):
                found[entry.training].zero_()
            for name, value in entry.split(found[entry.training]):
                target = theirs[name.removeprefix("peer.").replace("depthwise_layer_norm", "batch_norm")]
                target.copy_(value.view_as(target))  # the peer's pointwise convolutions have a third dimension


def build(smoke: bool) -> TowerCase:
    """Whole waveforms."""
    tower, sounds = sizes(smoke)
    ours = Tower(conformer_nodes(tower, LayerSettings(), 0.02)).train()
    peer = make_peer(tower)
    give_weights(ours, peer, tower)
    batch = make_batch(tower, sounds)

    def run_ours() -> torch.Tensor:
        ours.zero_grad(set_to_none=True)
        return ours(batch)[0]

    def run_peer() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        return peer(batch.waveforms_AN.detach()).last_hidden_state  # which asks for the gradient of what it is given

    name = (
        f"Conformer, {tower.num_layers} × {tower.hidden_size}, {sounds} sounds of {tower.seconds} s, "
        f"{tower.tokens_per_sound} tokens"
    )
    return TowerCase(name, run_ours, run_peer)
