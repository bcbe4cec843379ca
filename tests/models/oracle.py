"""Weights of other implementations under our names, and the comparison of gradients by the same map."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mm.parts.decoder.section import DecoderConfig

Get = Callable[[str], torch.Tensor]


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    scale = max(expected.abs().max().item(), 1e-3)
    assert (found - expected).abs().max().item() <= 1e-5 * scale, name


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows of megatron-core's fused projection: for each group its queries, its key, its value."""
    width = q.shape[0] // heads
    parts = [x.reshape(groups, -1, width, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def pairs_of_kv(k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.stack((k.unflatten(0, (groups, -1)), v.unflatten(0, (groups, -1))), dim=1).flatten(0, 2)


def check(modules: torch.nn.Module, oracle: torch.nn.Module, ours: Callable[[Get], dict[str, torch.Tensor]]) -> None:
    """Compares the gradients of all parameters that `ours` names."""
    parameters = dict(oracle.named_parameters())
    expected = ours(lambda name: parameters[name].grad)
    found = {name.replace("/", "."): parameter for name, parameter in modules.named_parameters()}
    for name, gradient in expected.items():
        assert_close(found[name].grad, gradient, name)


def load(modules: torch.nn.Module, oracle: torch.nn.Module, ours: Callable[[Get], dict[str, torch.Tensor]]) -> None:
    """Fills our parameters; biases and norms of the oracle are made random first, so that nothing is 0 or 1."""
    parameters = dict(oracle.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif "embed_positions" not in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        mine = {name.replace("/", "."): parameter for name, parameter in modules.named_parameters()}
        for name, value in ours(lambda name: parameters[name]).items():
            assert mine[name].shape == value.shape, name
            mine[name].copy_(value)


def llama_names(decoder: DecoderConfig, get: Get) -> dict[str, torch.Tensor]:
    """Parameters of LlamaForCausalLM."""
    names = {
        "decoder.embedding.word_embeddings.weight": get("model.embed_tokens.weight"),
        "decoder.output.final_layernorm.weight": get("model.norm.weight"),
        "decoder.output.output_layer.weight": get("lm_head.weight"),
    }
    for i in range(decoder.num_layers):
        theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        qkv = [get(f"{theirs}self_attn.{x}_proj.weight") for x in "qkv"]
        names |= {
            ours + "input_layernorm.weight": get(theirs + "input_layernorm.weight"),
            ours + "self_attention.linear_qkv.weight": fused_qkv(
                *qkv, decoder.num_attention_heads, decoder.num_query_groups
            ),
            ours + "self_attention.linear_proj.weight": get(theirs + "self_attn.o_proj.weight"),
            ours + "pre_mlp_layernorm.weight": get(theirs + "post_attention_layernorm.weight"),
            ours + "mlp.linear_fc1.weight": torch.cat(
                (get(theirs + "mlp.gate_proj.weight"), get(theirs + "mlp.up_proj.weight"))
            ),
            ours + "mlp.linear_fc2.weight": get(theirs + "mlp.down_proj.weight"),
        }
    return names


def gpt2_layer_names(heads: int, get: Get, cross: bool = False) -> dict[str, torch.Tensor]:
    """Parameters of one GPT2Block; its matrices are [inputs, outputs]. Cross-attention without biases."""
    names = {}
    for ours, theirs in (
        ("input_layernorm", "ln_1"),
        ("pre_mlp_layernorm", "ln_2"),
        ("self_attention.linear_proj", "attn.c_proj"),
        ("mlp.linear_fc1", "mlp.c_fc"),
        ("mlp.linear_fc2", "mlp.c_proj"),
    ):
        names |= {f"{ours}.{kind}": get(f"{theirs}.{kind}").t() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        q, k, v = get(f"attn.c_attn.{kind}").t().chunk(3)
        names[f"self_attention.linear_qkv.{kind}"] = fused_qkv(q, k, v, heads, heads)
    if cross:
        key_value = get("crossattention.c_attn.weight").t().chunk(2)
        names |= {
            "pre_cross_attn_layernorm.weight": get("ln_cross_attn.weight"),
            "pre_cross_attn_layernorm.bias": get("ln_cross_attn.bias"),
            "cross_attention.linear_q.weight": get("crossattention.q_attn.weight").t(),
            "cross_attention.linear_kv.weight": pairs_of_kv(*key_value, heads),
            "cross_attention.linear_proj.weight": get("crossattention.c_proj.weight").t(),
        }
    return names
