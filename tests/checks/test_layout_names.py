"""How layouts are written."""

import json

import pytest

from megatron_mm.checks.layouts import DEFAULT_LAYOUTS, Comparison, for_layout, notes, parse_layout, to_json
from megatron_mm.config.schema import NodeGroupConfig
from megatron_mm.config.section import changed
from tests.support.recipes import small_config


def test_sizes_and_flags():
    layout = parse_layout("TP2·CP2·PP2 + SP")
    assert layout.world_size == 8 and layout.parallel == {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    assert parse_layout("DP4+distopt+full").data_parallel == 4
    assert [parse_layout(name).world_size for name in DEFAULT_LAYOUTS] == [2, 2, 2, 4, 4, 2, 2, 2, 8, 8]


@pytest.mark.parametrize("name", ["TP", "XP2", "TP2+fast"])
def test_what_is_no_layout_is_refused(name):
    with pytest.raises(ValueError, match="is not"):
        parse_layout(name)


def test_the_pool_stays_the_same():
    for name in ("DP1", "DP2", "DP4"):
        layout = parse_layout(name)
        config = for_layout(small_config(), layout, 1, pool=4, global_batch=8)
        assert config.training.micro_batch_size * layout.data_parallel == 4
    with pytest.raises(ValueError, match="a pool of 4 samples does not divide by DP3"):
        for_layout(small_config(), parse_layout("DP3"), 1, pool=4, global_batch=12)


def test_what_a_layout_repeats_is_said_and_written():
    layout = parse_layout("CP2")
    said = notes(for_layout(small_config(), layout, 1, pool=4, global_batch=8), layout)
    assert len(said) == 1 and said[0].startswith("context parallel 2: each tower is whole on each of these processes")
    assert notes(for_layout(small_config(), parse_layout("TP2"), 1, pool=4, global_batch=8), parse_layout("TP2")) == ()
    (row,) = to_json([Comparison("CP2", 2, 0.0, 0.0, "", notes=said)])
    assert json.loads(json.dumps(row))["notes"] == list(said)


def test_all_that_ever_learns_is_compared():
    config = changed(
        small_config(),
        {
            "optimizer.groups": [
                NodeGroupConfig(nodes=["vision.*"], frozen_iters=100),
                NodeGroupConfig(nodes=["audio.*"], frozen_iters=-1),
            ],
        },
    )
    compared = for_layout(config, parse_layout("PP2"), 1, pool=4, global_batch=8)
    assert [group.frozen_iters for group in compared.optimizer.groups] == [0, -1]
