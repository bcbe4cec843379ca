"""Synapse in plain torch for transformers: a Llama decoder that reads images, video frames and sounds.

Data flows from `pixel_values` through a CLIP vision transformer and from `input_features` through a Whisper encoder
into two memories; tanh-gated cross-attention sublayers (Flamingo, arXiv:2204.14198) before every
`cross_attention_every`-th decoder layer read both. One row of a batch is one document with its own media: rows without
media get exactly zero from cross-attention. Part of every exported folder: it needs torch and transformers only, and
serves as the reference that the training code is compared with.

Shapes: B rows, T tokens, K image slots, J sound slots, M memory positions of a row, H hidden, d head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_synapse import SynapseConfig
from .exported_model import CACHE, ExportedModel, MemoryCache, MemoryGeneration, begin
from .text_layers import (
    DecoderLayer,
    RMSNorm,
    attend,
    cached_memory,
    initialize,
    join_heads,
    kept_states,
    next_token_loss,
    positions_and_mask,
    rotary_tables,
    split_heads,
)

# ------------------------------------------------------------------------------------------------------------ towers


class SynapseTowerAttention(nn.Module):
    """Bidirectional self-attention of both towers; Whisper's keys have no bias."""

    def __init__(self, hidden_size, num_heads, key_bias):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=key_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = (split_heads(f(x), self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join_heads(attend(q, k, v)))


class SynapseVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, patch = config.vision_hidden_size, config.vision_patch_size
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.vision_tokens, size)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class SynapseVisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.vision_hidden_size, config.vision_intermediate_size)
        self.fc2 = nn.Linear(config.vision_intermediate_size, config.vision_hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class SynapseVisionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.vision_hidden_size
        self.self_attn = SynapseTowerAttention(size, config.vision_num_attention_heads, key_bias=True)
        self.layer_norm1 = nn.LayerNorm(size, eps=1e-5)
        self.mlp = SynapseVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(size, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SynapseVisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(SynapseVisionLayer(config) for _ in range(config.vision_num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class SynapseVisionTower(nn.Module):
    """CLIP's vision transformer without its last norm, and a table of frame positions for video."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = SynapseVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.vision_hidden_size, eps=1e-5)
        self.encoder = SynapseVisionEncoder(config)
        self.temporal_embedding = nn.Embedding(config.vision_max_frames, config.vision_hidden_size)

    def forward(self, pixel_values, frames):
        """Images [I, 3, size, size] and their frame numbers [I] (-1: a still) -> memory [I, 1 + patches, C]."""
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        positions = self.temporal_embedding(frames.clamp(min=0))
        return hidden + (positions * (frames >= 0)[:, None].to(positions.dtype))[:, None]


def sinusoids(length, channels, device):
    """Whisper's fixed positions, [length, channels], float32."""
    step = math.log(10000) / (channels // 2 - 1)
    inverse = torch.exp(-step * torch.arange(channels // 2, device=device))
    angles = torch.arange(length, device=device)[:, None] * inverse
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SynapseAudioLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.audio_hidden_size
        self.self_attn = SynapseTowerAttention(size, config.audio_num_attention_heads, key_bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=1e-5)
        self.fc1 = nn.Linear(size, config.audio_intermediate_size)
        self.fc2 = nn.Linear(config.audio_intermediate_size, size)
        self.final_layer_norm = nn.LayerNorm(size, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class SynapseAudioTower(nn.Module):
    """Whisper's encoder."""

    def __init__(self, config):
        super().__init__()
        size = config.audio_hidden_size
        self.conv1 = nn.Conv1d(config.audio_num_mel_bins, size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(SynapseAudioLayer(config) for _ in range(config.audio_num_hidden_layers))
        self.layer_norm = nn.LayerNorm(size, eps=1e-5)
        self._positions = None  # computed at first use: buffers do not survive construction on the meta device

    def forward(self, input_features):
        """Log-mel spectrograms [A, mels, frames] -> memory [A, frames / 2, C]."""
        x = F.gelu(self.conv1(input_features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        positions = self._positions
        if positions is None or positions.shape != x.shape[1:] or positions.device != x.device:
            positions = self._positions = sinusoids(x.shape[1], x.shape[2], x.device)
        x = x + positions.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


# ------------------------------------------------------------------------------------------------------ cross-attention


class SynapseCrossAttention(nn.Module):
    """Grouped-query attention of text on image and sound memory, one softmax over both."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.cross_attention_num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj_image = nn.Linear(config.vision_hidden_size, kv_size, bias=False)
        self.v_proj_image = nn.Linear(config.vision_hidden_size, kv_size, bias=False)
        self.k_proj_audio = nn.Linear(config.audio_hidden_size, kv_size, bias=False)
        self.v_proj_audio = nn.Linear(config.audio_hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qk_norm = config.cross_attention_qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project_memory(self, image_memory, audio_memory):
        """Memories [B, M_image, C_image] and [B, M_audio, C_audio] (or None) -> keys and values [B, groups, M, d]."""
        keys, values = [], []
        if image_memory is not None:
            keys.append(self.k_proj_image(image_memory))
            values.append(self.v_proj_image(image_memory))
        if audio_memory is not None:
            keys.append(self.k_proj_audio(audio_memory))
            values.append(self.v_proj_audio(audio_memory))
        keys, values = (split_heads(torch.cat(x, dim=1), self.head_dim) for x in (keys, values))
        return (self.k_norm(keys) if self.qk_norm else keys), values

    def forward(self, x, keys, values, mask):
        q = split_heads(self.q_proj(x), self.head_dim)
        if self.qk_norm:
            q = self.q_norm(q)
        return self.o_proj(join_heads(attend(q, keys, values, mask)))


class SynapseCrossLayer(nn.Module):
    """x + tanh(gate) · cross-attention(norm(x)), exactly x where a row has no media."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = SynapseCrossAttention(config)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, keys, values, mask, reads):
        """`mask` [B, 1, 1, M] marks memory to read (None: all of it); `reads` [B, T, 1] is 1 where a token reads."""
        return x + self.gate.tanh() * reads * self.cross_attn(self.input_layernorm(x), keys, values, mask)


class SynapsePreTrainedModel(ExportedModel):
    config_class = SynapseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "image", "audio")
    _no_split_modules = ["DecoderLayer", "SynapseCrossLayer", "SynapseVisionLayer", "SynapseAudioLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module):
        initialize(module, self.config.initializer_range)
        if isinstance(module, SynapseCrossLayer):
            nn.init.zeros_(module.gate)
        if isinstance(module, SynapseVisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=self.config.initializer_range)
        if isinstance(module, SynapseVisionTower):
            nn.init.zeros_(module.temporal_embedding.weight)


class SynapseModel(SynapsePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.cross_layers = nn.ModuleList(SynapseCrossLayer(config) for _ in range(config.num_cross_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_tower = SynapseVisionTower(config)
        self.audio_tower = SynapseAudioTower(config)
        self.post_init()

    def encode_media(self, pixel_values=None, image_mask=None, image_frames=None, input_features=None, sound_mask=None):
        """Run the towers once.

        Args:
            pixel_values: normalised images and video frames, [B, K, 3, size, size].
            image_mask: [B, K], true where a slot holds an image; None: every slot does.
            image_frames: [B, K], frame number within its video, -1 for a still image; None: all still.
            input_features: log-mel spectrograms, [B, J, mels, frames].
            sound_mask: [B, J], true where a slot holds a sound; None: every slot does.

        Returns:
            image memory [B, K·tokens, C_image] or None, audio memory [B, J·tokens, C_audio] or None, and the mask
            [B, M] of memory positions that hold something, or None where neither memory exists.
        """
        image_memory, audio_memory, masks = None, None, []
        if pixel_values is not None:
            slots = pixel_values.shape[:2]
            mask = self._slot_mask("image_mask", image_mask, slots, pixel_values.device)
            if image_frames is None:
                image_frames = torch.full(slots, -1, device=pixel_values.device)
            if mask.any():
                image_memory = self._scatter(self.vision_tower(pixel_values[mask], image_frames[mask]), mask)
                masks.append(mask.repeat_interleave(self.config.vision_tokens, dim=1))
        if input_features is not None:
            mask = self._slot_mask("sound_mask", sound_mask, input_features.shape[:2], input_features.device)
            if mask.any():
                audio_memory = self._scatter(self.audio_tower(input_features[mask]), mask)
                masks.append(mask.repeat_interleave(audio_memory.shape[1] // mask.shape[1], dim=1))
        return image_memory, audio_memory, torch.cat(masks, dim=1) if masks else None

    @staticmethod
    def _slot_mask(name, mask, slots, device):
        if mask is None:
            return torch.ones(slots, dtype=torch.bool, device=device)
        if mask.shape != slots:
            raise ValueError(f"{name} has shape {list(mask.shape)}; the media have slots {list(slots)}")
        return mask.bool()

    @staticmethod
    def _scatter(memory, mask):
        """Memories of the filled slots [N, tokens, C] -> [B, slots·tokens, C], zero in empty slots."""
        if mask.all():
            return memory.reshape(mask.shape[0], -1, memory.shape[-1])
        full = memory.new_zeros(*mask.shape, *memory.shape[1:])
        full[mask] = memory
        return full.flatten(1, 2)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        image_mask=None,
        image_frames=None,
        input_features=None,
        sound_mask=None,
        media_memory=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        """The last states [B, T, H] and the cache. Arguments as of SynapseForCausalLM."""
        self.check_arguments(kwargs)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        batch, length = input_ids.shape
        cache, past = begin(past_key_values, cache, use_cache, self.config.num_cross_layers)
        position_ids, mask = positions_and_mask(
            input_ids, attention_mask, position_ids, past, cache_position=kwargs.get("cache_position")
        )

        if cache is not None and past > 0:
            memory_mask = cache.memory_mask
            image_memory = audio_memory = None
        else:
            if media_memory is None:
                media_memory = self.encode_media(pixel_values, image_mask, image_frames, input_features, sound_mask)
            image_memory, audio_memory, memory_mask = media_memory
            if cache is not None:
                cache.memory_mask = memory_mask
        reads = cross_mask = None
        if memory_mask is not None:
            has_media = memory_mask.any(dim=1, keepdim=True)
            # A row without media reads everything and multiplies it by zero: an all-masked softmax would be NaN.
            cross_mask = None if memory_mask.all() else (memory_mask | ~has_media)[:, None, None]

        hidden = self.embed_tokens(input_ids)
        if memory_mask is not None:
            reads = has_media.expand(batch, length)
            if attention_mask is not None:
                reads = reads & attention_mask[:, -length:].bool()
            reads = reads[..., None].to(hidden.dtype)
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)

        for index, layer in enumerate(self.layers):
            if memory_mask is not None and index % self.config.cross_attention_every == 0:
                number = index // self.config.cross_attention_every
                cross = self.cross_layers[number]
                project = cross.cross_attn.project_memory
                keys, values = cached_memory(cache, number, past, project, image_memory, audio_memory)
                hidden = cross(hidden, keys, values, cross_mask, reads)
            hidden = layer(hidden, rotary, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})


class SynapseForCausalLM(SynapsePreTrainedModel, MemoryGeneration, GenerationMixin):
    """Next-token prediction from text, images, video frames and sounds; see `SynapseModel.encode_media` for media."""

    media_inputs = ("pixel_values", "image_mask", "image_frames", "input_features", "sound_mask")

    def __init__(self, config):
        super().__init__(config)
        self.model = SynapseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def encode_media(self, **media):
        """See SynapseModel.encode_media."""
        return self.model.encode_media(**media)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        image_mask=None,
        image_frames=None,
        input_features=None,
        sound_mask=None,
        media_memory=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits [B, T, vocabulary] and, with `labels` [B, T] (-100 is not counted), the mean next-token loss.

        Labels are the tokens themselves, shifted here. `media_memory`, the output of `encode_media`, may take the
        place of the media. The cache comes as `past_key_values` or `cache`, two names of one argument. With Trainer's
        `num_items_in_batch` the loss is the sum over that number.

        Raises:
            TypeError: an argument that would be ignored.
            ValueError: a cache of another kind, or tokens that it should hold and does not.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            pixel_values=pixel_values,
            image_mask=image_mask,
            image_frames=image_frames,
            input_features=input_features,
            sound_mask=sound_mask,
            media_memory=media_memory,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)})
        return result.to_tuple() if return_dict is False else result


__all__ = ["MemoryCache", "SynapseConfig", "SynapseForCausalLM", "SynapseModel", "SynapsePreTrainedModel"]
