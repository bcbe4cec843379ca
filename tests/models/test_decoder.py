"""Bidirectional text against Llama with a full mask; memory layers, bidirectional text and pooling in layouts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mm.models.graph import Graph
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.parts.decoder.nodes import DecoderNodes
from tests.models import memory_case as case
from tests.models import synapse_case
from tests.models.oracle import assert_close, check, llama_names, load
from tests.support.graph_layouts import largest_difference, step, steps_in_processes

EVERY_KIND = "tests.models.memory_case:every_kind"
LAYOUTS = ("TP2xCP2+SP", "TP2xPP2+SP+full", "CP2xPP2", "CP2xDP2")


def plain_decoder(causal: bool) -> Graph:
    decoder = DecoderNodes(case.DECODER, LayerSettings(), 0.02, lambda plan: causal)
    layers = [decoder.layer(index) for index in range(case.DECODER.num_layers)]
    return Graph([decoder.embedding(), *layers, decoder.output()], [])


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_text_is_llama_with_a_mask_of_documents(packed):
    """Each token sees all of its document and nothing else."""
    sizes = case.DECODER
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            rms_norm_eps=sizes.layernorm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rotary_base},
            attn_implementation="eager",
        )
    )
    torch.manual_seed(0)
    graph = plain_decoder(causal=False)
    modules = synapse_case.build(graph)
    load(modules, llama, lambda get: llama_names(sizes, get))
    batch = case.batch_of(range(5))
    if packed:
        batch.document_ids_RT = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1]]).repeat(5, 1)
        batch.position_ids_RT = torch.tensor([[0, 1, 0, 1, 2, 0, 0, 1]]).repeat(5, 1)
        batch.plan = type(batch.plan)(**{**batch.plan.__dict__, "one_document_per_row": False})
    documents = batch.document_ids_RT
    seen = documents[:, :, None] == documents[:, None, :]
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    expected = llama(batch.tokens_RT, attention_mask=mask, position_ids=batch.position_ids_RT).logits
    found = synapse_case.logits_of(graph, modules, batch)
    text = documents >= 0
    assert_close(found[text], expected[text], "logits")
    upstream = torch.randn(expected.shape) * text[..., None]
    found.backward(upstream)
    expected.backward(upstream)
    check(modules, llama, lambda get: llama_names(sizes, get))


@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_a_later_token(causal):
    """Both plans of the same weights: another last token changes what comes before it in a bidirectional row only."""
    graph = plain_decoder(causal)
    modules = synapse_case.build(graph)
    batch = case.batch_of([6])  # of eight tokens
    assert (batch.document_ids_RT >= 0).all()
    before = synapse_case.logits_of(graph, modules, batch)
    batch.tokens_RT[0, -1] = (batch.tokens_RT[0, -1] + 1) % 64
    after = synapse_case.logits_of(graph, modules, batch)
    assert torch.equal(before[:, :-1], after[:, :-1]) is causal
    assert not torch.equal(before[:, -1], after[:, -1])


def test_the_loss_leaves_no_trace_in_a_graph_without_masked_positions():
    batch = case.batch_of(range(3))
    batch.loss_mask_RT = torch.zeros_like(batch.loss_mask_RT)
    graph = plain_decoder(causal=True)
    modules = synapse_case.build(graph)
    loss, _ = synapse_case.run(Graph(graph.nodes, [causal_lm_loss()]), modules, batch)
    loss.backward()
    assert loss.item() == 0 and all((parameter.grad == 0).all() for parameter in modules.parameters())


@pytest.fixture(scope="module")
def in_layouts(tmp_path_factory):
    runs = [(EVERY_KIND, layout, 4) for layout in LAYOUTS]
    return dict(zip(LAYOUTS, steps_in_processes(runs, tmp_path_factory.mktemp("layouts")), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(in_layouts, layout):
    """Gated and ungated layers of text and of a tower, last states of sharded text, bidirectional attention."""
    one = step(EVERY_KIND, "DP1", 4)
    assert len(one["gradients"]) > 40
    assert largest_difference(in_layouts[layout], one) <= 2e-5
