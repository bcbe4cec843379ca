"""A small ViT with its MAE decoder, and a microbatch whose last image stands in for rows that have none."""

from __future__ import annotations

import torch
from transformers import ViTMAEConfig

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import Graph, Loss
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def tower() -> ViTConfig:
    return ViTConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, patch_size=4, image_size=16
    )


def mae(**changes: object) -> MAEConfig:
    return MAEConfig(**{"num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "ffn_hidden_size": 40} | changes)


def hf_config(mae: MAEConfig, **changes: object) -> ViTMAEConfig:
    """The same sizes for transformers' ViTMAE."""
    vit = tower()
    values = {
        "hidden_size": vit.hidden_size, "num_hidden_layers": vit.num_layers,
        "num_attention_heads": vit.num_attention_heads, "intermediate_size": vit.ffn_hidden_size,
        "layer_norm_eps": vit.layernorm_epsilon, "image_size": vit.image_size, "patch_size": vit.patch_size,
        "decoder_hidden_size": mae.hidden_size, "decoder_num_hidden_layers": mae.num_layers,
        "decoder_num_attention_heads": mae.num_attention_heads, "decoder_intermediate_size": mae.ffn_hidden_size,
        "mask_ratio": mae.mask_ratio, "norm_pix_loss": mae.normalize_pixels,
    }  # fmt: skip
    return ViTMAEConfig(**values | changes)


def make_batch(images: int = 3, rows_with_image: int | None = None, seed: int = 0) -> Microbatch:
    """`images` random images, of which the first `rows_with_image` (default: all) belong to a row."""
    generator = torch.Generator().manual_seed(seed)
    vit, length, rows = tower(), 8, images
    slots = torch.arange(rows)[:, None]
    slots[images if rows_with_image is None else rows_with_image :] = -1
    return Microbatch(
        plan=MicrobatchPlan(rows, length, images, 1, 1, 1, True, length),
        document_ids_RT=torch.zeros(rows, length, dtype=torch.long),
        position_ids_RT=torch.arange(length).repeat(rows, 1),
        loss_mask_RT=torch.ones(rows, length),
        image_slots_RK=slots,
        image_slot_documents_RK=torch.where(slots < 0, -2, 0),
        sound_slots_RJ=torch.full((rows, 1), -1),
        sound_slot_documents_RJ=torch.full((rows, 1), -2),
        images_ICHW=torch.randn(images, 3, vit.image_size, vit.image_size, generator=generator),
        patch_noise_IP=torch.rand(images, vit.num_patches, generator=generator),
    )


def graph_of(settings: LayerSettings, mae: MAEConfig, *, full: bool) -> Graph:
    """The tower on masked images, and on whole ones if asked, with the MAE decoder and its loss."""
    nodes = vit_nodes(tower(), settings, 0.1, full=full, masked=mae) + mae_nodes(tower(), mae, settings, 0.1)
    return Graph(nodes, [mae_loss(tower(), mae)])


def tensor_parallel_case(settings: LayerSettings) -> tuple[Graph, Microbatch]:
    """Both applications under a loss that reads both."""
    graph = graph_of(settings, mae(), full=True)
    weight = torch.randn(1 + tower().num_patches, tower().hidden_size, generator=torch.Generator().manual_seed(3))
    probe = Loss(
        "probe", lambda memory, context: (memory * weight).sum(), lambda batch: torch.ones(()), ("image_memory",)
    )
    return Graph(graph.nodes, [*graph.losses, probe]), make_batch()
