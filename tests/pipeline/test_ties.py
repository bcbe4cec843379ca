"""Tied weights: truth is one process, where the tied uses are one Parameter and autograd adds their gradients."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checks.layouts import compare, parse_layout
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import Graph, Kind, Node, NodeCost, Stream
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.pipeline.design import PipelineDesign
from megatron_mm.pipeline.schedule import build_pipeline
from megatron_mm.platform import setup
from tests.pipeline.toy import Case, build, graph_of, train

TABLE = "gradient.text.embedding.table.weight"
LAYOUTS = ("PP2xDP2", "PP2xDP2+distopt", "PP4", "PP4xVPP2", "DP4+distopt")


@pytest.fixture(scope="module")
def one_process():
    return train(Case(steps=4))


def test_in_one_chunk_the_uses_are_one_parameter(one_process):
    setup.initialize(ParallelSizes(), seed=1)
    pipeline, _, _ = build(Case())
    (chunk,) = pipeline.bare_chunks
    modules = dict(zip((node.name for node in chunk.nodes), chunk.node_modules))
    assert modules["head"].weight is modules["text.embedding"].table.weight
    entries = chunk.sharded_state_dict()
    assert "text.embedding.table.weight" in entries and "head.weight" not in entries
    assert f"0/{TABLE}" in one_process["gradients"] and "0/gradient.head.weight" not in one_process["gradients"]
    untied = train(Case(steps=1, tied=False))
    assert untied["losses"][0] != one_process["losses"][0]


@pytest.mark.slow
def test_every_layout_learns_as_one_process_does(one_process, train_in_processes, tmp_path):
    cases = [Case(name, steps=4) for name in LAYOUTS]
    for name, result in zip(LAYOUTS, train_in_processes(4, *cases)):
        assert result["agree"] == [True] * 4, name
        assert compare(parse_layout(name), result, one_process).passed, name
        assert result["norms"] == pytest.approx(one_process["norms"], rel=1e-5), name  # each weight counted once


@pytest.mark.slow
def test_a_checkpoint_has_the_weight_once_and_loads_anywhere(train_in_processes, tmp_path):
    """Saved by interleaved stages, each with a copy, continued by one process; and from one process by others."""
    whole = train(Case(steps=4))
    first, second = tmp_path / "a", tmp_path / "b"
    train(Case(steps=2, save=str(second)))
    cases = [Case("PP4xVPP2", steps=2, save=str(first)), Case("PP2xDP2+distopt", steps=2, load=str(second))]
    _, elsewhere = train_in_processes(4, *cases)
    here = train(Case(steps=2, load=str(first)))
    for result in (here, elsewhere):
        assert result["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5) and all(result["agree"])
    keys = CheckpointReader(first / "iter_0000002").shapes
    assert "text.embedding.table.weight" in keys and "optimizer.exp_avg.text.embedding.table.weight" in keys
    assert not any("head.weight" in key for key in keys)


def tied_graph(ties: dict[str, str], trainable: bool = True) -> Graph:
    x = Stream("x", lambda plan: (1,))
    nodes = [Node(name, Kind(torch.nn.Identity, lambda plan: NodeCost(1)), (), (x,)) for name in ("a", "a.b")]
    last = Node("c", nodes[0].kind, (), (x,), trainable=trainable, ties=ties)
    return Graph([*nodes, last], [])


def test_the_owner_is_the_node_with_the_longest_name():
    assert tied_graph({"w": "a.b.weight"}).ties == {"a.b.weight": [(1, "weight"), (2, "w")]}


def test_ties_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"node 'c' ties 'w' to 'd\.w', which names no other node"):
        tied_graph({"w": "d.w"})
    with pytest.raises(ValueError, match="names no other node"):
        tied_graph({"w": "c.v"})
    with pytest.raises(ValueError, match="both learn or neither"):
        tied_graph({"w": "a.w"}, trainable=False)


def test_ties_to_what_a_node_lacks_or_of_another_shape_are_refused():
    setup.initialize(ParallelSizes(), seed=1)

    def graph(key: str) -> Graph:
        nodes = list(graph_of(Case(layers=1, tied=False)).nodes)
        head = nodes.pop()
        return Graph([*nodes, replace(head, ties={"weight": key})], [])

    def build(key: str) -> None:
        build_pipeline(PipelineDesign(graph(key), [0, 7], LayerSettings()), torch.device("cpu"), seed=1)

    with pytest.raises(ValueError, match=r"tied weight text.embedding.weight: the node has no such parameter"):
        build("text.embedding.weight")
    with pytest.raises(ValueError, match=r"head.weight is \(40, 16\) and tied to text.layers.0.weight, \(16, 16\)"):
        build("text.layers.0.weight")
