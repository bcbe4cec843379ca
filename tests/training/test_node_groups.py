"""Groups of nodes: which are frozen when, and what their parameters learn at."""

import pytest
import torch

from megatron_mm.checkpoints.checkpoint import weights_of
from megatron_mm.config.schema import NodeGroupConfig
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.node_names import collapsed, node_and_weight
from megatron_mm.models.phases import LAST_PHASE, phase_ends, phase_graph
from megatron_mm.platform import setup
from tests.pipeline.toy import Case, build, graph_of, microbatches_of, run_batch


def trainable(groups, iteration) -> set[str]:
    return {node.name for node in phase_graph(graph_of(Case(layers=1)), groups, iteration).nodes if node.trainable}


def test_the_first_group_that_matches_holds():
    groups = [
        NodeGroupConfig(nodes=["image.layers.*"], frozen_iters=0),
        NodeGroupConfig(nodes=["image.*"], frozen_iters=3),
        NodeGroupConfig(nodes=["pair"], frozen_iters=-1),
    ]
    everything = {node.name for node in graph_of(Case(layers=1)).nodes}
    assert trainable(groups, 0) == everything - {"image.embedding", "pair"} == trainable(groups, 2)
    assert trainable(groups, 3) == everything - {"pair"} == trainable(groups, LAST_PHASE)
    assert phase_ends(groups) == {3}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"groups.0.nodes: 'imag.\*' matches no node; the nodes are text.embedding"):
        trainable([NodeGroupConfig(nodes=["imag.*"])], 0)
    with pytest.raises(ValueError, match="freezes every node at iteration 0"):
        trainable([NodeGroupConfig(nodes=["*"], frozen_iters=5)], 0)


@pytest.mark.parametrize(("embedding", "head"), [(-1, 0), (0, 4), (3, 4)])
def test_nodes_that_share_a_weight_learn_from_the_same_step_on(embedding, head):
    """Said at the first step, though the last case goes wrong at the fourth."""
    message = (
        r"optimizer\.groups: 'head' and 'text\.embedding' share 'text\.embedding\.table\.weight', so both must have "
        rf"the same frozen_iters; they have {head} and {embedding}"
    )
    groups = [
        NodeGroupConfig(nodes=["text.*"], frozen_iters=embedding),
        NodeGroupConfig(nodes=["head"], frozen_iters=head),
    ]
    with pytest.raises(ValueError, match=message):
        trainable(groups, 0)
    groups[1] = changed(groups[1], {"frozen_iters": embedding})
    assert ("head" in trainable(groups, 0)) is ("text.embedding" in trainable(groups, 0)) is (embedding == 0)


def test_ranges_of_names():
    names = ["v.embeddings", "v.layers.0", "v.layers.1", "v.layers.2", "v.layers.4", "p.0.cross", "p.1.cross", "out"]
    assert collapsed(names) == ["v.embeddings", "v.layers.0-2,4", "p.0-1.cross", "out"]
    assert node_and_weight("v.layers.3.mlp.linear_fc1.weight") == ("v.layers.3", "mlp.linear_fc1.weight")
    assert node_and_weight("v.output.norm.weight") == ("v.output", "norm.weight")


def test_a_rate_of_their_own(monkeypatch):
    """Adam's first step moves every weight that has a gradient by its rate: truth is that ratio."""
    from tests.pipeline import toy

    config = changed(
        toy.small_config(),
        {
            "optimizer.groups": [NodeGroupConfig(nodes=["image.*"], lr_scale=0.25)],
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_grad": 0.0,
        },
    )
    monkeypatch.setattr(toy, "small_config", lambda: config)
    setup.initialize(ParallelSizes(), seed=1)
    pipeline, optimizer, built = build(Case())
    before = {name: p.detach().clone() for name, p in pipeline.bare_chunks[0].named_parameters()}
    optimizer.zero_grad()
    run_batch(pipeline, microbatches_of(Case(), 0, ParallelSizes()))
    optimizer.step(optimizer.gradient_norm(), 16)
    chunk = pipeline.bare_chunks[0]
    rate = optimizer.learning_rate
    assert rate == pytest.approx(built.optimizer.lr, rel=0.01)
    for index, node in enumerate(chunk.nodes):
        for name, parameter in chunk.node_modules[index].named_parameters():
            step = (parameter.detach() - before.get(f"node_modules.{index}.{name}", parameter.detach())).abs().max()
            expected = rate * (0.25 if node.name.startswith("image.") else 1.0)
            if (node.name, name) not in (("head", "weight"),):
                assert float(step) == pytest.approx(expected, rel=1e-3), (node.name, name)


def test_a_group_counts_its_own_steps(monkeypatch):
    """Adam's bias correction begins when a node does."""
    from tests.pipeline import toy

    config = changed(toy.small_config(), {"optimizer.groups": [NodeGroupConfig(nodes=["image.*"], frozen_iters=3)]})
    monkeypatch.setattr(toy, "small_config", lambda: config)
    monkeypatch.setattr(toy, "graph_of", lambda case: phase_graph(graph_of(case), config.optimizer.groups, 3))
    setup.initialize(ParallelSizes(), seed=1)
    pipeline, optimizer, _ = build(Case())
    weights = weights_of(pipeline)
    optimizer.restore(weights, {}, steps=3, samples=48)
    (adam,) = optimizer._torch_optimizers()
    chunk = pipeline.bare_chunks[0]
    steps = {
        node.name: float(adam.state[parameter]["step"])
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for parameter in module.parameters()
    }
    assert steps["image.layers.0"] == steps["image.embedding"] == 0 and steps["text.layers.0"] == steps["head"] == 3
    assert isinstance(adam, torch.optim.Adam)
