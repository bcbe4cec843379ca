"""A small system of a user's own: a decoder that reads a sensor by a tower of its own, its only memory.

Documents are packed; each has any number of pulses, of 4 readings of 3 values, and a weight for each of its tokens.
The tokens of a document of the dataset repeat the number that its pulse shows, so a model that reads it learns them.

    plugins: [tests/support/sensor.py]
    model: {system: sensor}
    data: {builder: "tests/support/sensor.py:build_datasets"}
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from megatron_mm.config.fields import Field, Listed
from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.schema import Config
from megatron_mm.config.section import section
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import System, register
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.data.reading.rows import Document, collate
from megatron_mm.models.graph import ForwardContext, Graph, Node, NodeCost, Stream
from megatron_mm.models.layers.cross_attention import GatedCrossAttentionKind, MediaMemory
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.layers.sharding import local_text
from megatron_mm.models.names import plain
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.decoder.section import DecoderConfig

READINGS, VALUES = 4, 3


def small_decoder() -> DecoderConfig:
    """Two layers."""
    return DecoderConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, vocab_size=64
    )


@section
class SensorConfig(SystemConfig):
    """A decoder that reads pulses."""

    system: Literal["sensor"] = "sensor"
    """Name of the system."""
    decoder: DecoderConfig = field(default_factory=small_decoder)
    """The decoder."""
    width: int = 24
    """Of the tower."""
    declares: bool = True
    """Whether the tower's node says what it reads."""

    @property
    def inputs(self) -> InputFormat:
        """Packed text with pulses and a weight for each token."""
        pulses = Field("pulses_SNC", ("S", READINGS, VALUES), low=-8.0, high=8.0)
        weights = Field("weights_RT", ("R", "T"), low=0.0, high=1.0)
        return InputFormat(
            self.decoder.vocab_size, own_fields=(pulses, weights), own_lists=(Listed("pulse", "S", most=3),)
        )

    @property
    def generates(self) -> bool:
        """It does."""
        return True


class Tower(nn.Module):
    """Pulses -> memory [S, READINGS, width]."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(width, VALUES, dtype=dtype)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """The memory."""
        return torch.tanh(functional.linear(context.batch.pulses_SNC.to(self.weight.dtype), self.weight))


class Weigh(nn.Module):
    """Adds each token's weight, times a vector, to the text."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vector = empty_parameter(width, dtype=dtype)

    def forward(self, text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """text [s, 1, H] -> the same."""
        weights = local_text(context.batch.weights_RT).reshape(-1, 1, 1).to(text.dtype)
        return text + weights * self.vector


@dataclass(frozen=True)
class OwnKind:
    """A module of one matrix or vector."""

    module: type[nn.Module]
    width: int
    parameter: str
    shape: tuple[int, ...]
    settings: LayerSettings

    def build(self) -> nn.Module:
        """The module."""
        return describe(self.module(self.width, self.settings.dtype), init_std=0.5)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Little."""
        return NodeCost(int(np.prod(self.shape)), 2.0 * plan.number("pulse") * READINGS * self.width * VALUES)

    def names(self, node: str, exported: str):
        """One."""
        yield plain(f"{node}.{self.parameter}", f"{exported}.{self.parameter}", *self.shape)


def build_graph(config: SensorConfig, settings: LayerSettings) -> Graph:
    """Tower, decoder with a cross-attention before its second layer."""
    decoder, width = DecoderNodes(config.decoder, settings, config.init_std), config.width
    hidden = config.decoder.hidden_size
    memory = Stream("pulse_memory", lambda plan: (plan.number("pulse"), READINGS, width))
    tower = OwnKind(Tower, width, "weight", (width, VALUES), settings)
    weigh = OwnKind(Weigh, hidden, "vector", (hidden,), settings)
    reads = (MediaMemory("pulse", "pulse", width, READINGS),)
    across = GatedCrossAttentionKind(settings, decoder.shape, reads, qk_layernorm=True, gate_init=0.5)
    declared = frozenset({"pulses_SNC"}) if config.declares else frozenset()
    nodes = [
        Node("tower", tower, (), (memory,), "tower", declared),
        decoder.embedding(),
        Node("weigh", weigh, ("text",), (decoder.text,), "weigh", frozenset({"weights_RT"})),
        decoder.layer(0),
        Node("across", across, ("text", "pulse_memory"), (decoder.text,), "across", recomputable=True),
        decoder.layer(1),
        decoder.output(),
    ]
    return Graph(nodes, [causal_lm_loss(kind=settings.performance.cross_entropy)])


register(System("sensor", SensorConfig, build_graph))


class Pulses:
    """A split: each row holds three documents, of which the first has no pulse."""

    def __init__(self, config: Config, seed: int) -> None:
        self.inputs, self.length, self.seed = config.model.inputs, config.data.seq_length, seed

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """Rows of these numbers."""
        rows = [self._row(number) for number in index]
        collated = collate(rows, self.inputs, self.length, index, task)
        if "pulses_SNC" in fields:
            shown = [np.full((READINGS, VALUES), answer / 8, np.float32) for answer in collated.listed["pulse"]]
            collated.fill("pulses_SNC", shown)
        return collated.microbatch

    def _row(self, number: int) -> list[Document]:
        draw = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        size, documents = self.length // 3, []
        for part in range(3):
            answer = int(draw.choice([1, 41, 42, 42]))  # tokens of either half of the vocabulary
            tokens = np.full(size, 8 + answer)
            tokens[0] = 2
            pulses = {"pulse": [answer] * (part > 0)}
            document = Document(tokens, np.ones(size, bool), f"{number}.{part}", listed=pulses)
            document.own["weights_RT"] = draw.random(size).astype(np.float32)
            documents.append(document)
        return documents


def build_datasets(config: Config) -> SimpleNamespace:
    """Training and validation."""
    seed = config.training.seed
    return SimpleNamespace(train=Pulses(config, seed), valid=Pulses(config, seed + 1))
