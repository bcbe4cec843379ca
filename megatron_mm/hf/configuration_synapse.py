"""Configuration of an exported Synapse model. Part of every exported folder; needs transformers only."""

from transformers import PreTrainedConfig


class SynapseConfig(PreTrainedConfig):
    """Sizes of the decoder, the gated cross-attention, the two towers, and what preprocessing must know.

    Fields without a prefix describe the text decoder and carry Llama's names; `vision_*` is a CLIP vision
    transformer, `audio_*` a Whisper encoder. `cross_attention_every` says before which decoder layers (0, every,
    2·every, …) a cross-attention sublayer stands.
    """

    model_type = "synapse"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        max_position_embeddings=4096,
        cross_attention_every=2,
        cross_attention_num_key_value_heads=4,
        cross_attention_qk_norm=True,
        vision_num_hidden_layers=4,
        vision_hidden_size=256,
        vision_num_attention_heads=4,
        vision_intermediate_size=1024,
        vision_patch_size=14,
        vision_image_size=224,
        vision_max_frames=32,
        audio_num_hidden_layers=4,
        audio_hidden_size=256,
        audio_num_attention_heads=4,
        audio_intermediate_size=1024,
        audio_num_mel_bins=80,
        audio_sample_rate=16000,
        audio_seconds=30.0,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        frames_per_video=8,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
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
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.cross_attention_every = cross_attention_every
        self.cross_attention_num_key_value_heads = cross_attention_num_key_value_heads
        self.cross_attention_qk_norm = cross_attention_qk_norm
        self.vision_num_hidden_layers = vision_num_hidden_layers
        self.vision_hidden_size = vision_hidden_size
        self.vision_num_attention_heads = vision_num_attention_heads
        self.vision_intermediate_size = vision_intermediate_size
        self.vision_patch_size = vision_patch_size
        self.vision_image_size = vision_image_size
        self.vision_max_frames = vision_max_frames
        self.audio_num_hidden_layers = audio_num_hidden_layers
        self.audio_hidden_size = audio_hidden_size
        self.audio_num_attention_heads = audio_num_attention_heads
        self.audio_intermediate_size = audio_intermediate_size
        self.audio_num_mel_bins = audio_num_mel_bins
        self.audio_sample_rate = audio_sample_rate
        self.audio_seconds = audio_seconds
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.frames_per_video = frames_per_video
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", False),
            **kwargs,
        )

    @property
    def head_dim(self):
        """Width of one attention head of the decoder and of its cross-attention."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_cross_layers(self):
        """Number of cross-attention sublayers."""
        return -(-self.num_hidden_layers // self.cross_attention_every)

    @property
    def vision_tokens(self):
        """Memory positions of one image: its patches and the class token."""
        return (self.vision_image_size // self.vision_patch_size) ** 2 + 1

    @property
    def audio_frames(self):
        """Spectrogram frames of one sound (10 ms hop)."""
        return round(self.audio_seconds * 100)

    @property
    def audio_tokens(self):
        """Memory positions of one sound."""
        return self.audio_frames // 2

    @property
    def inputs(self):
        """What the processor must know; see processing_mm.py."""
        return {
            "packed": True,
            "image_size": self.vision_image_size,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "video": "frames",
            "frames_per_video": self.frames_per_video,
            "sound": "log_mel",
            "sample_rate": self.audio_sample_rate,
            "seconds": self.audio_seconds,
            "num_mel_bins": self.audio_num_mel_bins,
            "padding_side": "left",
            "row_multiple": 1,
            "row_length": self.max_position_embeddings,
        }
