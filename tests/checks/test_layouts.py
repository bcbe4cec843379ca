"""The layout never changes the result: small recipe, layouts that between them use every kind of parallelism.

Truth is one process. Bounds are DESIGN's: loss 1e-5 a step, gradient 1e-4 a parameter, fp32.
"""

import copy

import pytest
import torch

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from megatron_mm.config.section import changed
from tests.support import one_process
from tests.support.recipes import small_config

pytestmark = pytest.mark.slow
SIZES = {"iterations": 4, "pool": 4, "global_batch": 16}


def measured(folder, frozen: bool):
    """The small recipe and one process's figures, which have every weight that learns at every step."""
    config = changed(small_config(), {"model.vision.frozen": frozen})
    reference = one_process.measured(config, folder, **SIZES)
    one_process.assert_every_weight_is_compared(reference, config, SIZES["iterations"])
    return config, reference


@pytest.fixture(scope="module")
def trainable(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("trainable"), frozen=False)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("frozen"), frozen=True)


@pytest.mark.parametrize(
    "name", ["TP2xCP2xPP2+SP", "CP2+a2a", "PP4xVPP2+no-p2p", "PP2xVPP2xDP2+distopt+reduce+gather"]
)
def test_layout_equals_one_process(trainable, name):
    config, reference = trainable
    layout = parse_layout(name)
    result = compare(layout, launch(for_layout(config, layout, **SIZES), layout), reference)
    assert result.passed, result
    assert any("vision.layers" in key for key in reference["gradients"])


def test_layout_with_a_frozen_tower_and_recomputation_equals_one_process(frozen):
    config, reference = frozen
    layout = parse_layout("TP2xPP2xDP2+SP+distopt+full+reduce+gather")
    result = compare(layout, launch(for_layout(config, layout, **SIZES), layout), reference)
    assert result.passed, result
    assert not any("vision.layers" in key for key in reference["gradients"])
    assert any("vision.temporal" in key for key in reference["gradients"])


def test_a_wrong_gradient_is_found(trainable):
    """The comparison itself can fail: one parameter off by a thousandth, one missing, one loss off."""
    _, reference = trainable
    layout = parse_layout("TP2")
    assert compare(layout, reference, reference).passed
    key = next(key for key in reference["gradients"] if "linear_qkv.weight" in key)
    wrong = copy.deepcopy(reference)
    wrong["gradients"][key] *= 1.001
    assert not compare(layout, wrong, reference).passed
    missing = copy.deepcopy(reference)
    del missing["gradients"][key]
    assert not compare(layout, missing, reference).passed
    nan = copy.deepcopy(reference)
    nan["gradients"][key] = torch.full_like(nan["gradients"][key], float("nan"))
    assert not compare(layout, nan, reference).passed
    loss = copy.deepcopy(reference)
    loss["losses"][-1] *= 1.0001
    assert not compare(layout, loss, reference).passed
