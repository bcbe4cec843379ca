"""Configuration of an exported dual encoder. Part of every exported folder; needs transformers only."""

from .configuration_mm import MultimodalConfig


class DualEncoderConfig(MultimodalConfig):
    """Fields without a section describe the text encoder; `vision` is the image tower, `mae` its masked autoencoding,
    `fusion` the layers above both, `contrastive` the space that images and texts share. `hidden_act` is "gelu",
    "gelu_tanh" or "relu". A phase `mae` is the tower with the decoder of masked autoencoding alone.
    """

    model_type = "dual_encoder"

    def __init__(
        self,
        phase="joint",
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=77,
        hidden_act="gelu_tanh",
        layer_norm_eps=1e-5,
        vision=None,
        mae=None,
        fusion=None,
        contrastive=None,
        contrastive_weight=1.0,
        causal_lm_weight=1.0,
        mae_weight=0.0,
        **kwargs,
    ):
        self.phase = phase
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.vision = vision
        self.mae = mae
        self.fusion = fusion
        self.contrastive = contrastive
        self.contrastive_weight = contrastive_weight
        self.causal_lm_weight = causal_lm_weight
        self.mae_weight = mae_weight
        super().__init__(**kwargs)

    @property
    def longest_text(self):
        """Rows of the position table."""
        return self.max_position_embeddings
