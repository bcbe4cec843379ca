"""Configuration of an exported VLM. Part of every exported folder; needs transformers only."""

from .configuration_mm import MultimodalConfig


class VLMConfig(MultimodalConfig):
    """Fields without a section describe the decoder and carry Llama's names; `vision` is the image tower, `mae` its
    masked autoencoding, `cross_attention` says which layers gated blocks stand before, `contrastive` is the space that
    images and texts share. A phase `mae` is the tower with the decoder of masked autoencoding alone.
    """

    model_type = "vlm"

    def __init__(
        self,
        phase="joint",
        vocab_size=50176,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        vision=None,
        mae=None,
        cross_attention=None,
        contrastive=None,
        contrastive_weight=0.5,
        causal_lm_weight=0.5,
        **kwargs,
    ):
        self.phase = phase
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.vision = vision
        self.mae = mae
        self.cross_attention = cross_attention
        self.contrastive = contrastive
        self.contrastive_weight = contrastive_weight
        self.causal_lm_weight = causal_lm_weight
        super().__init__(**kwargs)

    @property
    def head_dim(self):
        """Width of one attention head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def lower_layers(self):
        """Decoder layers below the first gated block."""
        return self.cross_attention["first_layer"]

    def gated_block(self, index):
        """Number of the gated block that stands before decoder layer `index`, or None."""
        above, every = index - self.lower_layers, self.cross_attention["every"]
        return above // every if above >= 0 and above % every == 0 else None
