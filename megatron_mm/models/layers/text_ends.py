"""The two ends of a text decoder: vocabulary-parallel embedding, and final norm with vocabulary-parallel head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import embedding_cost, head_cost
from megatron_mm.models.layers.linear import ColumnParallelLinear
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import local_text
from megatron_mm.models.names import Entry, norm, plain


class TokenEmbedding(MegatronModule):
    """Tokens of this process's shard of the text -> stream `text` [s, 1, H]."""

    def __init__(
        self,
        settings: LayerSettings,
        shape: StackShape,
        vocab_size: int,
        tokens: Callable[[Microbatch], torch.Tensor],
    ) -> None:
        config = layer_config(settings, shape, sharded=True)
        super().__init__(config)
        self._tokens = tokens
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            shape.hidden_size,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[s, 1, H], s = R·L, or a TP-th of it under sequence parallelism."""
        tokens = local_text(self._tokens(context.batch)).flatten()
        # VocabParallelEmbedding transposes to sequence first only when it scatters.
        return self.word_embeddings(tokens[None] if self.config.sequence_parallel else tokens[:, None])


class LanguageHead(MegatronModule):
    """Final norm and output projection: states -> logits [positions, 1, V/TP].

    Args:
        sharded: states are this process's shard of the text [s, 1, H]; otherwise whole rows [R, T, H].
        output_width: width of the vocabulary's vectors where it is not that of the states, which are projected first.
    """

    def __init__(
        self,
        settings: LayerSettings,
        shape: StackShape,
        vocab_size: int,
        *,
        sharded: bool = True,
        output_width: int | None = None,
    ) -> None:
        config = layer_config(settings, shape, sharded=sharded)
        super().__init__(config)
        self.final_layernorm = backend_of(settings).norm(config, shape.hidden_size)
        self.projection = None
        if output_width is not None:
            self.projection = empty_parameter(output_width, shape.hidden_size, dtype=settings.dtype)
        self.output_layer = ColumnParallelLinear(
            output_width or shape.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, states: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Logits of all positions of this context-parallel process, for this process's part of the vocabulary."""
        states = self.final_layernorm(states)
        if self.projection is not None:
            states = functional.linear(states, self.projection)
        logits = self.output_layer(states)[0]
        return logits if logits.shape[1] == 1 else logits.flatten(0, 1)[:, None]


def token_embedding(
    settings: LayerSettings, shape: StackShape, vocab_size: int, tokens: Callable[[Microbatch], torch.Tensor]
) -> TokenEmbedding:
    """The embedding, its weights not yet filled; `tokens` says which field of a microbatch it reads."""
    module = TokenEmbedding(settings, shape, vocab_size, tokens)
    return describe(module, init_std=shape.init_std, column={"word_embeddings": None})


def language_head(settings: LayerSettings, shape: StackShape, vocab_size: int, **kind) -> LanguageHead:
    """The head, its weights not yet filled; `kind` as of LanguageHead."""
    module = LanguageHead(settings, shape, vocab_size, **kind)
    return describe(module, init_std=shape.init_std, column={"output_layer": None})


@dataclass(frozen=True)
class TokenEmbeddingKind:
    """The vocabulary-parallel embedding of a sharded text; exported under the node's exported name.

    Attributes:
        tokens: which field of a microbatch it reads.
    """

    settings: LayerSettings
    shape: StackShape
    vocab_size: int
    tokens: Callable[[Microbatch], torch.Tensor]

    def build(self) -> TokenEmbedding:
        """The module."""
        return token_embedding(self.settings, self.shape, self.vocab_size, self.tokens)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """A look-up."""
        return embedding_cost(self.shape, self.vocab_size, plan.num_rows, plan.row_length, self.settings)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """The table."""
        yield plain(f"{node}.word_embeddings.weight", exported, self.vocab_size, self.shape.hidden_size)


@dataclass(frozen=True)
class HeadNames:
    """Full names of a head's parts in the exported model."""

    norm: str
    head: str = ""
    """Empty: the vocabulary's vectors are another node's."""
    projection: str = ""


@dataclass(frozen=True)
class LanguageHeadKind:
    """Final norm and head, with what the softmax of the loss keeps.

    Attributes:
        output_width: width of the vocabulary's vectors, where states are projected to it first.
    """

    settings: LayerSettings
    shape: StackShape
    vocab_size: int
    head_names: HeadNames
    sharded: bool = True
    output_width: int | None = None

    def build(self) -> LanguageHead:
        """The module."""
        options = {"sharded": self.sharded, "output_width": self.output_width}
        return language_head(self.settings, self.shape, self.vocab_size, **options)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all positions of a microbatch; without the vectors of a tied head."""
        return head_cost(
            self.shape,
            self.vocab_size,
            plan.num_rows,
            plan.row_length,
            self.settings,
            sharded=self.sharded,
            output_width=self.output_width,
            tied=not self.head_names.head,
        )

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Those of `head_names`."""
        hidden, names = self.shape.hidden_size, self.head_names
        yield from norm(f"{node}.final_layernorm", names.norm, hidden, bias=self.shape.normalization == "LayerNorm")
        if self.output_width is not None:
            yield plain(f"{node}.projection", names.projection, self.output_width, hidden)
        if names.head:
            yield plain(f"{node}.output_layer.weight", names.head, self.vocab_size, self.output_width or hidden)
