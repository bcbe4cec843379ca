"""Recipes small enough for tests: every kind of node, heads and widths that divide by 2, a second of work a step."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.config.load import config_from_tree
from megatron_mm.config.schema import Config

_DATA = {"seq_length": 32, "max_images_per_sample": 1, "max_sounds_per_sample": 1, "num_workers": 0}
_VISION = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
_MAE = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
_DECODER = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96,
    "vocab_size": 128,
}  # fmt: skip


def small_config() -> Config:
    """Synapse with four decoder layers of width 64, towers of two layers, rows of 32 tokens."""
    model = {
        "vision": {**_VISION, "image_size": 16, "max_frames": 4, "frozen": False},
        "audio": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "num_mel_bins": 8,
            "seconds": 0.2,
        },
        "decoder": _DECODER,
        "cross_attention": {"every": 2, "num_query_groups": 2, "gate_init": 0.5},
    }  # fmt: skip
    data = {**_DATA, "max_images_per_sample": 3, "max_sounds_per_sample": 2, "frames_per_video": 2}
    return config_from_tree({"model": model, "data": data, **_run(micro_batch_size=2)}, "small recipe")


def _run(micro_batch_size: int = 4) -> dict:
    training = {"global_batch_size": 8, "train_iters": 4, "precision": "fp32", "eval_interval": 0}
    return {
        "training": {"micro_batch_size": micro_batch_size, **training},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
        "logging": {"log_interval": 1, "tensorboard": False},
    }


def _small(model: dict, **data: int) -> Config:
    tree = {"model": {"contrastive": {"embedding_size": 16}, **model}, "data": {**_DATA, **data}, **_run()}
    return config_from_tree(tree, "small recipe")


def small_avt(**changes: object) -> Config:
    """AVT with encoders of two layers, one fusion layer and two decoder layers; `changes` are fields of `model`."""
    audio = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "conv_kernel_size": 3,
        "front_channels": 16, "front_kernels": [10, 8, 4], "front_strides": [5, 8, 4], "seconds": 0.1,
    }  # fmt: skip
    vision = {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2, "temporal_window_size": 2,
        "image_size": 32,
    }  # fmt: skip
    fusion = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 2}
    model = {
        "vision": vision,
        "audio": audio,
        "fusion": {**fusion, "ffn_hidden_size": 64},
        "decoder": {**_DECODER, "num_layers": 2},
    }
    return _small({"system": "avt", **model, **changes}, frames_per_video=4)


def small_vlm(**changes: object) -> Config:
    """VLM with two decoder layers below the first gated block and two blocks above, whose gates are open."""
    cross = {"first_layer": 2, "every": 1, "gate_init": 0.5}
    model = {"vision": _VISION, "mae": _MAE, "decoder": _DECODER, "cross_attention": cross}
    return _small({"system": "vlm", **model, **changes})


def small_perceiver_fusion(**changes: object) -> Config:
    """PerceiverFusion with texts of two segments and two blocks of a cross-attention and one layer."""
    text = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "segment_length": 16,
        "vocab_size": 128,
    }  # fmt: skip
    perceiver = {
        "num_latents": 8, "hidden_size": 32, "num_blocks": 2, "layers_per_block": 1, "num_attention_heads": 2,
        "ffn_hidden_size": 64,
    }  # fmt: skip
    model = {"vision": _VISION, "text": text, "perceiver": perceiver, "max_positions": 32}
    return _small({"system": "perceiver_fusion", **model, **changes})


def small_dual_encoder(**changes: object) -> Config:
    """Dual encoder with encoders and fusion of two layers, and masked autoencoding beside the joint objectives."""
    text = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 128,
        "max_positions": 32,
    }  # fmt: skip
    fusion = {"num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96}
    model = {"vision": _VISION, "mae": _MAE, "text": text, "fusion": fusion, "mae_weight": 0.5}
    return _small({"system": "dual_encoder", **model, **changes})


def small_sensor(**model: object) -> Config:
    """A user's own system with fields of its own (tests/support/sensor.py); `model` are fields of its section."""
    plugin = str(Path(__file__).with_name("sensor.py"))
    tree = {
        "plugins": [plugin],
        "model": {"system": "sensor", **model},
        "data": {"builder": f"{plugin}:build_datasets", "seq_length": 24, "num_workers": 0},
        "training": {"eval_interval": 0, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
    }
    return config_from_tree(tree, "sensor's recipe")
