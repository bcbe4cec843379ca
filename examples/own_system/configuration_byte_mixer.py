"""Configuration of an exported byte mixer. Part of the exported folder; needs transformers only."""

from transformers import PreTrainedConfig


class ByteMixerConfig(PreTrainedConfig):
    """Sizes of the layers; `seq_length` is the longest row that was trained on."""

    model_type = "byte_mixer"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=264,
        hidden_size=96,
        num_hidden_layers=6,
        kernel_size=5,
        label_smoothing=0.05,
        initializer_range=0.02,
        seq_length=128,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.kernel_size = kernel_size
        self.label_smoothing = label_smoothing
        self.initializer_range = initializer_range
        self.seq_length = seq_length
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
