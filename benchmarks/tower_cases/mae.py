"""Masked autoencoding (masked tower, decoder, loss) against transformers' ViTMAEForPreTraining."""

from __future__ import annotations

import torch

from benchmarks.tower_cases import TowerCase
from benchmarks.tower_cases.vit import Tower, make_batch, sizes
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import sine_cosine_positions, vit_nodes
from megatron_mm.parts.vit.section import MAEConfig


def build(smoke: bool) -> TowerCase:
    """Masked images to the loss."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    tower, images = sizes(smoke)
    width = tower.hidden_size // 2
    mae = MAEConfig(num_layers=2, hidden_size=width, num_attention_heads=2, ffn_hidden_size=4 * width)
    settings = LayerSettings()
    nodes = vit_nodes(tower, settings, 0.02, full=False, masked=mae) + mae_nodes(tower, mae, settings, 0.02)
    ours, loss = Tower(nodes).train(), mae_loss(tower, mae)
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=tower.hidden_size, num_hidden_layers=tower.num_layers,
            num_attention_heads=tower.num_attention_heads, intermediate_size=tower.ffn_hidden_size,
            layer_norm_eps=tower.layernorm_epsilon, image_size=tower.image_size, patch_size=tower.patch_size,
            decoder_hidden_size=mae.hidden_size, decoder_num_hidden_layers=mae.num_layers,
            decoder_num_attention_heads=mae.num_attention_heads, decoder_intermediate_size=mae.ffn_hidden_size,
            mask_ratio=mae.mask_ratio, norm_pix_loss=mae.normalize_pixels, attn_implementation="sdpa",
        )
    ).train()  # fmt: skip
    entries = [
        *names_of(vit_nodes(tower, LayerSettings(), 0.02, "vit")),
        *names_of(mae_nodes(tower, mae, LayerSettings(), 0.02, "decoder")),
    ]
    ours.give_weights(peer, entries)
    for positions in (peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed):
        positions.copy_(sine_cosine_positions(tower.image_size // tower.patch_size, positions.shape[-1], "cpu"))
    batch = make_batch(tower, images)
    count = loss.count(batch)

    def run_ours() -> torch.Tensor:
        ours.zero_grad(set_to_none=True)
        return loss.compute(*ours(batch)) / count

    def run_peer() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        return peer(batch.images_ICHW, noise=batch.patch_noise_IP).loss

    name = f"MAE, {tower.num_layers} × {tower.hidden_size} and {mae.num_layers} × {mae.hidden_size}, {images} images"
    return TowerCase(name, run_ours, run_peer)
