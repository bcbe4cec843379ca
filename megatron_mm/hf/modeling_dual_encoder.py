"""The dual encoder in plain torch for transformers: a vision transformer, a causal text encoder, fusion above both.

`pixel_values` become a memory, tokens pass a text encoder in GPT-2's form; the two outputs are compared (contrastive
embeddings), and causal layers of self-attention, cross-attention to the image and MLP above them predict the next token
through the text embedding. One row of a batch is one document with at most one image; rows without one get exactly zero
from cross-attention. It needs torch and transformers only, and serves as the reference for the training code.

Shapes: B rows, T tokens, M memory positions of an image, C width, E width of the shared space.
"""

from functools import partial

import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin

from .configuration_dual_encoder import DualEncoderConfig
from .exported_model import CACHE, MemoryGeneration, begin
from .image_text import ImageTextModel
from .text_layers import (
    MemoryAttention,
    attend,
    cached_memory,
    join_heads,
    kept_states,
    last_token,
    memory_masks,
    next_token_loss,
    positions_and_mask,
    split_heads,
)
from .vit import ViTTower  # noqa: F401 # transformers before 5.6 copies only what this file itself imports

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class TextAttention(nn.Module):
    """Causal self-attention with biases."""

    def __init__(self, size, num_heads, layer_idx):
        super().__init__()
        self.head_dim, self.layer_idx = size // num_heads, layer_idx
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x, mask, cache):
        q, k, v = (split_heads(f(x), self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.out_proj(join_heads(attend(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1)))


class TextLayer(nn.Module):
    """Pre-norm self-attention, cross-attention to a memory of width `memory_size` if it has one, MLP."""

    def __init__(self, config, num_heads, intermediate_size, layer_idx, memory_size=None):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.activation = ACTIVATIONS[config.hidden_act]
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        self.self_attn = TextAttention(size, num_heads, layer_idx)
        if memory_size is not None:
            self.cross_attn_layer_norm = nn.LayerNorm(size, eps=eps)
            self.cross_attn = MemoryAttention(size, num_heads, num_heads, memory_size)
        self.final_layer_norm = nn.LayerNorm(size, eps=eps)
        self.fc1 = nn.Linear(size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, size)

    def forward(self, x, mask, cache, memory=None):
        """`memory`: keys, values, mask and reads as MemoryAttention takes them; None: nothing is read."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
        if memory is not None:
            x = x + self.cross_attn(self.cross_attn_layer_norm(x), *memory)
        return x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))


class TextEncoder(nn.Module):
    """Tokens to states [B, T, C], each of which has seen the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            TextLayer(config, config.num_attention_heads, config.intermediate_size, index)
            for index in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids, position_ids, mask, cache):
        """Tokens [B, T] at positions [B or 1, T] -> [B, T, C].

        Raises:
            ValueError: a text is longer than the position table.
        """
        longest, positions = int(position_ids.max()) + 1, self.embed_positions.num_embeddings
        if longest > positions:
            raise ValueError(f"a text has {longest} tokens; this model has {positions} positions")
        x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for layer in self.layers:
            x = layer(x, mask, cache)
        return self.final_layer_norm(x)


class Fusion(nn.Module):
    """Layers that read the image, above the text encoder; their cache follows the encoder's."""

    def __init__(self, config):
        super().__init__()
        fusion, width = config.fusion, config.vision["hidden_size"]
        self.layers = nn.ModuleList(
            TextLayer(
                config,
                fusion["num_attention_heads"],
                fusion["ffn_hidden_size"],
                config.num_hidden_layers + index,
                memory_size=width,
            )
            for index in range(fusion["num_layers"])
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, mask, cache, past, memory, memory_mask):
        """States [B, T, C], memory [B, M, C_image] where it exists [B, M] (None: nowhere) -> [B, T, C]."""
        masks = None if memory_mask is None else memory_masks(memory_mask, x.dtype)
        for number, layer in enumerate(self.layers):
            read = None
            if masks is not None:
                read = (*cached_memory(cache, number, past, layer.cross_attn.project_memory, memory), *masks)
            x = layer(x, mask, cache, read)
        return self.final_layer_norm(x)


class DualEncoderModel(ImageTextModel, MemoryGeneration, GenerationMixin):
    """Captions and answers (`generate`), embeddings of images and texts, and masked autoencoding."""

    config_class = DualEncoderConfig
    _no_split_modules = ["TextLayer", "ViTLayer"]

    def __init__(self, config):
        super().__init__(config, config.hidden_size)
        if config.has_text:
            self.text_encoder = TextEncoder(config)
        if config.generates:
            self.fusion = Fusion(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_encoder.embed_tokens if self.config.has_text else None

    def set_input_embeddings(self, value):
        self.text_encoder.embed_tokens = value

    def get_output_embeddings(self):
        return None  # the head is the text embedding

    def embed_texts(self, states, attention_mask):
        """Embeddings [B, E] of texts from the encoder's states [B, T, C]: each row's last."""
        return self.text_projection(last_token(states, attention_mask)).float()

    def get_text_features(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        """Embeddings [B, E] of whole texts, which end with the end of the document."""
        self.check_features(kwargs)
        self._needs(self.config.contrasts, "embeds no texts for comparison")
        position_ids, mask = positions_and_mask(input_ids, attention_mask, position_ids, past=0)
        return self.embed_texts(self.text_encoder(input_ids, position_ids, mask, None), attention_mask)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        image_mask=None,
        patch_noise=None,
        media_memory=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """What the model has of: logits [B, T, vocabulary] (and with `labels` [B, T] the mean next-token loss),
        embeddings of images and texts, and, with `patch_noise` [B, P], the prediction of masked autoencoding.

        `media_memory`, the output of `encode_media`, may take the place of the images. A phase `mae` reads no text.
        The cache comes as `past_key_values` or `cache`, two names of one argument. With Trainer's `num_items_in_batch`
        the loss is the sum over that number.

        Raises:
            TypeError: an argument that would be ignored.
            ValueError: a cache of another kind, or tokens that it should hold and does not.
        """
        self.check_arguments(kwargs)
        found = {}
        if patch_noise is not None:
            found["mae_prediction"] = self.reconstruct(pixel_values, patch_noise)
        if not self.config.has_text:
            return self.output(found, return_dict)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache, past = begin(past_key_values, cache, use_cache, self.config.fusion["num_layers"])
        position_ids, mask = positions_and_mask(
            input_ids, attention_mask, position_ids, past, cache_position=kwargs.get("cache_position")
        )
        memory, memory_mask = None, cache.memory_mask if past > 0 else None
        if past == 0:
            memory, memory_mask = media_memory or self.encode_media(pixel_values, image_mask)
            if cache is not None:
                cache.memory_mask = memory_mask
        states = self.text_encoder(input_ids, position_ids, mask, cache)
        if self.config.contrasts and past == 0:
            found["text_embeds"] = self.embed_texts(states, attention_mask)
            found["image_embeds"] = None if memory is None else self.embed_images(memory)
        if self.config.generates:
            states = self.fusion(states, mask, cache, past, memory, memory_mask)
            states = kept_states(states, logits_to_keep)
            logits = found["logits"] = F.linear(states, self.text_encoder.embed_tokens.weight)
            if labels is not None:
                found["loss"] = next_token_loss(logits, labels, num_items_in_batch)
        return self.output(found | {CACHE: cache}, return_dict)


__all__ = ["DualEncoderConfig", "DualEncoderModel"]
