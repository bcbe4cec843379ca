"""A checkpoint loads in other layouts digit for digit: the short form of tests/checkpoints/layouts.py."""

from __future__ import annotations

import pytest

from megatron_mm.checkpoints.checkpoint import weights_of
from megatron_mm.platform import setup
from tests.checkpoints import layouts
from tests.pipeline import toy


def test_the_layouts_have_every_kind_of_parallelism():
    assert len(layouts.LAYOUTS) == 10
    assert all(any(kind in layout for layout in layouts.LAYOUTS) for kind in ("TP", "PP", "VPP", "CP", "DP", "distopt"))


@pytest.mark.slow
def test_one_system_in_a_few_layouts(tmp_path):
    """With tied weights over stages, frozen nodes, and shards of the distributed optimizer."""
    name = "dual_encoder with a frozen text encoder"
    firsts = layouts.saved_first((name,), "DP2+distopt", tmp_path)
    loading = ("DP1", "TP2", "PP2xVPP2", "CP2", "DP2")
    assert layouts.compare(firsts, {name: name}, loading, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2+distopt"])
def test_checkpoints_of_before_in_two_layouts(layout, tmp_path):
    """All five systems, in one process and in two."""
    firsts = layouts.of_before(tmp_path)
    assert len(firsts) == 5
    assert layouts.compare(firsts, dict.fromkeys(firsts, "of before"), ("DP1", layout), tmp_path) == []


def test_state_is_divided_alike_by_processes_that_made_it_in_another_order():
    """One that has stepped and one that has loaded: where each has an order of its own, no save after a load works."""
    setup.initialize(toy.sizes_of("DP1"), seed=5)
    pipeline, optimizer, _ = toy.build(toy.Case())
    weights = weights_of(pipeline)

    def order() -> list[tuple[str, str]]:
        return [(weight.key, prefix) for weight, _, prefix in optimizer.held_alike(weights)]

    first = order()
    assert {prefix for _, prefix in first} == {"optimizer.exp_avg.", "optimizer.exp_avg_sq."}
    for adam in optimizer._torch_optimizers():
        for parameter, state in adam.state.items():
            adam.state[parameter] = dict(reversed(state.items()))
    assert order() == first
    setup.shutdown()
