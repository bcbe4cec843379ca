"""VLM in plain torch for transformers: a vision transformer, and a Llama decoder whose upper half reads the image.

`pixel_values` become a memory; tokens pass the lower decoder layers, whose last state of each row is the text embedding
(no image has been seen yet), then blocks of one gated cross-attention layer (Flamingo, arXiv:2204.14198) and several
decoder layers. One row of a batch is one document with at most one image; rows without one get exactly zero from
cross-attention. It needs torch and transformers only, and serves as the reference for the training code.

Shapes: B rows, T tokens, M memory positions of an image, E width of the shared space.
"""

import torch
from torch import nn
from transformers import GenerationMixin

from .configuration_vlm import VLMConfig
from .exported_model import CACHE, MemoryGeneration, begin
from .image_text import ImageTextModel
from .text_layers import (
    DecoderLayer,
    MemoryAttention,
    RMSNorm,
    SwiGLU,
    cached_memory,
    kept_states,
    last_token,
    memory_masks,
    next_token_loss,
    positions_and_mask,
    rotary_tables,
)
from .vit import ViTTower  # noqa: F401 # transformers before 5.6 copies only what this file itself imports


class VLMGatedBlock(nn.Module):
    """Cross-attention and MLP, each behind a tanh gate; a row without an image passes the MLP alone."""

    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.cross_attn = MemoryAttention(
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vision["hidden_size"],
            eps if config.cross_attention["qk_layernorm"] else None,
        )
        self.cross_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, memory):
        """`memory`: keys, values, mask and reads as MemoryAttention takes them; None: no row has an image."""
        if memory is not None:
            x = x + self.cross_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), *memory)
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


class VLMDecoder(nn.Module):
    """The decoder without its head; of a model that only contrasts, its lower layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        layers = range(config.num_hidden_layers if config.generates else config.lower_layers)
        blocks = sum(config.gated_block(index) is not None for index in layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in layers)
        self.cross_layers = nn.ModuleList(VLMGatedBlock(config) for _ in range(blocks))
        if config.generates:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def lower(self, input_ids, rotary, mask, cache):
        """Tokens [B, T] -> states [B, T, C] below the first gated block."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers[: self.config.lower_layers]:
            x = layer(x, rotary, mask, cache)
        return x

    def upper(self, x, rotary, mask, cache, past, memory, memory_mask):
        """The other layers and the final norm, reading memory [B, M, C_image] where it exists [B, M] (None: nowhere)"""
        masks = None if memory_mask is None else memory_masks(memory_mask, x.dtype)
        for index in range(self.config.lower_layers, len(self.layers)):
            number = self.config.gated_block(index)
            if number is not None:
                block, read = self.cross_layers[number], None
                if masks is not None:
                    read = (*cached_memory(cache, number, past, block.cross_attn.project_memory, memory), *masks)
                x = block(x, read)
            x = self.layers[index](x, rotary, mask, cache)
        return self.norm(x)


class VLMModel(ImageTextModel, MemoryGeneration, GenerationMixin):
    """Captions and answers (`generate`), embeddings of images and texts, and masked autoencoding."""

    config_class = VLMConfig
    _no_split_modules = ["DecoderLayer", "VLMGatedBlock", "ViTLayer"]

    def __init__(self, config):
        super().__init__(config, config.hidden_size)
        if config.has_text:
            self.model = VLMDecoder(config)
        if config.contrasts:
            self.text_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.generates:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens if self.config.has_text else None

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head if self.config.generates else None

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _rotary(self, position_ids, dtype):
        return rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, dtype)

    def embed_texts(self, states, attention_mask):
        """Embeddings [B, E] of texts from the states [B, T, C] below the first gated block: each row's last."""
        return self.text_projection(self.text_norm(last_token(states, attention_mask))).float()

    def get_text_features(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        """Embeddings [B, E] of whole texts, which end with the end of the document."""
        self.check_features(kwargs)
        self._needs(self.config.contrasts, "embeds no texts for comparison")
        position_ids, mask = positions_and_mask(input_ids, attention_mask, position_ids, past=0)
        rotary = self._rotary(position_ids, self.dtype)
        return self.embed_texts(self.model.lower(input_ids, rotary, mask, None), attention_mask)

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
        cache, past = begin(past_key_values, cache, use_cache, len(self.model.cross_layers))
        position_ids, mask = positions_and_mask(
            input_ids, attention_mask, position_ids, past, cache_position=kwargs.get("cache_position")
        )
        memory, memory_mask = None, cache.memory_mask if past > 0 else None
        if past == 0:
            memory, memory_mask = media_memory or self.encode_media(pixel_values, image_mask)
            if cache is not None:
                cache.memory_mask = memory_mask
        rotary = self._rotary(position_ids, self.dtype)
        states = self.model.lower(input_ids, rotary, mask, cache)
        if self.config.contrasts and past == 0:
            found["text_embeds"] = self.embed_texts(states, attention_mask)
            found["image_embeds"] = None if memory is None else self.embed_images(memory)
        if self.config.generates:
            states = self.model.upper(states, rotary, mask, cache, past, memory, memory_mask)
            logits = found["logits"] = self.lm_head(kept_states(states, logits_to_keep))
            if labels is not None:
                found["loss"] = next_token_loss(logits, labels, num_items_in_batch)
        return self.output(found | {CACHE: cache}, return_dict)


__all__ = ["VLMConfig", "VLMModel"]
