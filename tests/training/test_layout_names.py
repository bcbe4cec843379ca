"""How layouts are written."""

import pytest

from megatron_mm.training.layouts import DEFAULT_LAYOUTS, for_layout, parse_layout
from tests.recipes import small_config


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
