"""Layers that read a memory against blocks of Hugging Face's with the same weights: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, MllamaTextCrossAttention

from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.attention import causal_plan, document_mask
from megatron_mm.models.layers.memory_attention import memory_layer
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.decoder.nodes import DecoderNodes, decoder_shape
from megatron_mm.parts.vit.rows import image_of_row, row_images
from megatron_mm.platform import setup
from tests.models import memory_case as case
from tests.models.oracle import assert_close, check, fused_qkv, gpt2_layer_names, load, pairs_of_kv
from tests.models.synapse_case import fill

ROWS, LENGTH, MEMORY, WIDTH = 5, case.LENGTH, case.MEMORY, 32
HEADS, GROUPS, FFN = 4, 2, 48


@pytest.fixture
def batch():
    """Five rows, the second and the last without image."""
    torch.manual_seed(0)
    return case.batch_of(range(ROWS))


def leaves(*shapes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two leaves of the same random values for each shape."""
    values = [torch.randn(shape) for shape in shapes]
    return [(value.clone().requires_grad_(), value.clone().requires_grad_()) for value in values]


def added(seen: torch.Tensor) -> torch.Tensor:
    """A mask of visible positions [R, M] as Hugging Face adds it to scores."""
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None, None]


def assert_all_named(module: nn.Module, names) -> None:
    assert {name for name, _ in module.named_parameters()} == set(names)


def test_a_towers_layer_is_gpt2s_block_with_cross_attention(batch):
    config = GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_inner=FFN, add_cross_attention=True, attn_implementation="eager",
        attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    oracle = GPT2Block(config)
    for part in ("q_attn", "c_attn", "c_proj"):  # ours has no biases there
        linear = getattr(oracle.crossattention, part)
        del linear.bias
        linear.register_buffer("bias", torch.zeros(linear.nf))

    def names(get):
        return gpt2_layer_names(HEADS, get, cross=True)

    kind = {"memory_width": WIDTH, "sharded": False, "plan": causal_plan}
    layer = memory_layer(LayerSettings(), case.TOWER, 1, case.half_seen, **kind)
    load(layer, oracle, names)
    (hidden, theirs), (memory, their_memory) = leaves((ROWS, LENGTH, WIDTH), (ROWS, MEMORY, WIDTH))
    upstream = torch.randn(ROWS, LENGTH, WIDTH)
    found = layer(hidden, memory, ForwardContext(batch))
    found.backward(upstream)

    index, seen = case.half_seen(batch)
    has = seen.any(dim=1)
    assert has.tolist() == [True, False, True, True, False] and not seen[0].all()
    causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    reading = oracle(
        theirs[has],
        attention_mask=causal,
        encoder_hidden_states=their_memory[index[has]],
        encoder_attention_mask=added(seen[has]),
    )
    alone = oracle(theirs[~has], attention_mask=causal)
    (reading * upstream[has]).sum().backward()
    (alone * upstream[~has]).sum().backward()
    assert_close(found[has], reading, "rows with memory")
    assert_close(found[~has], alone, "rows without memory: the attention adds exactly zero")
    assert_close(hidden.grad, theirs.grad, "hidden")
    assert_close(memory.grad, their_memory.grad, "memory")
    assert (memory.grad[0, ~seen[0]] == 0).all(), "hidden positions"
    check(layer, oracle, names)
    assert_all_named(layer, names(dict(oracle.named_parameters()).__getitem__))


