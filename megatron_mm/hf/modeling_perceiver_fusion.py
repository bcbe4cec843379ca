"""PerceiverFusion in plain torch for transformers: image and text towers, and latents that read both.

`pixel_values` pass a vision transformer, tokens a Transformer-XL; learned latents read the two memories together again
and again (Perceiver IO, arXiv:2107.14795). The mean latent says whether image and text belong together, and one output
query a token predicts what a mask hides. Rows are padded on the right, because segments are counted from their start.
One row of a batch is one text with at most one image. It needs torch and transformers only, and serves as the reference
for the training code.

Shapes: B rows, T tokens, M memory positions of an image, C width of both towers, L latents, D their width, E width of
the shared space.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_perceiver_fusion import PerceiverFusionConfig
from .exported_model import ExportedModel  # noqa: F401 # transformers before 5.6 copies only what this file itself imports
from .image_text import ImageTextModel
from .perceiver import PerceiverQueries, PerceiverTower
from .text_layers import token_loss
from .transformer_xl import TransformerXLTower
from .vit import ViTTower  # noqa: F401 # transformers before 5.6 copies only what this file itself imports


class PerceiverFusionModel(ImageTextModel):
    """Embeddings of images and texts, matching of both, and masked language modelling with an image."""

    config_class = PerceiverFusionConfig
    _no_split_modules = ["PerceiverCrossLayer", "PerceiverSelfLayer", "TransformerXLLayer", "ViTLayer"]

    def __init__(self, config):
        super().__init__(config, config.hidden_size)
        self.text_tower = TransformerXLTower(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            ffn_hidden_size=config.intermediate_size,
            segment_length=config.segment_length,
            vocab_size=config.vocab_size,
            layernorm_epsilon=config.layer_norm_eps,
        )
        latent, eps = config.perceiver, config.perceiver["layernorm_epsilon"]
        size = latent["hidden_size"]
        self.matches, self.predicts = config.matching_weight > 0, config.masked_lm_weight > 0
        if self.matches or self.predicts:
            self.perceiver = PerceiverTower(**latent, memory_width=config.hidden_size)
        if self.matches:
            self.match_norm = nn.LayerNorm(size, eps=eps)
            self.match_projection = nn.Linear(size, 2, bias=False)
        if self.predicts:
            shape = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "layernorm_epsilon")
            self.queries = PerceiverQueries(num_queries=config.max_positions, **{name: latent[name] for name in shape})
            self.lm_norm = nn.LayerNorm(size, eps=eps)
            self.lm_projection = nn.Linear(size, config.hidden_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_tower.embed_tokens

    def set_input_embeddings(self, value):
        self.text_tower.embed_tokens = value

    def get_output_embeddings(self):
        return None  # the head is the text embedding

    def encode_text(self, input_ids, attention_mask=None):
        """Tokens [B, T], mask [B, T] -> states of whole segments [B, T', C] and their mask [B, T'] (T' ≥ T).

        Raises:
            ValueError: rows are padded on the left, or longer than the model has output queries.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not (mask[:, 1:] <= mask[:, :-1]).all():
            raise ValueError("attention_mask has padding before text; this model is padded on the right")
        length = input_ids.shape[1]
        if self.predicts and length > self.config.max_positions:
            raise ValueError(f"a row has {length} tokens; this model has {self.config.max_positions} output queries")
        missing = -length % self.config.segment_length
        ids, mask = F.pad(input_ids, (0, missing), value=self.config.pad_token_id), F.pad(mask, (0, missing))
        return self.text_tower(ids, mask), mask

    def embed_texts(self, states, mask):
        """Embeddings [B, E] of texts: the mean state of their tokens, projected."""
        weights = mask.to(states.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return self.text_projection(torch.einsum("bt,btc->bc", weights, states)).float()

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        """Embeddings [B, E] of texts."""
        self.check_features(kwargs)
        self._needs(self.config.contrasts, "embeds no texts for comparison")
        return self.embed_texts(*self.encode_text(input_ids, attention_mask))

    def fuse(self, memory, memory_mask, states, mask):
        """Latents [B, L, D] that have read image memory [B, M, C] where it exists [B, M] (None: no image) and text."""
        if memory is not None:
            states, mask = torch.cat([memory, states], dim=1), torch.cat([memory_mask.to(mask.dtype), mask], dim=1)
        return self.perceiver(states, mask)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_mask=None,
        media_memory=None,
        labels=None,
        return_dict=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """What the model has of: embeddings of images and texts and match_logits, of texts as they are, and logits
        [B, T, vocabulary] of every token, of texts in which some are the mask (`config.mask_token_id`).

        `labels` [B, T] holds the hidden tokens, -100 elsewhere. `media_memory`, the output of `encode_media`, may take
        the place of the images. With Trainer's `num_items_in_batch` the loss is the sum over that number.

        Raises:
            TypeError: an argument that would be ignored.
        """
        self.check_arguments(kwargs)
        found = {}
        memory, memory_mask = media_memory or self.encode_media(pixel_values, image_mask)
        states, mask = self.encode_text(input_ids, attention_mask)
        if self.config.contrasts:
            found["text_embeds"] = self.embed_texts(states, mask)
            found["image_embeds"] = None if memory is None else self.embed_images(memory)
        if self.matches or self.predicts:
            latents = self.fuse(memory, memory_mask, states, mask)
        if self.matches:
            found["match_logits"] = self.match_projection(self.match_norm(latents.mean(dim=1))).float()
        if self.predicts:
            read = self.lm_norm(self.queries(latents))[:, : input_ids.shape[1]]
            logits = found["logits"] = F.linear(self.lm_projection(read), self.text_tower.embed_tokens.weight)
            if labels is not None:
                found["loss"] = token_loss(logits, labels, num_items_in_batch)
        return self.output(found, return_dict)


__all__ = ["PerceiverFusionConfig", "PerceiverFusionModel"]
