"""The light decoder of masked autoencoders as nodes (arXiv:2111.06377), dropped once the tower has learned.

`mae.embeddings` takes `masked_memory` [I, 1 + V, C] to the decoder's width, puts a mask token where a patch was hidden
and adds fixed positions; `mae.layers.i` are transformer layers on all patches; `mae.output` predicts their pixels,
`mae_prediction` [I, P, X], for the loss (objectives/mae.py). Like the tower it is whole on every context-parallel
process; its first and last linear maps are also whole on every tensor-parallel one, because they are small.

Shape suffixes as in nodes.py; D is the decoder's width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies, layer_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import stack_layer
from megatron_mm.parts.clip.nodes import image_plan
from megatron_mm.parts.vit.nodes import shuffled_patches, sine_cosine_positions, vit_shape
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def _linear(inputs: int, outputs: int, settings: LayerSettings) -> nn.Module:
    return nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=settings.dtype, device=torch.cuda.current_device())


class MAEEmbedding(nn.Module):
    """Visible patches at their places, mask tokens at the others, positions."""

    def __init__(self, tower: ViTConfig, mae: MAEConfig, settings: LayerSettings) -> None:
        super().__init__()
        self.linear = _linear(tower.hidden_size, mae.hidden_size, settings)
        self.mask_token = empty_parameter(mae.hidden_size, dtype=settings.dtype)
        grid = tower.image_size // tower.patch_size
        positions = sine_cosine_positions(grid, mae.hidden_size, torch.cuda.current_device())
        self.register_buffer("positions", positions.to(settings.dtype), persistent=False)

    def forward(self, masked_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[I, 1 + V, C] -> [I, 1 + P, D]."""
        hidden = self.linear(masked_memory)
        images, tokens, width = hidden.shape
        index_IV = shuffled_patches(context)[:, : tokens - 1, None].expand(-1, -1, width)
        masks = self.mask_token.expand(images, self.positions.shape[0] - 1, -1)
        return torch.cat((hidden[:, :1], masks.scatter(1, index_IV, hidden[:, 1:])), dim=1) + self.positions


class MAEOutput(nn.Module):
    """LayerNorm and the pixels of every patch; the class token is dropped."""

    def __init__(self, tower: ViTConfig, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )
        self.linear = _linear(shape.hidden_size, 3 * tower.patch_size**2, settings)

    def forward(self, mae_hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[I, 1 + P, D] -> [I, P, X]."""
        return self.linear(self.final_layernorm(mae_hidden[:, 1:]))


def mae_nodes(tower: ViTConfig, mae: MAEConfig, settings: LayerSettings, init_std: float) -> list[Node]:
    """Nodes of the decoder; LayerNorms have the tower's epsilon."""
    shape = vit_shape(mae, tower.layernorm_epsilon, init_std)
    patches, width, whole = tower.num_patches, mae.hidden_size, copies(settings.sizes, sharded=False)
    visible, pixels = mae.visible_patches(patches), 3 * tower.patch_size**2
    hidden = Stream("mae_hidden", lambda plan: (plan.num_images, 1 + patches, width))
    prediction = Stream("mae_prediction", lambda plan: (plan.num_images, patches, pixels))

    def embeddings() -> nn.Module:
        return describe(MAEEmbedding(tower, mae, settings), init_std=init_std)

    def output() -> nn.Module:
        return describe(MAEOutput(tower, settings, shape), init_std=init_std)

    def embeddings_cost(plan: MicrobatchPlan) -> NodeCost:
        tokens, matrix = plan.num_images * whole * (1 + visible), tower.hidden_size * width
        stored = 2.0 * tokens * tower.hidden_size + 8.0 * plan.num_images * whole * visible
        return NodeCost(matrix + 2 * width, 2.0 * tokens * matrix, stored)

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        tokens, matrix = plan.num_images * whole * patches, width * pixels
        # Inputs of the norm and of the linear layer; the loss keeps its fp32 error.
        return NodeCost(matrix + pixels + 2 * width, 2.0 * tokens * matrix, tokens * (4.0 * width + 4.0 * pixels))

    nodes = [
        Node(
            "mae.embeddings", embeddings, ("masked_memory",), (hidden,), embeddings_cost, frozenset({"patch_noise_IP"})
        )
    ]
    for index in range(mae.num_layers):
        nodes.append(
            Node(
                f"mae.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, image_plan, sharded=False),
                ("mae_hidden",),
                (hidden,),
                lambda plan: layer_cost(shape, plan.num_images, 1 + patches, settings.sizes, sharded=False),
                recomputable=True,
            )
        )
    nodes.append(Node("mae.output", output, ("mae_hidden",), (prediction,), output_cost))
    return nodes
