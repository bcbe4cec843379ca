"""The ViT tower on whole images against transformers' ViTModel, and what it shares with the case of masked images."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.tower_cases import TowerCase
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, names_of
from megatron_mm.models.initialization import initialize_module
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import Entry
from megatron_mm.parts.vit.nodes import sine_cosine_positions, vit_nodes
from megatron_mm.parts.vit.section import ViTConfig


def sizes(smoke: bool) -> tuple[ViTConfig, int]:
    """The tower, of ViT-S/16's shape but for its depth, and the number of images."""
    layers, width, heads, patch, image, images = (2, 32, 2, 8, 32, 2) if smoke else (6, 384, 6, 16, 224, 8)
    tower = ViTConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        ffn_hidden_size=4 * width,
        patch_size=patch,
        image_size=image,
    )
    return tower, images


def make_batch(tower: ViTConfig, images: int) -> Microbatch:
    """Random images with the noise of their masks, one in each row."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(images)[:, None]
    return Microbatch(
        plan=MicrobatchPlan(images, 1, images, 1, 1, 1, True, 1),
        document_ids_RT=torch.zeros_like(row),
        position_ids_RT=torch.zeros_like(row),
        loss_mask_RT=torch.ones(images, 1),
        image_slots_RK=row,
        image_slot_documents_RK=torch.zeros_like(row),
        sound_slots_RJ=torch.full_like(row, -1),
        sound_slot_documents_RJ=torch.full_like(row, -2),
        images_ICHW=torch.randn(images, 3, tower.image_size, tower.image_size, generator=generator),
        patch_noise_IP=torch.rand(images, tower.num_patches, generator=generator),
    )


class Tower(nn.Module):
    """Nodes that pass streams to one another, with random weights."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__()
        self.nodes, self.built = nodes, nn.ModuleDict()
        for node in nodes:
            module = node.build()
            initialize_module(module, node.name, seed=0)
            self.built[node.name.replace(".", "/")] = module

    def forward(self, batch: Microbatch) -> tuple[torch.Tensor, ForwardContext]:
        """What the last node writes, and the context for a loss."""
        context, streams = ForwardContext(batch), {}
        for node, module in zip(self.nodes, self.built.values()):
            streams[node.writes[0].name] = module(*[streams[name] for name in node.reads], context)
        return streams[self.nodes[-1].writes[0].name], context

    def give_weights(self, peer: nn.Module, entries: list[Entry]) -> None:
        """Makes the peer's weights ours."""
        ours = {name.removeprefix("built.").replace("/", "."): value for name, value in self.named_parameters()}
        theirs = dict(peer.named_parameters())
        with torch.no_grad():
            for entry in entries:
                for name, value in entry.split(ours[entry.training]):
                    theirs[name].copy_(value.view_as(theirs[name]))


def build(smoke: bool) -> TowerCase:
    """Whole images."""
    from transformers import ViTConfig as PeerConfig
    from transformers import ViTModel

    tower, images = sizes(smoke)
    ours = Tower(vit_nodes(tower, LayerSettings(), 0.02)).train()
    peer = ViTModel(
        PeerConfig(
            hidden_size=tower.hidden_size, num_hidden_layers=tower.num_layers,
            num_attention_heads=tower.num_attention_heads, intermediate_size=tower.ffn_hidden_size,
            layer_norm_eps=tower.layernorm_epsilon, image_size=tower.image_size, patch_size=tower.patch_size,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    ).train()  # fmt: skip
    ours.give_weights(nn.ModuleDict({"peer": peer}), names_of(vit_nodes(tower, LayerSettings(), 0.02, "peer")))
    positions = peer.embeddings.position_embeddings.requires_grad_(False)  # fixed here, so no work for the peer either
    positions.copy_(sine_cosine_positions(tower.image_size // tower.patch_size, tower.hidden_size, "cpu"))
    batch = make_batch(tower, images)

    def run_ours() -> torch.Tensor:
        ours.zero_grad(set_to_none=True)
        return ours(batch)[0]

    def run_peer() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        return peer(batch.images_ICHW).last_hidden_state

    name = f"ViT, {tower.num_layers} × {tower.hidden_size}, {images} images of {tower.tokens_per_image} tokens"
    return TowerCase(name, run_ours, run_peer)
