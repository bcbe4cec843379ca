"""Context-parallel slices, and checkpoint keys. (Layouts against one process: tests/checks/test_layouts.py.)"""

from __future__ import annotations

import pytest
import torch

from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.layers.sharding import zigzag_slice
from megatron_mm.systems.graph import build_graph
from tests.models import synapse_case as case


def test_zigzag_slices_cover_each_row_once_and_cost_the_same():
    positions = torch.arange(24).repeat(2, 1)
    slices = [zigzag_slice(positions, 3, rank) for rank in range(3)]
    assert slices[0][0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert sorted(torch.cat([s[1] for s in slices]).tolist()) == list(range(24))
    assert len({int(s.sum()) for s in slices}) == 1  # causal attention costs as much as the positions' sum
    with pytest.raises(ValueError, match="does not divide into 6 chunks"):
        zigzag_slice(torch.zeros(1, 20), 3, 0)


def test_unknown_system_is_named():
    config = case.tiny_config()
    object.__setattr__(config, "system", "sinapse")
    with pytest.raises(ValueError, match="'sinapse'; known systems: synapse"):
        build_graph(config, LayerSettings())


def test_checkpoint_keys_are_those_of_fused_norms():
    """Both backends share a checkpoint: the local norms are saved under the names that Transformer Engine's have."""
    graph = build_graph(case.tiny_config(), LayerSettings())
    for name in ("decoder.layers.0", "vision.layers.0", "audio.layers.0"):
        module = next(n for n in graph.nodes if n.name == name).build()
        keys = {value.key for value in module.sharded_state_dict(f"{name}.").values() if hasattr(value, "key")}
        keys = {key for key in keys if "_extra_state" not in key}
        assert f"{name}.self_attention.linear_qkv.layer_norm_weight" in keys
        assert f"{name}.mlp.linear_fc1.layer_norm_weight" in keys
        assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in keys)
        assert len(keys) == len(list(module.parameters()))
