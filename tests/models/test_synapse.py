"""Synapse as a whole: precision, dropout with recomputation, freezing, and sizes that do not fit."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.layers.settings import LayerSettings, layer_config
from megatron_mm.parts.decoder.nodes import decoder_shape
from megatron_mm.platform import setup
from megatron_mm.systems.graph import build_graph
from tests.models import synapse_case as case


def test_bf16_follows_fp32():
    config, batch = case.tiny_config(), case.make_batch(case.tiny_config())
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        graph = build_graph(config, LayerSettings(dtype=dtype))
        modules = case.build(graph)
        assert {p.dtype for p in modules.parameters()} == {dtype}
        loss, streams = case.run(graph, modules, batch)
        assert loss.dtype is torch.float32
        assert streams["text"].dtype is streams["image_memory"].dtype is streams["audio_memory"].dtype is dtype
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in modules.parameters())
        losses[dtype] = loss.item()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=5e-3)


def test_selective_recomputation_repeats_the_same_dropout():
    config, batch = case.tiny_config(), case.make_batch(case.tiny_config())
    results = {}
    for recompute in ("none", "selective"):
        settings = LayerSettings(recompute=recompute, hidden_dropout=0.2, attention_dropout=0.3)
        graph = build_graph(config, settings)
        modules = case.build(graph)
        setup.seed_dropout(5)
        torch.manual_seed(5)
        results[recompute] = case.gradients(graph, modules, batch)
        evaluated = [case.run(graph, modules.eval(), batch)[0].item() for _ in range(2)]
        assert evaluated[0] == evaluated[1] != results[recompute][0]
    (loss, expected), (again, found) = results["none"], results["selective"]
    assert loss == again
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_frozen_tower_keeps_its_temporal_table_trainable():
    config = changed(case.tiny_config(), {"vision.frozen": True})
    graph = build_graph(config, LayerSettings())
    frozen = {node.name for node in graph.nodes if not node.trainable}
    assert frozen == {"vision.embeddings", "vision.layers.0", "vision.layers.1"}


def test_heads_that_tensor_parallelism_would_split_are_refused():
    settings = LayerSettings(sizes=ParallelSizes(tp=3))
    with pytest.raises(ValueError, match="8 attention heads do not divide over tensor parallel size 3"):
        layer_config(settings, decoder_shape(case.tiny_config().decoder, 0.02), sharded=True)


def test_nothing_reads_a_tensors_value():
    """A microbatch on meta has shapes but no values; the dry run passes one through every node and the loss."""
    config = case.tiny_config()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph).to("meta")
    loss, _ = case.run(graph, modules, case.make_batch(config).to("meta"))
    loss.backward()
    assert all(p.grad.shape == p.shape for p in modules.parameters())
