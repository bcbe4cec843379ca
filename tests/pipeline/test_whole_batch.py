"""Losses over the whole global batch, and losses of one task.

Truth for the former is the same loss in the normal mode with all samples in one microbatch: then every sample is there.
"""

import pytest
import torch

from megatron_mm.checks.layouts import compare, parse_layout
from tests.pipeline.toy import Case, train

LAYOUTS = ("PP4", "PP4xVPP2", "PP2xDP2+distopt+full", "DP4")
#: Floating-point sums over other groupings of rows.
ROUNDING = {"rel": 1e-6}


@pytest.fixture(scope="module")
def truth():
    return train(Case(pool=16, whole_batch=True))


def test_one_microbatch_is_the_normal_mode(truth):
    assert truth["losses"] == train(Case(pool=16))["losses"]


def test_several_microbatches_in_one_process(truth):
    result = train(Case(pool=4, whole_batch=True))
    assert compare(parse_layout("DP1"), result, truth).passed
    for ours, theirs in zip(result["named"], truth["named"], strict=True):
        assert ours == pytest.approx(theirs, **ROUNDING)  # the value that is reported is the loss, not the surrogate
    assert train(Case(pool=4))["named"][0]["pairs"] < result["named"][0]["pairs"] - 0.5  # fewer negatives


@pytest.mark.slow
def test_every_layout(truth, train_in_processes):
    tasks = train(Case(task=True))
    cases = [Case(name, whole_batch=True) for name in LAYOUTS] + [Case(name, task=True) for name in LAYOUTS]
    for case, result in zip(cases, train_in_processes(4, *cases)):
        expected = tasks if case.task else truth
        assert compare(parse_layout(case.layout), result, expected).passed, case
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5), case
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5), case
        assert result["named"][-1] == pytest.approx(expected["named"][-1], rel=1e-5), case


def test_dropout_draws_the_same_in_both_passes(monkeypatch):
    """The streams of the second pass are those of the first, bit for bit; other nodes run in between."""
    from megatron_mm.pipeline.whole_batch import StreamCache

    seen: list[list[torch.Tensor]] = []
    term = StreamCache.term

    def watched(cache, name, values):
        seen.append([value.detach().clone() for value in values])
        return term(cache, name, values)

    monkeypatch.setattr(StreamCache, "term", watched)
    train(Case(steps=1, whole_batch=True, dropout=0.4))
    batches = 16 // 4
    evaluation, first, second = (seen[at * batches : (at + 1) * batches] for at in range(3))
    assert len(seen) == 3 * batches
    assert all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))
    assert not torch.equal(first[0][0], evaluation[0][0])


def test_the_first_pass_leaves_out_what_the_loss_does_not_need(monkeypatch):
    from tests.pipeline import toy

    runs = {"fusion.layers.0": 0, "text.layers.0": 0}
    forward, names = toy.Layer.forward, {}

    def counted(layer, x, context):
        runs[names.get(layer.weight.data_ptr(), "other")] = runs.get(names.get(layer.weight.data_ptr(), "other"), 0) + 1
        return forward(layer, x, context)

    build = toy.build

    def named(case):
        built = build(case)
        for node, module in zip(built[0].graph.nodes, built[0].bare_chunks[0].node_modules):
            if isinstance(module, toy.Layer):
                names[module.weight.data_ptr()] = node.name
        return built

    monkeypatch.setattr(toy, "build", named)
    monkeypatch.setattr(toy.Layer, "forward", counted)
    train(Case(steps=1, whole_batch=True))
    assert runs["text.layers.0"] == 3 * 4  # evaluation, first pass, second pass
    assert runs["fusion.layers.0"] == 2 * 4


def test_the_first_pass_counts_in_the_balance_of_the_pipeline():
    from megatron_mm.planner.costs import node_times
    from tests.pipeline.toy import graph_of, microbatch

    graph, plan = graph_of(Case(whole_batch=True)), microbatch([0, 1]).plan
    plain, cached = node_times(graph, plan, recompute=False), node_times(graph, plan, recompute=False, cached=True)
    more = {node.name for node, one, two in zip(graph.nodes, plain, cached) if two > one}
    assert more == {node.name for node in graph.nodes} - {"fusion.layers.0", "head"}


def test_a_loss_counts_the_microbatches_of_its_task_only():
    """Truth: the mean over the rows of the first and third microbatch, in a run without tasks over just those."""
    result = train(Case(steps=1, task=True))
    assert result["counts"] == [{"first": 8.0, "pairs": 13.0}]
    from tests.pipeline import toy

    original = toy.microbatches_of
    try:
        toy.microbatches_of = lambda case, step, sizes: original(case, step, sizes)[::2]
        half = train(Case(steps=1))
    finally:
        toy.microbatches_of = original
    assert result["named"][0]["first"] == pytest.approx(half["named"][0]["first"], **ROUNDING)
    assert set(result["gradients"]) == set(half["gradients"])


def test_a_loss_that_nothing_counts_for_is_left_out():
    from tests.pipeline import toy

    original = toy.microbatches_of
    try:
        toy.microbatches_of = lambda case, step, sizes: original(case, step, sizes)[1::2]
        result = train(Case(steps=1, task=True))
    finally:
        toy.microbatches_of = original
    assert result["counts"][0]["first"] == 0 and list(result["named"][0]) == ["pairs"]
    assert result["losses"][0] == pytest.approx(0.5 * result["named"][0]["pairs"])

