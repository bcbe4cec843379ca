"""The Swin V2 tower on images against transformers' Swinv2Model."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.tower_cases import TowerCase
from benchmarks.tower_cases.vit import Tower
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.swin.nodes import swin_nodes
from megatron_mm.parts.swin.section import SwinConfig


def sizes(smoke: bool) -> tuple[SwinConfig, int]:
    """The tower, of Swin-T's shape but for its third stage, and the number of images."""
    width, depths, heads, image, images = (
        (16, [2, 2], [2, 4], 56, 2) if smoke else (96, [2, 2, 2, 2], [3, 6, 12, 24], 224, 4)
    )
    return SwinConfig(embed_dim=width, depths=depths, num_heads=heads, image_size=image, window_size=7), images


def make_batch(tower: SwinConfig, images: int) -> Microbatch:
    """Random images, one in each row."""
    row = torch.arange(images)[:, None]
    pixels = torch.randn(images, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    return Microbatch(
        plan=MicrobatchPlan(images, 1, images, 1, 1, 1, True, 1),
        document_ids_RT=torch.zeros_like(row),
        position_ids_RT=torch.zeros_like(row),
        loss_mask_RT=torch.ones(images, 1),
        image_slots_RK=row,
        image_slot_documents_RK=torch.zeros_like(row),
        sound_slots_RJ=torch.full_like(row, -1),
        sound_slot_documents_RJ=torch.full_like(row, -2),
        images_ICHW=pixels,
    )


def give_weights(ours: Tower, peer: nn.Module, tower: SwinConfig) -> None:
    """Makes the peer's weights ours; an image sees the sum of the temporal patch, and no offset in time."""
    values = {name.removeprefix("built.").replace("/", "."): value for name, value in ours.named_parameters()}
    theirs = dict(peer.named_parameters(prefix="peer"))
    with torch.no_grad():
        for entry in names_of(swin_nodes(tower, LayerSettings(), 0.02, "peer")):
            for name, value in entry.split(values[entry.training]):
                if name.endswith("projection.weight"):
                    value = value.sum(dim=2)
                elif name.endswith("bias_mlp.0.weight"):
                    value = value[:, 1:]
                theirs[name].copy_(value.view_as(theirs[name]))


def build(smoke: bool) -> TowerCase:
    """Images alone: the peer knows no clips."""
    from transformers import Swinv2Config, Swinv2Model

    tower, images = sizes(smoke)
    ours = Tower(swin_nodes(tower, LayerSettings(), 0.02)).train()
    peer = Swinv2Model(
        Swinv2Config(
            image_size=tower.image_size, patch_size=tower.patch_size, embed_dim=tower.embed_dim, depths=tower.depths,
            num_heads=tower.num_heads, window_size=tower.window_size, mlp_ratio=tower.mlp_ratio,
            layer_norm_eps=tower.layernorm_epsilon, drop_path_rate=0.0,
        ),
        add_pooling_layer=False,
    ).train()  # fmt: skip
    give_weights(ours, peer, tower)
    batch = make_batch(tower, images)

    def run_ours() -> torch.Tensor:
        ours.zero_grad(set_to_none=True)
        return ours(batch)[0]

    def run_peer() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        return peer(batch.images_ICHW).last_hidden_state.flatten(0, 1)

    name = f"Swin V2, {tower.depths} × {tower.embed_dim}, {images} images of {tower.image_size} px, windows of 7"
    return TowerCase(name, run_ours, run_peer)
