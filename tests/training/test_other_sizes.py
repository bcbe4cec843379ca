"""Checkpoints of a model of other sizes: every node that does not fit is named, at both doors."""

import pytest

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.save import save
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training import warm_start
from megatron_mm.training.optimizer import Optimizer
from tests.support.recipes import small_vlm


def build(config):
    device = setup.initialize(ParallelSizes(), seed=1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=1)
    return pipeline, Optimizer(config, pipeline)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config, folder = small_vlm(), tmp_path_factory.mktemp("source")
    save(config, folder, *build(config), Position(1, 8))
    return checkpoint.find(folder)


def refusals(source, config) -> list[list[str]]:
    """Lines of the messages of a start from weights and of a resumed run."""
    pipeline, optimizer = build(config)
    messages = []
    for load in (
        lambda: warm_start.load_pretrained([source], pipeline, optimizer, ["decoder.*", "vision.*"]),
        lambda: checkpoint.load(source, pipeline, optimizer),
    ):
        with pytest.raises(ValueError, match=r"iter_0000001 is of a model of other sizes:") as caught:
            load()
        messages.append([line.strip() for line in str(caught.value).splitlines()[1:]])
    return messages


def test_another_inner_width(source):
    """SwiGLU's two halves are stored as one: 2 x 96 rows, and 2 x 128."""
    config = changed(small_vlm(), {"model.decoder.ffn_hidden_size": 128})
    rest = ".mlp.linear_fc1.weight is (192, 64) where this model needs (256, 64); 1 more of its weights differ"
    expected = [f"decoder.layers.0-3{rest}", f"decoder.cross_layers.0-1{rest}"]
    for lines in refusals(source, config):
        assert sorted(lines) == sorted(expected)


def test_another_width(source):
    config = changed(small_vlm(), {"model.decoder.hidden_size": 128})
    warm, resumed = refusals(source, config)
    assert "decoder.embedding.word_embeddings.weight is (128, 64) where this model needs (128, 128)" in warm
    nodes = ["decoder.cross_layers.0-1", "decoder.embedding", "decoder.layers.0-3", "decoder.output"]
    for lines, expected in ((warm, nodes), (resumed, ["contrastive.text", *nodes])):
        assert len(lines) == len(expected)
        for line, node in zip(sorted(lines), expected):
            assert line.startswith(f"{node}.") and "where this model needs (" in line
