"""The two ends of a text decoder: vocabulary-parallel embedding, and final norm with vocabulary-parallel head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.linear import ColumnParallelLinear
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import local_text


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
