"""What exported models of images and texts share: the image tower, the space of both, masked autoencoding.

One row of a batch is one document with at most one image. It needs torch and transformers only.

Shapes: B rows, M = 1 + P memory positions of an image (the class token and its patches), C width of the tower, E width
of the shared space.
"""

import math

import torch
from torch import nn

from .exported_model import ExportedModel
from .text_layers import contrastive_logits, initialize, media_mask, spread_rows
from .vit import MAEDecoder, ViTTower


class ImageTextModel(ExportedModel):
    """The image side, and the comparison of both.

    A model has `image_projection`, `text_projection` and `logit_scale` where its configuration contrasts, `mae_decoder`
    where it reconstructs.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("text", "image")
    media_inputs = ("pixel_values", "image_mask")
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config, text_size):
        super().__init__(config)
        vision = config.vision
        self.vision_tower = ViTTower(**vision)
        if config.reconstructs:
            sizes = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
            same = ("patch_size", "image_size", "layernorm_epsilon")
            self.mae_decoder = MAEDecoder(
                tower_hidden_size=vision["hidden_size"],
                **{name: config.mae[name] for name in sizes},
                **{name: vision[name] for name in same},
            )
        if config.contrasts:
            shared = config.contrastive["embedding_size"]
            self.image_projection = nn.Linear(vision["hidden_size"], shared, bias=False)
            self.text_projection = nn.Linear(text_size, shared, bias=False)
            self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.contrastive["temperature"])))

    def _init_weights(self, module):
        initialize(module, self.config.initializer_range)

    def encode_media(self, pixel_values=None, image_mask=None):
        """Run the image tower once.

        Args:
            pixel_values: normalised images [B, 3, size, size].
            image_mask: [B], true in rows that have an image; None: all have.

        Returns:
            memory [B, M, C], zero in rows without an image, and which of its positions exist [B, M]; or None twice
            where no row has an image.
        """
        if pixel_values is None:
            return None, None
        mask = media_mask("image_mask", image_mask, pixel_values)
        if not mask.any():
            return None, None
        memory = spread_rows(self.vision_tower(pixel_values[mask]), mask)
        return memory, mask[:, None].expand(-1, memory.shape[1])

    def embed_images(self, memory):
        """Embeddings [B, E] of images from their memory: the mean of the patches, projected."""
        return self.image_projection(memory[:, 1:].mean(dim=1)).float()

    def get_image_features(self, pixel_values, image_mask=None, **kwargs):
        """Embeddings [B, E] of images; zero in rows without one."""
        self.check_features(kwargs)
        self._needs(self.config.contrasts, "embeds no images for comparison")
        memory, _ = self.encode_media(pixel_values, image_mask)
        if memory is None:
            return pixel_values.new_zeros(len(pixel_values), self.config.contrastive["embedding_size"])
        return self.embed_images(memory)

    def similarity(self, image_embeds, text_embeds):
        """Scaled cosines [images, texts] of embeddings, the logits of the contrastive loss."""
        return contrastive_logits(image_embeds, text_embeds, self.logit_scale, self.config.contrastive["max_scale"])

    def reconstruct(self, pixel_values, patch_noise):
        """Masked autoencoding: the pixels of all patches [B, P, pixels of a patch] from those with the least noise.

        Args:
            pixel_values: [B, 3, size, size].
            patch_noise: [B, P], in whose order patches are kept.
        """
        self._needs(self.config.reconstructs, "has no decoder of masked autoencoding")
        patches = patch_noise.shape[1]
        visible = int(patches * (1 - self.config.mae["mask_ratio"]))
        return self.mae_decoder(self.vision_tower(pixel_values, patch_noise, visible), patch_noise)

    def _needs(self, there, what):
        if not there:
            raise ValueError(f"this {type(self).__name__} {what}: it was trained without that objective")
