"""Communication beside computation changes no result: truth is one process without it.

The toy has what breaks overlap elsewhere: a head that odd microbatches, the last ones, do not use; a weight shared by
chunks; a parameter whose module is never called; losses over the whole batch with a pass of their own before.
"""

import pytest
import torch

from megatron_mm.checks.layouts import compare, parse_layout
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.pipeline import overlap
from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.platform import setup
from tests.pipeline.toy import Case, build, microbatches_of, train

LAYOUTS = (
    "DP4+reduce",
    "DP4+distopt+reduce+gather",
    "PP2xDP2+distopt+reduce+gather+full",
    "PP2xVPP2xDP2+distopt+reduce+gather",
    "PP4xVPP2+reduce",
    "PP4xVPP2+no-p2p",
)
KINDS = ({}, {"task": True}, {"whole_batch": True})


@pytest.mark.slow
def test_every_layout_learns_as_one_process_does(train_in_processes, tmp_path):
    truths = [train(Case(steps=4, **kind, **({"pool": 16} if "whole_batch" in kind else {}))) for kind in KINDS]
    cases = [(Case(name, steps=4, **kind), truth) for name in LAYOUTS for kind, truth in zip(KINDS, truths)]
    for (case, truth), result in zip(cases, train_in_processes(4, *(case for case, _ in cases)), strict=True):
        assert compare(parse_layout(case.layout), result, truth).passed, case
        assert result["norms"] == pytest.approx(truth["norms"], rel=1e-5), case
        assert result["evaluated"] == pytest.approx(truth["evaluated"], rel=1e-5), case  # on the weights of then
        assert result["agree"] == [True] * 4, case


@pytest.mark.slow
def test_a_checkpoint_has_the_weights_of_the_step(train_in_processes, tmp_path):
    """Saved before any forward pass has gathered them, and read by one process."""
    whole = train(Case(steps=4))
    train_in_processes(4, Case("DP4+distopt+reduce+gather", steps=2, save=str(tmp_path / "a")))
    here = train(Case(steps=2, load=str(tmp_path / "a")))
    assert here["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)


def events(case: Case, monkeypatch) -> list[str]:
    """What happens in two steps, in order: `start FIRST-NODE` of buckets, `end` of the backward pass."""
    setup.initialize(ParallelSizes(), seed=5)
    seen: list[str] = []
    start, finish = overlap._Bucket.start, overlap.GradientReduction.finish

    def started(bucket):
        seen.append(f"start {bucket.first}")
        start(bucket)

    def finished(reduction):
        seen.append("end")
        finish(reduction)

    monkeypatch.setattr(overlap._Bucket, "start", started)
    monkeypatch.setattr(overlap.GradientReduction, "finish", finished)
    pipeline, optimizer, _ = build(case)
    for number in range(2):
        optimizer.zero_grad()
        run_batch(pipeline, microbatches_of(case, number, ParallelSizes()))
    return seen


@pytest.mark.parametrize("task", [False, True])
def test_buckets_start_during_the_last_backward_pass_last_nodes_first(task, monkeypatch):
    """In every step, and whether the last microbatch uses the head or not."""
    seen = events(Case("DP1+reduce", task=task), monkeypatch)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second and first.index("end") == len(first) - 1 and len(first) > 4
    firsts = [int(event.split()[1]) for event in first[:-1]]
    assert firsts == sorted(firsts, reverse=True) and len(set(firsts)) > 3


def test_a_gradient_that_comes_late_ends_the_run(monkeypatch):
    """A bucket that starts too early would lose it without a sound."""
    forward = overlap._Mark.forward

    def early(ctx, anchor, reached):
        reached()
        return forward(ctx, anchor, reached)

    monkeypatch.setattr(overlap._Mark, "forward", early)
    setup.initialize(ParallelSizes(), seed=5)
    case = Case("DP1+reduce")
    pipeline, optimizer, _ = build(case)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="after its reduction had begun"):
        run_batch(pipeline, microbatches_of(case, 0, ParallelSizes()))


def test_a_node_finds_its_weights_whichever_module_reads_them(monkeypatch):
    """The next forward pass gathers bucket by bucket; what is asked for beside it is there too."""
    setup.initialize(ParallelSizes(), seed=5)
    pipeline, optimizer, _ = build(Case("DP1+distopt+reduce+gather"))
    waited: list[int] = []
    (chunk,) = pipeline.chunks
    for number, group in enumerate(chunk.bucket_groups):

        def waiting(finish=group.finish_param_sync, number=number):
            waited.append(number)
            finish()

        monkeypatch.setattr(group, "finish_param_sync", waiting)
    batches = microbatches_of(Case(), 0, ParallelSizes())
    optimizer.zero_grad()
    run_batch(pipeline, batches)
    assert waited == []  # nothing was updated yet
    optimizer.step(optimizer.gradient_norm(), 16)
    with torch.no_grad():
        run_batch(pipeline, batches, forward_only=True)
    assert sorted(waited) == list(range(len(chunk.bucket_groups))) and len(waited) > 3  # each once
    pipeline.sharded_state_dict()
    assert len(waited) == len(chunk.bucket_groups)
