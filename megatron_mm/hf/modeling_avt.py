"""AVT in plain torch for transformers: Swin and Conformer encoders, fusion of both, a decoder that reads the fusion.

Images and clips become vision memory, waveforms audio memory; fusion layers let each modality read the other; together
they are the memory that every decoder layer reads. The decoder is causal where it generates, and sees both sides where
it finds masked tokens. One row of a batch is one text with at most one image or clip and one sound; what a row lacks
gives exactly zero. It needs torch and transformers only, and serves as the reference for the training code.

Shapes: B rows, T tokens, V and A memory positions of sight and sound, F frames of a clip, N samples, H width of fusion,
C width of the decoder, E width of the shared space.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin

from .configuration_avt import AVTConfig
from .conformer import ConformerModel
from .exported_model import CACHE, ExportedModel, MemoryGeneration, begin
from .swin import SwinTower
from .text_layers import (
    DecoderLayer,
    MemoryAttention,
    RMSNorm,
    RotaryAttention,
    SwiGLU,
    cached_memory,
    contrastive_logits,
    initialize,
    kept_states,
    media_mask,
    memory_masks,
    next_token_loss,
    positions_and_mask,
    rotary_tables,
    spread_rows,
    token_loss,
)


class AVTFusionLayer(nn.Module):
    """One modality's self-attention, attention to the other modality, and MLP."""

    def __init__(self, fusion):
        super().__init__()
        size, eps = fusion["hidden_size"], fusion["layernorm_epsilon"]
        heads, groups = fusion["num_attention_heads"], fusion["num_query_groups"]
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = RotaryAttention(size, heads, groups)
        self.cross_attn_layernorm = RMSNorm(size, eps)
        self.cross_attn = MemoryAttention(size, heads, groups, size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, fusion["ffn_hidden_size"])

    def forward(self, x, own_mask, other, other_mask):
        """States [B, L, H] whose positions exist [B, L], the other modality's [B, M, H] and [B, M], or None."""
        mask, _ = memory_masks(own_mask, x.dtype)
        x = x + self.self_attn(self.input_layernorm(x), None, mask, None)
        if other is not None:
            keys_and_values = self.cross_attn.project_memory(other)
            masks = memory_masks(other_mask, x.dtype)
            x = x + self.cross_attn(self.cross_attn_layernorm(x), *keys_and_values, *masks)
        return x + self.mlp(self.post_attention_layernorm(x))


class AVTFusion(nn.Module):
    """Both encoders' memories to one, of the decoder's width."""

    def __init__(self, config, vision_size):
        super().__init__()
        fusion = config.fusion
        size = fusion["hidden_size"]
        self.vision_projection = nn.Linear(vision_size, size, bias=False)
        self.audio_projection = nn.Linear(config.audio["hidden_size"], size, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: AVTFusionLayer(fusion) for name in ("vision", "audio")})
            for _ in range(fusion["num_layers"])
        )
        self.norm = RMSNorm(size, fusion["layernorm_epsilon"])
        self.projection = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, vision, seen, audio, heard):
        """Vision [B, V, ·] where it exists [B, V], audio [B, A, ·] and [B, A], each or None -> memory [B, V + A, C] and
        where it exists, or None twice."""
        states = {"vision": vision, "audio": audio}
        masks = {"vision": seen, "audio": heard}
        projections = {"vision": self.vision_projection, "audio": self.audio_projection}
        states = {name: None if x is None else projections[name](x) for name, x in states.items()}
        for layer in self.layers:
            before = dict(states)
            for name, other in (("vision", "audio"), ("audio", "vision")):
                if before[name] is not None:
                    states[name] = layer[name](before[name], masks[name], before[other], masks[other])
        present = [name for name, x in states.items() if x is not None]
        if not present:
            return None, None
        both = torch.cat([states[name] for name in present], dim=1)
        return self.projection(self.norm(both)), torch.cat([masks[name] for name in present], dim=1)


class AVTDecoderLayer(DecoderLayer):
    """Llama's layer with attention to the memory between self-attention and MLP."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        size, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.cross_attn_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.cross_attn = MemoryAttention(size, heads, groups, size)

    def forward(self, x, rotary, mask, cache, memory):
        """`memory`: keys, values, mask and reads as MemoryAttention takes them; None: nothing is read."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        if memory is not None:
            x = x + self.cross_attn(self.cross_attn_layernorm(x), *memory)
        return x + self.mlp(self.post_attention_layernorm(x))