class ReadingLlama(nn.Module):
    """Llama's layer with Mllama's cross-attention, without its norms of heads, between self-attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_attention_heads": HEADS, "rms_norm_eps": 1e-5}
        llama = LlamaConfig(
            **sizes,
            num_key_value_heads=GROUPS,
            rope_parameters={"rope_type": "default", "rope_theta": case.DECODER.rotary_base},
            attn_implementation="eager",
        )
        self.layer = LlamaDecoderLayer(llama, 0)
        self.angles = LlamaRotaryEmbedding(llama)
        self.norm = LlamaRMSNorm(WIDTH, eps=1e-5)
        mllama = MllamaTextConfig(**sizes, num_key_value_heads=GROUPS, dropout=0.0, attn_implementation="eager")
        self.cross = MllamaTextCrossAttention(mllama, 0)
        self.cross.q_norm = self.cross.k_norm = nn.Identity()
        for name in ("k_proj", "v_proj"):
            setattr(self.cross, name, nn.Linear(case.MEMORY_WIDTH, GROUPS * WIDTH // HEADS, bias=False))

    def forward(self, hidden, mask, memory, memory_mask, has_memory):
        """[R, T, H] -> [R, T, H]; rows without memory pass the cross-attention by."""
        layer = self.layer
        positions = self.angles(hidden, torch.arange(hidden.shape[1])[None])
        mixed, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden), position_embeddings=positions, attention_mask=mask
        )
        hidden = hidden + mixed
        read, _ = self.cross(self.norm(hidden), cross_attention_states=memory, attention_mask=memory_mask)
        hidden = hidden + read * has_memory[:, None, None]
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def names(self, get):
        """Our names."""
        attention, mlp = "layer.self_attn.", "layer.mlp."
        qkv = [get(f"{attention}{part}_proj.weight") for part in "qkv"]
        return {
            "input_layernorm.weight": get("layer.input_layernorm.weight"),
            "self_attention.linear_qkv.weight": fused_qkv(*qkv, HEADS, GROUPS),
            "self_attention.linear_proj.weight": get(f"{attention}o_proj.weight"),
            "pre_cross_attn_layernorm.weight": get("norm.weight"),
            "cross_attention.linear_q.weight": get("cross.q_proj.weight"),
            "cross_attention.linear_kv.weight": pairs_of_kv(
                get("cross.k_proj.weight"), get("cross.v_proj.weight"), GROUPS
            ),
            "cross_attention.linear_proj.weight": get("cross.o_proj.weight"),
            "pre_mlp_layernorm.weight": get("layer.post_attention_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat((get(f"{mlp}gate_proj.weight"), get(f"{mlp}up_proj.weight"))),
            "mlp.linear_fc2.weight": get(f"{mlp}down_proj.weight"),
        }


@pytest.mark.parametrize("causal", [True, False])
def test_a_decoders_layer_is_llamas_with_mllamas_cross_attention(batch, causal):
    oracle = ReadingLlama()
    decoder = DecoderNodes(case.DECODER, LayerSettings(), 0.02, lambda plan: causal)
    kind = {"memory_width": case.MEMORY_WIDTH, "sharded": True, "plan": decoder.plan}
    layer = memory_layer(LayerSettings(), decoder.shape, 1, case.half_seen, **kind)
    load(layer, oracle, oracle.names)
    shapes = (ROWS, LENGTH, WIDTH), (ROWS, MEMORY, case.MEMORY_WIDTH)
    (hidden, theirs), (memory, their_memory) = leaves(*shapes)
    upstream = torch.randn(shapes[0])
    found = layer(hidden.view(-1, 1, WIDTH), memory, ForwardContext(batch)).view(shapes[0])
    found.backward(upstream)
    index, seen = case.half_seen(batch)
    mask = document_mask(batch, torch.float32, causal).clamp(min=torch.finfo(torch.float32).min)
    has = seen.any(dim=1)
    expected = oracle(theirs, mask, their_memory[index], added(seen | ~has[:, None]), has)
    expected.backward(upstream)
    assert_close(found, expected, "output")
    assert_close(hidden.grad, theirs.grad, "hidden")
    assert_close(memory.grad, their_memory.grad, "memory")
    check(layer, oracle, oracle.names)
    assert_all_named(layer, oracle.names(dict(oracle.named_parameters()).__getitem__))


def test_a_gated_layer_is_mllamas(batch):
    """Mllama's layer, which also closes the MLP of rows without image; ours keeps it, as text learns from it too."""
    groups = 4
    config = MllamaTextConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_attention_heads=HEADS, num_key_value_heads=groups,
        rms_norm_eps=1e-5, dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    oracle = MllamaCrossAttentionDecoderLayer(config, 0)
    for name in ("k_proj", "v_proj"):
        setattr(oracle.cross_attn, name, nn.Linear(case.MEMORY_WIDTH, groups * WIDTH // HEADS, bias=False))

    def names(get):
        mlp, cross = "mlp.", "cross_attn."
        key_value = [get(f"{cross}{part}_proj.weight") for part in "kv"]
        return {
            "pre_cross_attn_layernorm.weight": get("input_layernorm.weight"),
            "cross_attention.linear_q.weight": get(f"{cross}q_proj.weight"),
            "cross_attention.linear_kv.weight": pairs_of_kv(*key_value, groups),
            "cross_attention.q_layernorm.weight": get(f"{cross}q_norm.weight"),
            "cross_attention.k_layernorm.weight": get(f"{cross}k_norm.weight"),
            "cross_attention.linear_proj.weight": get(f"{cross}o_proj.weight"),
            "cross_attn_bda.gate": get("cross_attn_attn_gate"),
            "pre_mlp_layernorm.weight": get("post_attention_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat((get(f"{mlp}gate_proj.weight"), get(f"{mlp}up_proj.weight"))),
            "mlp.linear_fc2.weight": get(f"{mlp}down_proj.weight"),
            "mlp_bda.gate": get("cross_attn_mlp_gate"),
        }

    shape = decoder_shape(case.DECODER, 0.02)
    kind = {"memory_width": case.MEMORY_WIDTH, "sharded": True, "qk_layernorm": True}
    layer = memory_layer(LayerSettings(), shape, 1, row_images, cross_query_groups=groups, gate_init=0.0, **kind)
    load(layer, oracle, names)
    with torch.no_grad():
        for gate in (oracle.cross_attn_attn_gate, oracle.cross_attn_mlp_gate):
            gate.add_(0.6)
        layer.cross_attn_bda.gate.copy_(oracle.cross_attn_attn_gate)
        layer.mlp_bda.gate.copy_(oracle.cross_attn_mlp_gate)
    shapes = (ROWS, LENGTH, WIDTH), (ROWS, MEMORY, case.MEMORY_WIDTH)
    (hidden, theirs), (memory, their_memory) = leaves(*shapes)
    upstream = torch.randn(shapes[0])
    found = layer(hidden.view(-1, 1, WIDTH), memory, ForwardContext(batch)).view(shapes[0])
    found.backward(upstream)

    _, has = row_images(batch)
    reading = oracle(
        theirs[has],
        cross_attention_states=their_memory[image_of_row(batch)[has]],
        cross_attention_mask=torch.zeros(1, 1, 1, MEMORY),
        attention_mask=None,
        full_text_row_masked_out_mask=torch.ones(int(has.sum()), 1, LENGTH, 1),
    )
    alone = theirs[~has]
    alone = alone + oracle.cross_attn_mlp_gate.tanh() * oracle.mlp(oracle.post_attention_layernorm(alone))
    ((reading * upstream[has]).sum() + (alone * upstream[~has]).sum()).backward()
    assert_close(found[has], reading, "rows with an image")
    assert_close(found[~has], alone, "rows without an image")
    assert_close(hidden.grad, theirs.grad, "hidden")
    assert_close(memory.grad, their_memory.grad, "memory")
    assert (memory.grad[~has] == 0).all()
    check(layer, oracle, names)
    assert_all_named(layer, names(dict(oracle.named_parameters()).__getitem__))


def nodes_with_memory(settings: LayerSettings | None = None):
    """Gated, ungated and tower's layer."""
    graph, _ = case.every_kind(settings or LayerSettings())
    return [node for node in graph.nodes if "image_memory" in node.reads]


def inputs_of(node, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream that a node rewrites, and the memory."""
    return torch.randn(node.writes[0].shape(batch.plan), requires_grad=True), torch.randn(ROWS, MEMORY, 24)


def test_closed_gates_change_nothing(batch):
    settings, shape = LayerSettings(), decoder_shape(case.DECODER, 0.3)
    kind = {"memory_width": 24, "sharded": True, "gate_init": 0.0}
    layer = fill(memory_layer(settings, shape, 1, row_images, **kind))
    stream, memory = torch.randn(ROWS * LENGTH, 1, WIDTH), torch.randn(ROWS, MEMORY, 24)
    assert torch.equal(layer(stream, memory, ForwardContext(batch)), stream)


@pytest.mark.parametrize("at", range(3), ids=["gated", "ungated", "tower"])
def test_evaluation_keeps_no_branch(batch, at):
    """megatron-core adds residuals with gradients enabled; a gate's product would keep the branch that it scales."""
    node = nodes_with_memory()[at]
    module = fill(node.build())
    stream, memory = (value.detach() for value in inputs_of(node, batch))
    with torch.no_grad():
        assert not module(stream, memory, ForwardContext(batch)).requires_grad


@pytest.mark.parametrize("at", range(3), ids=["gated", "ungated", "tower"])
def test_costs_are_what_is_built_and_what_runs(batch, at):
    node = nodes_with_memory()[at]
    module = node.build().to("meta")  # the counter knows attention on meta only
    inputs = [tensor.to("meta") for tensor in inputs_of(node, batch)]
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs, ForwardContext(batch.to("meta")))
    cost = node.cost(batch.plan)
    assert output.shape == inputs[0].shape
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert cost.forward_flops == counter.get_total_flops()


@pytest.mark.parametrize("at", range(3), ids=["gated", "ungated", "tower"])
def test_stored_bytes_cover_what_autograd_keeps(batch, at):
    node = nodes_with_memory()[at]
    module = fill(node.build())
    stream, memory = inputs_of(node, batch)
    others = {value.untyped_storage().data_ptr() for value in (*module.parameters(), memory)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(stream, memory, ForwardContext(batch))
    expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
    assert 0.75 <= sum(kept.values()) / expected <= 1.25, (sum(kept.values()), expected)
    del output


@pytest.mark.parametrize("at", range(3), ids=["gated", "ungated", "tower"])
def test_selective_recomputation_repeats_the_same_dropout(batch, at):
    results = []
    for recompute in ("none", "selective"):
        settings = LayerSettings(recompute=recompute, hidden_dropout=0.2, attention_dropout=0.3)
        node = nodes_with_memory(settings)[at]
        module = fill(node.build())
        torch.manual_seed(1)
        stream, memory = inputs_of(node, batch)
        setup.seed_dropout(5)
        torch.manual_seed(5)
        output = module(stream, memory, ForwardContext(batch))
        output.square().sum().backward()
        results.append((output, stream.grad, {name: p.grad for name, p in module.named_parameters()}))
        module.eval()
        evaluated = [module(stream, memory, ForwardContext(batch)) for _ in range(2)]
        assert torch.equal(*evaluated) and not torch.equal(evaluated[0], output)
    (output, gradient, gradients), (again, found, repeated) = results
    assert torch.equal(output, again)
    torch.testing.assert_close(found, gradient)
    for name, value in gradients.items():
        torch.testing.assert_close(repeated[name], value, msg=name)


@pytest.mark.parametrize("at", range(3), ids=["gated", "ungated", "tower"])
def test_bf16_follows_fp32(batch, at):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        node = nodes_with_memory(LayerSettings(dtype=dtype))[at]
        module = fill(node.build())
        torch.manual_seed(1)
        stream, memory = (value.detach().to(dtype) for value in inputs_of(node, batch))
        output = module(stream, memory, ForwardContext(batch))
        assert output.dtype is dtype
        output.float().square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
        results.append(output.float())
    assert (results[1] - results[0]).norm() / results[0].norm() < 0.03
