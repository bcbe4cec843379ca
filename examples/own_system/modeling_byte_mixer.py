"""The byte mixer in plain torch for transformers. Part of the exported folder; needs torch and transformers only.

It computes what byte_mixer.py trains: gated causal convolutions, each of the normed states of a byte and of those
before it. A row begins with zeros in training, so states of padding are zero here too, on whichever side it stands.

The cache holds the normed states that each layer has read. The last `kernel_size - 1` would do, but transformers' own
growing cache, whose keys they are (its values are empty), knows how beams are reordered and how tokens are taken back.

Shapes: B rows, T bytes, C width, K bytes of a kernel, V rows of the vocabulary.
"""

import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin

from .configuration_byte_mixer import ByteMixerConfig
from .exported_model import CACHE, ExportedModel, begin, check_positions
from .text_layers import initialize, kept_states, next_token_loss


class ByteMixerLayer(nn.Module):
    """x + value · sigmoid(gate), both a causal convolution of the normed input."""

    def __init__(self, config, layer_idx):
        super().__init__()
        width, self.layer_idx, self.kernel_size = config.hidden_size, layer_idx, config.kernel_size
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 2 * width, config.kernel_size, bias=False)

    def forward(self, x, real, cache):
        """[B, T, C] -> the same; `real` [B, T, 1] is 1 for bytes and 0 for padding."""
        states, wanted = self.norm(x) * real, x.shape[1] + self.kernel_size - 1
        if cache is not None:
            keys, _ = cache.update(states[:, None], states[:, None, :, :0], self.layer_idx)
            states = keys[:, 0, -wanted:]
        states = F.pad(states.transpose(1, 2), (wanted - states.shape[1], 0))
        return x + F.glu(self.conv(states), dim=1).transpose(1, 2)


class ByteMixerModel(ExportedModel, GenerationMixin):
    """Bytes to the next byte."""

    config_class = ByteMixerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["ByteMixerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ByteMixerLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        initialize(module, self.config.initializer_range)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # generate() leaves the cache to forward()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits [B, T, V], and with `labels` [B, T] the mean loss of the next byte, whose labels are not smoothed.

        `attention_mask` [B, bytes in the cache + T] is 1 for bytes and 0 for padding; None: all are bytes. A byte has
        no position, so `position_ids` are compared with the cache and not used. The cache comes as `past_key_values` or
        `cache`, two names of one argument.

        Raises:
            TypeError: an argument that would be ignored.
            ValueError: a cache of another kind, or bytes that it should hold and does not.
        """
        self.check_arguments(kwargs)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache, past = begin(past_key_values, cache, use_cache, num_memory_layers=0)
        length = input_ids.shape[1]
        check_positions(position_ids, past, length, kwargs.get("cache_position"))
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + length)
        if attention_mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} bytes; cache and input hold {past + length}"
            )
        x = self.embed_tokens(input_ids)
        real = attention_mask[:, past:, None].to(x.dtype)
        for layer in self.layers:
            x = layer(x, real, cache)
        found = {"logits": self.lm_head(kept_states(x, logits_to_keep))}
        if labels is not None:
            found["loss"] = next_token_loss(found["logits"], labels, num_items_in_batch)
        return self.output(found | {CACHE: cache}, return_dict)


__all__ = ["ByteMixerConfig", "ByteMixerModel"]
