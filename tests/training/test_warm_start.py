"""Runs that start from the weights of another: which nodes are taken, what is said of them, what is refused."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.checkpoints import checkpoint
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import Graph
from megatron_mm.platform import setup
from megatron_mm.training import warm_start
from tests.pipeline import toy
from tests.support.checkpoints import plain_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of the toy system with three layers a branch, trained for a step."""
    folder = tmp_path_factory.mktemp("source")
    toy.train(toy.Case(steps=1, save=str(folder)))
    return checkpoint.find(folder)


def weights(pipeline) -> dict[str, torch.Tensor]:
    (chunk,) = pipeline.bare_chunks
    return {
        f"{node.name}.{name}": parameter.detach().clone()
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for name, parameter in module.named_parameters()
    }


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """The same with two layers a branch, trained for two steps."""
    folder = tmp_path_factory.mktemp("another")
    toy.train(toy.Case(steps=2, layers=2, save=str(folder)))
    return checkpoint.find(folder)


def start(sources, case: toy.Case, patterns=None):
    """(origins, weights before, weights after)"""
    sources = sources if isinstance(sources, list) else [sources]
    setup.initialize(ParallelSizes(), seed=1)
    pipeline, optimizer, _ = toy.build(case)
    before = weights(pipeline)
    rows = warm_start.load_pretrained(sources, pipeline, optimizer, patterns)
    return dict(rows), before, weights(pipeline)


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_nodes_that_are_named(source):
    rows, before, after = start(source, toy.Case(layers=4), ["image.*", "text.embedding"])
    assert rows == {
        "image.embedding": "loaded",
        "image.layers.0-2": "loaded",
        "text.embedding": "loaded",
        "image.layers.3": "initialised: not in the checkpoint",
        "text.layers.0-3": "initialised: not among checkpoint.init_nodes",
        "pair": "initialised: not among checkpoint.init_nodes",
        "fusion.layers.0": "initialised: not among checkpoint.init_nodes",
    }
    expected = {"image.embedding.weight", "text.embedding.table.weight", "head.weight"}  # the head is tied
    assert changed(before, after) == expected | {f"image.layers.{i}.weight" for i in range(3)}


def test_without_names_all_that_fits_and_the_rest_is_named(source):
    rows, before, after = start(source, toy.Case(layers=2))
    assert rows["text.layers.0-1"] == rows["pair"] == "loaded"
    assert rows["text.layers.2"] == rows["image.layers.2"] == "in the checkpoint, not in this model"
    assert changed(before, after) == set(before)
    lines = warm_start.table(list(rows.items())).splitlines()
    assert len({line.index(verdict) for line, verdict in zip(lines, rows.values())}) == 1


def test_of_several_checkpoints_each_fills_what_none_before_it_has(source, another):
    rows, before, after = start([another, source], toy.Case(), ["image.*", "text.layers.*"])
    assert rows == {
        "text.embedding": "initialised: not among checkpoint.init_nodes",
        "pair": "initialised: not among checkpoint.init_nodes",
        "fusion.layers.0": "initialised: not among checkpoint.init_nodes",
        "image.embedding": f"loaded from {another}",
        "image.layers.0-1": f"loaded from {another}",
        "text.layers.0-1": f"loaded from {another}",
        "image.layers.2": f"loaded from {source}",
        "text.layers.2": f"loaded from {source}",
    }
    held = {folder: plain_tensors(str(folder)) for folder in (source, another)}
    taken = [name for name in after if name.startswith(("image.", "text.layers."))]
    assert changed(before, after) == set(taken)
    for name in taken:
        giver, other = (source, another) if "layers.2" in name else (another, source)
        assert torch.equal(after[name], held[giver][name]), name
        assert name not in held[other] or not torch.equal(after[name], held[other][name]), name


def test_a_checkpoint_that_gives_nothing_is_named(source, another):
    nothing = rf"init_from: {another} gives nothing: of what it holds \(text\.embedding, .*every node is filled"
    with pytest.raises(ValueError, match=nothing):
        start([source, another], toy.Case())
    with pytest.raises(ValueError, match=rf"{another} gives nothing.* not among checkpoint\.init_nodes"):
        start([source, another], toy.Case(), ["image.layers.2"])


def test_a_node_that_is_there_in_part(source, monkeypatch):
    class Biased(toy.Layer):
        def __init__(self, *args):
            super().__init__(*args)
            self.bias = toy.empty_parameter(toy.WIDTH, dtype=torch.float32)

    monkeypatch.setattr(toy, "Layer", Biased)
    rows, _, _ = start(source, toy.Case())
    assert rows["text.layers.0"] == "loaded 1 of 2 weights, without text.layers.0.bias"


def test_what_cannot_be_is_refused(source, monkeypatch):
    with pytest.raises(ValueError, match=r"init_nodes: 'vision\.\*' matches no node of this model, which are text"):
        start(source, toy.Case(), ["vision.*"])
    with pytest.raises(ValueError, match=r"'image\.layers\.3' matches image\.layers\.3, of which .* holds no weight"):
        start(source, toy.Case(layers=4), ["image.layers.3"])
    monkeypatch.setattr(toy, "WIDTH", 24)
    with pytest.raises(ValueError, match=r"image\.embedding\.weight is \(16, 48\) where this model needs \(24, 48\)"):
        start(source, toy.Case(), ["image.embedding"])


def test_a_checkpoint_of_another_model_is_refused(source, monkeypatch):
    graph_of = toy.graph_of

    def renamed(case):
        graph = graph_of(toy.Case(tied=False))
        nodes = [replace(node, name=f"other.{node.name}") for node in graph.nodes]
        return Graph(nodes, graph.losses)

    monkeypatch.setattr(toy, "graph_of", renamed)
    with pytest.raises(ValueError, match="holds no weight of this model"):
        start(source, toy.Case())
