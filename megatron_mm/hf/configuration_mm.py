"""What the configurations of exported models share. Part of exported folders; needs transformers only.

A configuration is a recipe of megatron_mm: fields of the text part stand flat, under the names that transformers gives
them, the other parts as sections (dicts) under their own names.
"""

from transformers import PreTrainedConfig


class MultimodalConfig(PreTrainedConfig):
    """Preprocessing, special tokens, and what a model can do.

    `seq_length` is the longest row that was trained on, `image_mean` and `image_std` normalise channels, and
    `frames_per_video` says how many frames a clip has.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        initializer_range=0.02,
        seq_length=256,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        frames_per_video=8,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.initializer_range = initializer_range
        self.seq_length = seq_length
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.frames_per_video = frames_per_video
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def has_text(self):
        """Whether the model reads text; a phase `mae` is an image tower alone."""
        return getattr(self, "phase", "joint") == "joint"

    @property
    def generates(self):
        """Whether the model generates text."""
        return self.has_text and getattr(self, "causal_lm_weight", 0.0) > 0

    @property
    def longest_text(self):
        """Most tokens of a text, prompt and answer together, where positions are a table; None: no limit."""
        return None

    @property
    def contrasts(self):
        """Whether the model embeds its media for comparison."""
        return self.has_text and self.contrastive_weight > 0

    @property
    def reconstructs(self):
        """Whether the model has the decoder of masked autoencoding."""
        return not self.has_text or getattr(self, "mae_weight", 0.0) > 0

    @property
    def inputs(self):
        """What the processor must know; see processing_mm.py."""
        return {
            "packed": False,
            "image_size": self.vision["image_size"],
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "video": "none",
            "frames_per_video": self.frames_per_video,
            "sound": "none",
            "padding_side": "left",
            "row_multiple": 1,
            "row_length": self.seq_length,
        }
