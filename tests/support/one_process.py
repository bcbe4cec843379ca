"""A recipe in the test's own process: the figures to which layouts are held, and the weights that must be among them.

What `measure` trains under torchrun it trains here as well; starting an interpreter costs more than two small steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mm.checks.layouts import for_layout, measure, parse_layout
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup

#: megatron-core stores the norms of its layers with the maps that follow them.
_STORED = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def measured(config: Config, folder: Path, **sizes: int) -> dict:
    """What `layouts.launch` returns of one process.

    Args:
        folder: takes a file.
        sizes: as `for_layout`'s.
    """
    measure(for_layout(config, parse_layout("DP1"), **sizes), folder / "measured.pt")
    return torch.load(folder / "measured.pt", weights_only=True)


def assert_every_weight_is_compared(figures: dict, config: Config, steps: int) -> None:
    """The gradients are those of the parameters that learn, by their names in the model, a tied one once, at each step.

    Args:
        figures: of `measured`.
    """
    device = setup.initialize(ParallelSizes(), seed=1)
    (chunk,) = Assembly.of(config, ParallelSizes()).build(device, seed=None).bare_chunks
    names = {
        f"{node.name}.{name}"
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and name not in node.ties
    }
    keys = set(figures["gradients"])
    for stored, own in _STORED.items():
        keys = {key.replace(stored, own) for key in keys}
    assert keys == {f"{step}/gradient.{name}" for step in range(steps) for name in names}
