"""A recipe small enough for tests: every kind of node, heads and widths that divide by 2, a second of work a step."""

from __future__ import annotations

from megatron_mm.config.schema import Config


def small_config() -> Config:
    """Synapse with four decoder layers of width 64, towers of two layers, rows of 32 tokens."""
    config = Config()
    decoder, cross, vision, audio = (
        config.model.decoder,
        config.model.cross_attention,
        config.model.vision,
        config.model.audio,
    )
    decoder.num_layers, decoder.hidden_size, decoder.num_attention_heads, decoder.num_query_groups = 4, 64, 4, 2
    decoder.ffn_hidden_size, decoder.vocab_size = 96, 128
    cross.every, cross.num_query_groups, cross.gate_init = 2, 2, 0.5
    vision.num_layers, vision.hidden_size, vision.num_attention_heads, vision.ffn_hidden_size = 2, 32, 2, 64
    vision.patch_size, vision.image_size, vision.max_frames, vision.frozen = 8, 16, 4, False
    audio.num_layers, audio.hidden_size, audio.num_attention_heads, audio.ffn_hidden_size = 2, 32, 2, 64
    audio.num_mel_bins, audio.seconds = 8, 0.2
    config.data.seq_length, config.data.max_images_per_sample, config.data.max_sounds_per_sample = 32, 3, 2
    config.data.frames_per_video, config.data.num_workers = 2, 0
    config.training.micro_batch_size, config.training.global_batch_size, config.training.train_iters = 2, 8, 4
    config.training.precision, config.training.eval_interval = "fp32", 0
    config.optimizer.lr, config.optimizer.lr_warmup_iters = 1e-3, 1
    config.logging.log_interval, config.logging.tensorboard = 1, False
    return config
