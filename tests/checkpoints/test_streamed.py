"""Keys under which weights are written that no run wrote: a restored or an imported checkpoint.

Truth: the names of the modules' parameters, which are the keys that a run of the same model looks for.
"""

from __future__ import annotations

import torch

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.streamed import write_checkpoint_weights


def test_a_norm_is_fused_only_into_a_linear_layer_that_is_there(tmp_path):
    """A user's own layer may have a norm of the name that transformer layers fuse into their projections."""
    names = {
        "mixer.layers.0.input_layernorm.weight": "mixer.layers.0.input_layernorm.weight",
        "mixer.layers.0.kernel": "mixer.layers.0.kernel",
        "decoder.layers.0.input_layernorm.weight": "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.input_layernorm.bias": "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.0.self_attention.linear_qkv.weight": "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.cross_layers.0.input_layernorm.weight": "decoder.cross_layers.0.input_layernorm.weight",
        "decoder.cross_layers.0.pre_mlp_layernorm.weight": "decoder.cross_layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.cross_layers.0.mlp.linear_fc1.weight": "decoder.cross_layers.0.mlp.linear_fc1.weight",
    }
    values = {name: torch.full((8,), float(at)) for at, name in enumerate(names)}
    part = checkpoint_folder.begin(tmp_path, 0)
    write_checkpoint_weights(part, dict.fromkeys(names, (8,)), torch.float32, values.__getitem__)
    reader = CheckpointReader(checkpoint_folder.finish(part, {"iteration": 0}))
    assert reader.weights() == set(names.values())
    assert all(torch.equal(reader.read(name), value) for name, value in values.items())
