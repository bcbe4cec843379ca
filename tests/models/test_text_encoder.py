"""The text encoder against GPT-2 and OPT with the same weights: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2Model, OPTConfig, OPTModel

from megatron_mm.models.graph import ForwardContext, Graph, Loss
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.text_encoder.nodes import text_nodes
from megatron_mm.parts.text_encoder.section import TextEncoderConfig
from tests.models import synapse_case
from tests.models.memory_case import batch_of
from tests.models.oracle import assert_close, check, fused_qkv, gpt2_layer_names, load
from tests.models.tensor_parallel import differences

ROWS = 4


def encoder(activation: str) -> TextEncoderConfig:
    """Two layers, and more positions than the rows have tokens."""
    return TextEncoderConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64, max_positions=12,
        activation=activation,
    )  # fmt: skip


def gpt2() -> tuple[nn.Module, callable]:
    config = GPT2Config(
        vocab_size=64, n_positions=12, n_embd=32, n_layer=2, n_head=4, n_inner=48, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip

    def names(get):
        found = {
            "text.embedding.word_embeddings.weight": get("wte.weight"),
            "text.embedding.position_embedding": get("wpe.weight"),
            "text.output.final_layernorm.weight": get("ln_f.weight"),
            "text.output.final_layernorm.bias": get("ln_f.bias"),
        }
        for i in range(2):
            layer = gpt2_layer_names(4, lambda name, i=i: get(f"h.{i}.{name}"))
            found |= {f"text.layers.{i}.{name}": value for name, value in layer.items()}
        return found

    return GPT2Model(config), names


def opt() -> tuple[nn.Module, callable]:
    """OPT keeps two rows of its position table for nothing."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=12,
        num_attention_heads=4, dropout=0.0, attention_dropout=0.0, pad_token_id=None, bos_token_id=0, eos_token_id=0,
        word_embed_proj_dim=32,
    )  # fmt: skip

    def names(get):
        found = {
            "text.embedding.word_embeddings.weight": get("decoder.embed_tokens.weight"),
            "text.embedding.position_embedding": get("decoder.embed_positions.weight")[2:],
        }
        for kind in ("weight", "bias"):
            found[f"text.output.final_layernorm.{kind}"] = get(f"decoder.final_layer_norm.{kind}")
            for i in range(2):
                theirs, ours = f"decoder.layers.{i}.", f"text.layers.{i}."
                qkv = [get(f"{theirs}self_attn.{x}_proj.{kind}") for x in "qkv"]
                found |= {
                    f"{ours}input_layernorm.{kind}": get(f"{theirs}self_attn_layer_norm.{kind}"),
                    f"{ours}self_attention.linear_qkv.{kind}": fused_qkv(*qkv, 4, 4),
                    f"{ours}self_attention.linear_proj.{kind}": get(f"{theirs}self_attn.out_proj.{kind}"),
                    f"{ours}pre_mlp_layernorm.{kind}": get(f"{theirs}final_layer_norm.{kind}"),
                    f"{ours}mlp.linear_fc1.{kind}": get(f"{theirs}fc1.{kind}"),
                    f"{ours}mlp.linear_fc2.{kind}": get(f"{theirs}fc2.{kind}"),
                }
        return found

    return OPTModel(config), names


@pytest.mark.parametrize(("make", "activation"), [(gpt2, "gelu_tanh"), (opt, "relu")])
def test_encoder_is_gpt2_and_opt(make, activation):
    oracle, names = make()
    torch.manual_seed(0)
    graph = Graph(text_nodes(encoder(activation), LayerSettings(), 0.02), [])
    modules = synapse_case.build(graph)
    load(modules, oracle, names)
    with torch.no_grad():  # `load` leaves OPT's positions as they begin
        modules["text/embedding"].position_embedding.add_(torch.randn(12, 32))
        table = dict(oracle.named_parameters()).get("decoder.embed_positions.weight", None)
        if table is None:
            oracle.wpe.weight.copy_(modules["text/embedding"].position_embedding)
        else:
            table[2:] = modules["text/embedding"].position_embedding
    batch = batch_of(range(ROWS))
    _, streams = synapse_case.run(graph, modules, batch)
    seen = batch.document_ids_RT >= 0
    expected = oracle(input_ids=batch.tokens_RT, attention_mask=seen.long()).last_hidden_state
    assert_close(streams["text"][seen], expected[seen], "states")
    upstream = torch.randn(expected.shape) * seen[..., None]
    streams["text"].backward(upstream)
    expected.backward(upstream)
    check(modules, oracle, names)
    ours = {name.replace("/", ".") for name, _ in modules.named_parameters()}
    assert ours == set(names(dict(oracle.named_parameters()).__getitem__))


def test_costs_are_what_is_built_and_what_runs():
    graph = Graph(text_nodes(encoder("gelu"), LayerSettings(), 0.02), [])
    modules, batch = synapse_case.build(graph).to("meta"), batch_of(range(ROWS)).to("meta")
    context, stream = ForwardContext(batch), ()
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")]
        with FlopCounterMode(display=False) as counter:
            stream = (module(*stream, context),)
        cost = node.cost(batch.plan)
        assert cost.parameters == sum(parameter.numel() for parameter in module.parameters()), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert stream[0].shape == node.writes[0].shape(batch.plan), node.name


def tensor_parallel_case(settings: LayerSettings):
    """The encoder and a loss of all of its output."""

    def weigh(text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return (text * torch.randn(text.shape, generator=torch.Generator().manual_seed(3))).sum()

    nodes = text_nodes(encoder("gelu_tanh"), settings, 0.3)
    return Graph(nodes, [Loss("weighed", weigh, lambda batch: torch.ones(()), ("text",))]), batch_of(range(ROWS))


@pytest.mark.slow
def test_tensor_parallel_processes_equal_one(tmp_path):
    found = differences("tests.models.test_text_encoder:tensor_parallel_case", tmp_path)
    assert "text.embedding.position_embedding" in found
    assert max(found.values()) <= 1e-5, found
