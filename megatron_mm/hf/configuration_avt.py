"""Configuration of an exported AVT. Part of every exported folder; needs transformers only."""

from .configuration_mm import MultimodalConfig


class AVTConfig(MultimodalConfig):
    """Fields without a section describe the decoder and carry Llama's names; `vision` is the Swin encoder of images and
    clips, `audio` the Conformer on waveforms, `fusion` the layers in which each reads the other, `contrastive` the
    space that sight and sound share.
    """

    model_type = "avt"

    def __init__(
        self,
        vocab_size=50176,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        vision=None,
        audio=None,
        fusion=None,
        contrastive=None,
        contrastive_weight=1.0,
        masked_lm_weight=1.0,
        generation_weight=1.0,
        masked_lm_share=0.5,
        mask_ratio=0.15,
        mask_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.vision = vision
        self.audio = audio
        self.fusion = fusion
        self.contrastive = contrastive
        self.contrastive_weight = contrastive_weight
        self.masked_lm_weight = masked_lm_weight
        self.generation_weight = generation_weight
        self.masked_lm_share = masked_lm_share
        self.mask_ratio = mask_ratio
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)

    @property
    def head_dim(self):
        """Width of one attention head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def generates(self):
        """Whether the model generates text."""
        return self.generation_weight > 0 and self.masked_lm_share < 1

    @property
    def has_text(self):
        """Whether there is a decoder."""
        return self.generates or (self.masked_lm_weight > 0 and self.masked_lm_share > 0)

    @property
    def contrasts(self):
        """Whether sight and sound are embedded for comparison."""
        return self.contrastive_weight > 0

    @property
    def inputs(self):
        """What the processor must know."""
        sound = {"sound": "waveform", "sample_rate": self.audio["sample_rate"], "seconds": self.audio["seconds"]}
        return super().inputs | {"video": "clips", **sound}
