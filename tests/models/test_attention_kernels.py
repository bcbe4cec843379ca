"""What is asked of Transformer Engine, and what a run says of its attention. (Answers: tests/gpu_stack/shapes.py.)"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers import attention
from megatron_mm.models.layers.attention_kernels import describe, request
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.planner.assembly import layer_settings
from megatron_mm.platform import setup
from megatron_mm.systems.graph import build_graph
from tests.models import synapse_case as case
from tests.support import recipes

VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:  # set first, so that what a test leaves is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("wanted", "values"), [("flash", "100"), ("fused", "010"), ("unfused", "001")])
def test_a_choice_sets_the_variables_that_megatron_sets(environment, wanted, values):
    request(wanted)
    assert "".join(os.environ[name] for name in VARIABLES) == values
    request(wanted)


def test_auto_leaves_the_environment_and_contradictions_are_named(environment):
    environment.setenv("NVTE_FLASH_ATTN", "0")
    request("auto")
    assert "NVTE_FUSED_ATTN" not in os.environ
    with pytest.raises(ValueError, match=r"flash needs NVTE_FLASH_ATTN=1, but .* NVTE_FLASH_ATTN=0"):
        request("flash")


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (recipes.small_config, ["scaled_dot_product_attention"]),
        (
            recipes.small_avt,
            ["matrix products, for relative positions", "scaled_dot_product_attention", "with a position bias"],
        ),
        (recipes.small_perceiver_fusion, ["matrix products, for relative positions", "scaled_dot_product_attention"]),
    ],
)
def test_all_attention_of_a_system_is_described(make, lines):
    setup.apply_platform()
    settings = layer_settings(make(), ParallelSizes(), "cpu")
    nodes = [node.build() for node in build_graph(make().model, settings).nodes]
    said = describe((module for node in nodes for module in node.modules()), settings, 32)
    assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said)), said


def test_context_parallelism_is_described():
    graph = build_graph(case.tiny_config(), LayerSettings())
    modules = list(next(node for node in graph.nodes if node.name == "decoder.layers.0").build().modules())
    for comm, expected in (("all_gather", "all_gather"), ("a2a", "a2a"), ("p2p", "all_gather (p2p is Transformer")):
        said = describe(modules, LayerSettings(ParallelSizes(cp=2), cp_comm_type=comm), 32)
        assert said[0].startswith(f"context parallel by {expected}"), said


@pytest.mark.parametrize(
    ("packed", "single", "causal", "comm", "exchange"),
    [
        (False, True, True, "all_gather", "gather"),
        (False, True, True, "p2p", "gather"),
        (False, False, True, "a2a", "heads"),
        (True, False, True, "all_gather", "gather"),
        (True, False, True, "a2a", "heads"),
        (True, True, False, "p2p", "gather"),
        (True, True, True, "all_gather", "core"),
        (True, True, True, "a2a", "core"),
        (True, True, True, "p2p", "core"),
    ],
)
def test_each_microbatch_takes_an_exchange_that_serves_it(monkeypatch, packed, single, causal, comm, exchange):
    """Transformer Engine's where a row is one document and tokens see earlier ones; ours otherwise."""
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_rank", lambda: 0)
    batch = case.make_batch(case.tiny_config())
    batch.plan = replace(batch.plan, one_document_per_row=single)
    plan = attention.text_plan(
        ForwardContext(batch), head_dim=8, rotary_base=1e4, dtype=torch.float32, packed=packed, cp_comm_type=comm,
        causal=causal,
    )  # fmt: skip
    assert plan.exchange == exchange
    whole_rows = exchange == "core" or (exchange == "heads" and single and causal)
    assert (plan.mask is None) == (packed or whole_rows) and bool(plan.segments) == (packed and not whole_rows)
