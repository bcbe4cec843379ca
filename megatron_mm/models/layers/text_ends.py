"""The two ends of a text decoder: vocabulary-parallel embedding, and final norm with vocabulary-parallel head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule

from megatron_mm.data.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.linear import ColumnParallelLinear
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import local_text
from megatron_mm.models.layers.transformer import backend_of


class TokenEmbedding(MegatronModule):
    """Tokens of this process's shard of the text -> stream `text` [s, 1, H]."""

    def __init__(
        self,
        settings: LayerSettings,
        shape: StackShape,
        vocab_size: int,
        tokens: Callable[[Microbatch], torch.Tensor],
    ) -> None:
        config = layer_config(settings, shape, text=True)
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
    """Final norm and output projection: `text` [s, 1, H] -> logits [R·L, 1, V/TP]."""

    def __init__(self, settings: LayerSettings, shape: StackShape, vocab_size: int) -> None:
        config = layer_config(settings, shape, text=True)
        super().__init__(config)
        self.final_layernorm = backend_of(settings).norm(config, shape.hidden_size)
        self.output_layer = ColumnParallelLinear(
            shape.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Logits of all positions of this context-parallel process, for this process's part of the vocabulary."""
        return self.output_layer(self.final_layernorm(text))[0]


def token_embedding(
    settings: LayerSettings, shape: StackShape, vocab_size: int, tokens: Callable[[Microbatch], torch.Tensor]
) -> TokenEmbedding:
    """The embedding, its weights not yet filled; `tokens` says which field of a microbatch it reads."""
    module = TokenEmbedding(settings, shape, vocab_size, tokens)
    return describe(module, init_std=shape.init_std, column={"word_embeddings": None})


def language_head(settings: LayerSettings, shape: StackShape, vocab_size: int) -> LanguageHead:
    """The head, its weights not yet filled."""
    return describe(LanguageHead(settings, shape, vocab_size), init_std=shape.init_std, column={"output_layer": None})
