"""Configuration of an exported PerceiverFusion. Part of every exported folder; needs transformers only."""

from .configuration_mm import MultimodalConfig


class PerceiverFusionConfig(MultimodalConfig):
    """Fields without a section describe the text tower, a Transformer-XL whose segments have `segment_length` tokens;
    `vision` is the image tower, `perceiver` the latent transformer that reads both, `contrastive` the space that images
    and texts share. There is one output query for each of `max_positions` tokens.
    """

    model_type = "perceiver_fusion"

    def __init__(
        self,
        vocab_size=50176,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        segment_length=128,
        layer_norm_eps=1e-5,
        max_positions=256,
        vision=None,
        perceiver=None,
        contrastive=None,
        contrastive_weight=1.0,
        masked_lm_weight=1.0,
        matching_weight=1.0,
        mask_ratio=0.15,
        mask_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.segment_length = segment_length
        self.layer_norm_eps = layer_norm_eps
        self.max_positions = max_positions
        self.vision = vision
        self.perceiver = perceiver
        self.contrastive = contrastive
        self.contrastive_weight = contrastive_weight
        self.masked_lm_weight = masked_lm_weight
        self.matching_weight = matching_weight
        self.mask_ratio = mask_ratio
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)

    @property
    def contrasts(self):
        """Whether the model embeds images and texts: matching looks for hard negatives by the embeddings."""
        return self.contrastive_weight > 0 or self.matching_weight > 0

    @property
    def inputs(self):
        """What the processor must know: rows are padded on the right to whole segments."""
        return super().inputs | {"padding_side": "right", "row_multiple": self.segment_length}
