"""A gradient that is not finite is traced to stage, parameter, microbatch and samples, though the loss is finite.

Truth: sample 6, in the second microbatch of four, breaks the gradient of one layer's weight and nothing else.
"""

import math

import pytest

from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.platform import setup
from megatron_mm.training.resilience import explain_loss
from tests.pipeline.toy import Case, build, microbatches_of, sizes_of, train

SAMPLES = "microbatch 1, samples sample 4, sample 5, sample 6, sample 7"


def test_in_one_process():
    result = train(Case(broken="text.layers.1"))
    assert math.isnan(result["norm"])
    text = result["explained"]
    assert text.startswith("iteration 0: the gradient norm is nan; first seen on rank 0, pipeline stage 0 (text.embed")
    assert "parameter text.layers.1.weight)" in text and text.endswith(SAMPLES)


def test_one_bad_sample_among_the_negatives_of_all():
    """Every row's loss over the whole batch is NaN then; the microbatch that holds the sample is named all the same."""
    case = Case(whole_batch=True)
    setup.initialize(sizes_of("DP1"), seed=1)
    pipeline, _, _ = build(case)
    batches = microbatches_of(case, 0, sizes_of("DP1"))
    batches[1].images_ICHW[2] = float("nan")
    result = run_batch(pipeline, batches)
    assert math.isnan(result.losses["pairs"]) and math.isnan(result.total)
    text = explain_loss(pipeline, result, batches, 3)
    assert text.startswith("iteration 3: ") and "pairs nan" in text and text.endswith(SAMPLES)


@pytest.mark.slow
def test_in_a_pipeline(train_in_processes):
    """The stage that holds the layer, and of two data-parallel ranks the one that has the sample."""
    names = ("PP4", "PP2xDP2+distopt", "PP4xVPP2")
    pipeline, data, interleaved = train_in_processes(4, *(Case(name, broken="text.layers.1") for name in names))
    assert "first seen on rank 1, pipeline stage 1 (" in pipeline["explained"]
    assert "parameter text.layers.1.weight" in pipeline["explained"] and pipeline["explained"].endswith(SAMPLES)
    assert "rank 1, pipeline stage 0" in data["explained"]
    assert data["explained"].endswith("microbatch 1, samples sample 6, sample 7")
    assert "parameter text.layers.1.weight" in interleaved["explained"]
    assert "microbatches 0-3, samples sample 0, " in interleaved["explained"]