class AVTDecoder(nn.Module):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AVTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, rotary, mask, cache, past, memory, memory_mask):
        """Tokens [B, T] and memory [B, M, C] where it exists [B, M] (None: nowhere) -> [B, T, C]."""
        x = self.embed_tokens(input_ids)
        masks = None if memory_mask is None else memory_masks(memory_mask, x.dtype)
        for number, layer in enumerate(self.layers):
            read = None
            if masks is not None:
                read = (*cached_memory(cache, number, past, layer.cross_attn.project_memory, memory), *masks)
            x = layer(x, rotary, mask, cache, read)
        return self.norm(x)


class AVTModel(ExportedModel, MemoryGeneration, GenerationMixin):
    """Descriptions and answers (`generate`), masked tokens found, embeddings of sight and sound."""

    config_class = AVTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("text", "image", "video", "audio")
    media_inputs = ("pixel_values", "image_mask", "pixel_values_videos", "video_mask", "input_values", "sound_mask")
    _no_split_modules = ["AVTDecoderLayer", "AVTFusionLayer", "SwinLayer", "ConformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vision, audio = config.vision, config.audio
        self.vision_tower = SwinTower(**{name: value for name, value in vision.items() if name != "image_size"})
        self.audio_tower = ConformerModel(
            num_hidden_layers=audio["num_layers"],
            hidden_size=audio["hidden_size"],
            num_attention_heads=audio["num_attention_heads"],
            intermediate_size=audio["ffn_hidden_size"],
            conv_depthwise_kernel_size=audio["conv_kernel_size"],
            conv_dim=audio["front_channels"],
            conv_kernel=audio["front_kernels"],
            conv_stride=audio["front_strides"],
            layer_norm_eps=audio["layernorm_epsilon"],
        )
        vision_size = vision["embed_dim"] * 2 ** (len(vision["depths"]) - 1)
        if config.contrasts:
            shared = config.contrastive["embedding_size"]
            self.vision_projection = nn.Linear(vision_size, shared, bias=False)
            self.audio_projection = nn.Linear(audio["hidden_size"], shared, bias=False)
            self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.contrastive["temperature"])))
        if config.has_text:
            self.fusion = AVTFusion(config, vision_size)
            self.model = AVTDecoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        initialize(module, self.config.initializer_range)

    def get_input_embeddings(self):
        return self.model.embed_tokens if self.config.has_text else None

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head if self.config.has_text else None

    def set_output_embeddings(self, value):
        self.lm_head = value

    # ------------------------------------------------------------------------------------------------------- media

    def see(self, pixel_values=None, image_mask=None, pixel_values_videos=None, video_mask=None):
        """Images [B, 3, size, size] of the rows that have one, clips [B, F, 3, size, size] of others -> vision memory
        [B, V, ·], zero where there is none, and which of its positions exist [B, V]; or None twice."""
        parts = []
        for name, values, mask in (
            ("image_mask", pixel_values, image_mask),
            ("video_mask", pixel_values_videos, video_mask),
        ):
            if values is not None:
                mask = media_mask(name, mask, values)
                if mask.any():
                    memory = spread_rows(self.vision_tower(values[mask]), mask)
                    parts.append((memory, mask[:, None].expand(-1, memory.shape[1])))
        if not parts:
            return None, None
        longest = max(memory.shape[1] for memory, _ in parts)
        memory = sum(F.pad(memory, (0, 0, 0, longest - memory.shape[1])) for memory, _ in parts)
        seen = torch.stack([F.pad(mask, (0, longest - mask.shape[1])) for _, mask in parts])
        if (seen.sum(dim=0) > 1).any():
            raise ValueError("a row has both an image and a video; it has place for one")
        return memory, seen.any(dim=0)

    def hear(self, input_values=None, sound_mask=None):
        """Waveforms [B, N] of the rows that have one -> audio memory [B, A, ·] and where it exists [B, A], or None
        twice."""
        if input_values is None:
            return None, None
        mask = media_mask("sound_mask", sound_mask, input_values)
        if not mask.any():
            return None, None
        memory = spread_rows(self.audio_tower(input_values[mask]), mask)
        return memory, mask[:, None].expand(-1, memory.shape[1])

    def encode_media(
        self,
        pixel_values=None,
        image_mask=None,
        pixel_values_videos=None,
        video_mask=None,
        input_values=None,
        sound_mask=None,
    ):
        """Run encoders and fusion once: memory [B, M, C] of the decoder and which of its positions exist [B, M], or
        None twice where no row has media."""
        vision = self.see(pixel_values, image_mask, pixel_values_videos, video_mask)
        return self.fusion(*vision, *self.hear(input_values, sound_mask))

    def embed_vision(self, memory, seen):
        """Embeddings [B, E] of images and clips: the mean of the positions that exist, projected."""
        weights = seen.to(memory.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return self.vision_projection(torch.einsum("bv,bvc->bc", weights, memory)).float()

    def embed_audio(self, memory):
        """Embeddings [B, E] of sounds."""
        return self.audio_projection(memory.mean(dim=1)).float()

    def get_image_features(self, pixel_values, image_mask=None, **kwargs):
        """Embeddings [B, E] of images; zero in rows without one."""
        self.check_features(kwargs)
        return self._features(self.see(pixel_values, image_mask), pixel_values)

    def get_video_features(self, pixel_values_videos, video_mask=None, **kwargs):
        """Embeddings [B, E] of clips; zero in rows without one."""
        self.check_features(kwargs)
        vision = self.see(pixel_values_videos=pixel_values_videos, video_mask=video_mask)
        return self._features(vision, pixel_values_videos)

    def get_audio_features(self, input_values, sound_mask=None, **kwargs):
        """Embeddings [B, E] of sounds; zero in rows without one."""
        self.check_features(kwargs)
        return self._features(self.hear(input_values, sound_mask), input_values, audio=True)

    def _features(self, tower, values, audio=False):
        if not self.config.contrasts:
            raise ValueError("this AVTModel embeds nothing for comparison: it was trained without that objective")
        memory, mask = tower
        if memory is None:
            return values.new_zeros(len(values), self.config.contrastive["embedding_size"])
        return self.embed_audio(memory) if audio else self.embed_vision(memory, mask)

    def similarity(self, vision_embeds, audio_embeds):
        """Scaled cosines [visions, sounds] of embeddings, the logits of the contrastive loss."""
        return contrastive_logits(vision_embeds, audio_embeds, self.logit_scale, self.config.contrastive["max_scale"])

    # -------------------------------------------------------------------------------------------------------- text

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        image_mask=None,
        pixel_values_videos=None,
        video_mask=None,
        input_values=None,
        sound_mask=None,
        media_memory=None,
        bidirectional=False,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """What the model has of: embeddings of sight and sound, and logits [B, T, vocabulary].

        Args:
            media_memory: the output of `encode_media`, in place of the media.
            bidirectional: tokens see both sides, and logits are of the tokens themselves, where some are the mask
                (`config.mask_token_id`); otherwise of the next tokens.
            labels: [B, T] tokens, -100 is not counted; they are shifted here unless `bidirectional`.
            past_key_values, cache: two names of one argument.
            num_items_in_batch: as Trainer gives it; the loss is the sum over that number.

        Raises:
            TypeError: an argument that would be ignored.
            ValueError: a cache of another kind, or tokens that it should hold and does not.
        """
        self.check_arguments(kwargs)
        found = {}
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache, past = begin(past_key_values, cache, use_cache and not bidirectional, self.config.num_hidden_layers)
        if past == 0 and media_memory is None:
            vision = self.see(pixel_values, image_mask, pixel_values_videos, video_mask)
            audio = self.hear(input_values, sound_mask)
            if self.config.contrasts:
                found["vision_embeds"] = None if vision[0] is None else self.embed_vision(*vision)
                found["audio_embeds"] = None if audio[0] is None else self.embed_audio(audio[0])
            if self.config.has_text:
                media_memory = self.fusion(*vision, *audio)
        if not self.config.has_text:
            return self.output(found, return_dict)
        memory, memory_mask = (None, cache.memory_mask) if past > 0 else media_memory
        if cache is not None and past == 0:
            cache.memory_mask = memory_mask
        position_ids, mask = positions_and_mask(
            input_ids, attention_mask, position_ids, past, not bidirectional, kwargs.get("cache_position")
        )
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, self.dtype)
        states = self.model(input_ids, rotary, mask, cache, past, memory, memory_mask)
        logits = found["logits"] = self.lm_head(kept_states(states, logits_to_keep))
        if labels is not None:
            loss = token_loss if bidirectional else next_token_loss
            found["loss"] = loss(logits, labels, num_items_in_batch)
        return self.output(found | {CACHE: cache}, return_dict)


__all__ = ["AVTConfig", "AVTModel"]
