"""The graph's consequences: what crosses a cut, where gradients stop, which fields a chunk reads."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Kind, Loss, Node, NodeCost, Stream
from megatron_mm.models.names import plain

PLAN = MicrobatchPlan(2, 8, 1, 1, 1, 1, False, 8)


def stream(name: str, layout: str = "replicated", rows: int = 4) -> Stream:
    return Stream(name, lambda plan: (rows, 3), layout)


def node(name: str, reads=(), writes=(), trainable: bool = True, fields=()) -> Node:
    return Node(
        name,
        Kind(nn.Identity, lambda plan: NodeCost(1)),
        tuple(reads),
        tuple(writes),
        fields=frozenset(fields),
        trainable=trainable,
    )


def graph() -> Graph:
    image, text = stream("image"), stream("text", "sequence", rows=16)
    nodes = [
        node("tower", writes=[image], trainable=False, fields={"images_ICHW"}),
        node("embedding", writes=[text], fields={"tokens_RT"}),
        node("layer", reads=["text", "image"], writes=[text]),
        node("head", reads=["text"], writes=[stream("logits")]),
    ]
    loss = Loss("lm", lambda logits, context: logits.sum(), lambda batch: torch.ones(()), ("logits",))
    return Graph(nodes, [loss])


def test_only_streams_that_are_read_later_cross_a_cut():
    assert [s.name for s in graph().live(1)] == ["image"]
    assert [s.name for s in graph().live(2)] == ["image", "text"]
    assert [s.name for s in graph().live(3)] == ["text"]


def test_a_stream_that_is_written_anew_before_it_is_read_does_not_cross():
    text = stream("text")
    nodes = [node("a", writes=[text]), node("b", reads=["text"], writes=[stream("x")]), node("c", writes=[text])]
    loss = Loss("l", None, None, ("text", "x"))
    assert [s.name for s in Graph(nodes, [loss]).live(2)] == ["x"]


def test_a_rewritten_stream_crosses_in_its_latest_shape():
    nodes = [node("a", writes=[stream("x", rows=4)]), node("b", ["x"], [stream("x", rows=9)]), node("c", ["x"], [])]
    crossing = Graph(nodes, []).live(2)
    assert crossing[0].shape(PLAN) == (9, 3)


def test_gradients_stop_at_frozen_towers():
    carries = graph().carries_gradient
    assert not carries[2, "image"] and carries[2, "text"] and carries[4, "logits"]


def test_a_chunk_reads_only_the_fields_of_its_nodes():
    assert graph().fields(0, 1) == {"images_ICHW"}
    assert graph().fields(2, 4) == frozenset()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'layer' reads stream 'text'"):
        Graph([node("layer", reads=["text"])], [])
    with pytest.raises(ValueError, match="two nodes are named 'a'"):
        Graph([node("a"), node("a")], [])
    with pytest.raises(ValueError, match="loss 'l' reads stream 'nothing'"):
        Graph([node("a")], [Loss("l", None, None, ("nothing",))])


def test_sharded_streams_divide_over_context_and_sequence_parallel():
    text = stream("text", "sequence", rows=16)
    assert text.local_shape(PLAN, ParallelSizes(tp=2, cp=2, sequence_parallel=True)) == (4, 3)
    assert text.local_shape(PLAN, ParallelSizes(tp=2, cp=2)) == (8, 3)
    with pytest.raises(ValueError, match="stream text: 16 positions do not divide over 3"):
        text.local_shape(PLAN, ParallelSizes(cp=3))


def test_what_a_kind_says_is_compared_with_what_it_builds():
    """Plans go by its cost, exports by its names: neither may be of other weights."""

    def names(node, exported):
        yield plain(f"{node}.weight", f"{exported}.weight", 3, 2)
        yield plain(f"{node}.bias", f"{exported}.bias", 3)

    linear = nn.Linear(2, 3)
    x = Stream("x", lambda plan: (1,))
    right = Node("a", Kind(lambda: linear, lambda plan: NodeCost(9), names), (), (x,))
    right.check(right.build(), PLAN, tp=1)
    wrong = replace(right, kind=Kind(lambda: linear, lambda plan: NodeCost(7), names))
    with pytest.raises(ValueError, match=r"node 'a': its cost says 7 parameters, its module has 9"):
        wrong.check(wrong.build(), PLAN, tp=1)
    short = replace(right, kind=Kind(lambda: linear, lambda plan: NodeCost(9), lambda *words: list(names(*words))[:1]))
    with pytest.raises(ValueError, match=r"node 'a': its names are not those of its module's weights: a\.bias"):
        short.check(short.build(), PLAN, tp=1)
    tied = replace(right, kind=Kind(lambda: linear, lambda plan: NodeCost(6), names), ties={"bias": "b.bias"})
    tied.check(tied.build(), PLAN, tp=1)
    linear.weight.tensor_model_parallel = True
    halves = replace(right, kind=Kind(lambda: linear, lambda plan: NodeCost(15), names))
    halves.check(halves.build(), PLAN, tp=2)
