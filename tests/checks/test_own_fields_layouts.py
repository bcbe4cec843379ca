"""Fields of a system's own in any layout: the sensor's tower and the text that reads it, against one process."""

from __future__ import annotations

import pytest

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from megatron_mm.config.load import config_from_tree
from tests.data.test_own_fields import SENSOR
from tests.support import one_process

pytestmark = pytest.mark.slow
SIZES = {"iterations": 2, "pool": 4, "global_batch": 8}


def recipe():
    tree = {
        "plugins": [SENSOR],
        "model": {"system": "sensor"},
        "data": {"builder": f"{SENSOR}:build_datasets", "seq_length": 24, "num_workers": 0},
        "training": {"eval_interval": 0, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
    }
    return config_from_tree(tree, "sensor recipe")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return one_process.measured(recipe(), tmp_path_factory.mktemp("one"), **SIZES)


@pytest.mark.parametrize("name", ["TP2xPP2", "CP2xDP2"])
def test_layout_equals_one_process(reference, name):
    layout = parse_layout(name)
    result = compare(layout, launch(for_layout(recipe(), layout, **SIZES), layout), reference)
    assert result.passed, result


def test_every_weight_learns_and_is_compared(reference):
    one_process.assert_every_weight_is_compared(reference, recipe(), SIZES["iterations"])
    for name in ("tower.weight", "weigh.vector"):
        assert reference["gradients"][f"0/gradient.{name}"].abs().max() > 0
