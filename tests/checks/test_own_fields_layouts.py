"""Fields of a system's own in any layout: the sensor's tower and the text that reads it, against one process."""

from __future__ import annotations

import pytest

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from tests.support import one_process
from tests.support.recipes import small_sensor

pytestmark = pytest.mark.slow
SIZES = {"iterations": 2, "pool": 4, "global_batch": 8}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return one_process.measured(small_sensor(), tmp_path_factory.mktemp("one"), **SIZES)


@pytest.mark.parametrize("name", ["TP2xPP2", "CP2xDP2"])
def test_layout_equals_one_process(reference, name):
    layout = parse_layout(name)
    result = compare(layout, launch(for_layout(small_sensor(), layout, **SIZES), layout), reference)
    assert result.passed, result


def test_every_weight_learns_and_is_compared(reference):
    one_process.assert_every_weight_is_compared(reference, small_sensor(), SIZES["iterations"])
    for name in ("tower.weight", "weigh.vector"):
        assert reference["gradients"][f"0/gradient.{name}"].abs().max() > 0
