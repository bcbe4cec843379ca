"""Transformer-XL: the attention against XLNet's, the encoder against a loop over segments, and what both must keep.

XLNet (Hugging Face) has the same relative attention behind a post-norm; fed segment by segment with detached memory it
is the oracle of the attention. The encoder as a whole is compared with plain autograd written out here.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import XLNetConfig, XLNetModel

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Loss
from megatron_mm.models.layers.relative_attention import SegmentPlan, distance_sinusoids, hidden_keys, relative_layer
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.transformer_xl.nodes import text_shape, transformer_xl_nodes
from megatron_mm.parts.transformer_xl.section import TransformerXLConfig
from megatron_mm.platform import setup
from megatron_mm.systems.perceiver_fusion.section import PerceiverFusionConfig
from tests.models import synapse_case as case
from tests.models.tensor_parallel import differences

VARIANTS = ("tokens_RT", "masked_tokens_RT")
LENGTHS = (24, 13, 7, 0)
"""Tokens of the rows: full, padding within the second of three segments, within the first, and nothing at all."""


def tiny() -> TransformerXLConfig:
    return TransformerXLConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, segment_length=8, vocab_size=64
    )


def text_batch(lengths: tuple[int, ...] = LENGTHS, length: int = 24, seed: int = 0) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    none = torch.full((rows, 1), -1)
    tokens, masked = torch.randint(0, 64, (2, rows, length), generator=generator)
    return Microbatch(
        plan=MicrobatchPlan(rows, length, 1, 1, 1, 1, True, length),
        document_ids_RT=torch.where(real, 0, -1),
        position_ids_RT=torch.arange(length).repeat(rows, 1),
        loss_mask_RT=real.float(),
        image_slots_RK=none,
        image_slot_documents_RK=none - 1,
        sound_slots_RJ=none,
        sound_slot_documents_RJ=none - 1,
        tokens_RT=tokens,
        masked_tokens_RT=masked,
    )


def encoder(text: TransformerXLConfig, settings: LayerSettings | None = None) -> tuple[Graph, nn.ModuleDict]:
    """The nodes with random weights; norms and biases too, u and v the same in all layers."""
    graph = Graph(transformer_xl_nodes(text, settings or LayerSettings(), 0.02, VARIANTS), [])
    modules = case.build(graph)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm.weight" in name))
            else:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
        for node in graph.nodes:
            for own, other in node.ties.items():
                owner, _, name = other.partition(".self_attention")
                tied = modules[owner.replace(".", "/")].get_parameter("self_attention" + name)
                modules[node.name.replace(".", "/")].get_parameter(own).copy_(tied)
    return graph, modules


def encode(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> torch.Tensor:
    return case.run(graph, modules, batch)[1]["text"]


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert found.shape == expected.shape, name
    scale = max(expected.abs().max().item(), 1e-3)
    assert (found - expected).abs().max().item() <= 1e-5 * scale, name


def test_attention_is_xlnets_fed_segment_by_segment():
    text, batch = tiny(), text_batch((24, 13, 7))
    rows, width, heads, length = 3, text.hidden_size, text.num_attention_heads, text.segment_length
    config = XLNetConfig(
        vocab_size=8, d_model=width, n_layer=1, n_head=heads, d_inner=8, attn_type="bi", dropout=0.0, mem_len=length
    )
    xlnet = XLNetModel(config)
    oracle = xlnet.layer[0].rel_attn
    oracle.layer_norm = nn.Identity()  # what is left of post-norm is the residual, which is taken off below
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = relative_layer(LayerSettings(), text_shape(text, 0.02), 1, None).self_attention

    def ours(get) -> dict[str, torch.Tensor]:
        qkv = torch.stack([get(name).permute(1, 2, 0) for name in "qkv"], dim=1)  # of each head q, k, v
        return {
            "linear_qkv.weight": qkv.reshape(3 * width, width),
            "linear_pos.weight": get("r").reshape(width, width).t(),
            "linear_proj.weight": get("o").reshape(width, width),
            "u": get("r_w_bias").flatten(),
            "v": get("r_r_bias").flatten(),
        }

    with torch.no_grad():
        for name, value in ours(lambda name: getattr(oracle, name)).items():
            attention.get_parameter(name).copy_(value)
    padding = batch.document_ids_RT < 0
    torch.manual_seed(3)
    hidden = torch.randn(rows, 24, width, requires_grad=True)
    upstream = torch.randn(rows, 24, width) * ~padding[..., None]
    plan = SegmentPlan(hidden_keys(padding, length), distance_sinusoids(length, width, torch.float32, "cpu"))
    found, _ = attention(hidden, packed_seq_params=plan)
    found.backward(upstream)

    theirs = hidden.detach().clone().requires_grad_()
    segments = theirs.transpose(0, 1).split(length)
    outputs = []
    for number, segment in enumerate(segments):
        memory = segments[number - 1].detach() if number else None
        keys = length * (2 if number else 1)
        end = (number + 1) * length
        mask = padding[:, end - keys : end].t().float()[None, :, :, None].expand(length, -1, -1, -1)
        positions = xlnet.relative_positional_encoding(length, keys, bsz=rows)
        output, _ = oracle(segment, None, mask, None, positions, None, mems=memory)
        outputs.append(output - segment)
    expected = torch.cat(outputs).transpose(0, 1)
    expected.backward(upstream)
    real = ~padding
    assert_close(found[real], expected[real], "output")
    assert_close(hidden.grad[real], theirs.grad[real], "input")
    for name, gradient in ours(lambda name: getattr(oracle, name).grad).items():
        assert_close(attention.get_parameter(name).grad, gradient, name)


def slow_encoder(weights: dict[str, torch.Tensor], text: TransformerXLConfig, batch: Microbatch) -> torch.Tensor:
    """The encoder by plain autograd: one row, one segment, one head and one pair of tokens' distance at a time."""
    length, heads = text.segment_length, text.num_attention_heads
    width, size = text.hidden_size // heads, text.hidden_size

    def norm(hidden: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(hidden, (size,), weights[name + ".weight"], weights[name + ".bias"])

    def sinusoid(distance: int) -> torch.Tensor:
        angles = [distance / 10000 ** (2 * i / size) for i in range(size // 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def attention(own: torch.Tensor, memory: torch.Tensor, real: torch.Tensor, layer: str) -> torch.Tensor:
        keys_from = torch.cat((memory, own))
        if not real.any():
            real = torch.ones_like(real)
        qkv = weights[layer + "linear_qkv.weight"].view(heads, 3, width, size)
        position = weights[layer + "linear_pos.weight"].view(heads, width, size)
        u, v = (weights[f"text.layers.0.self_attention.{name}"].view(heads, width) for name in "uv")
        offset = len(memory)
        distances = [[i + offset - j for j in range(len(keys_from))] for i in range(len(own))]
        sinusoids = torch.stack([torch.stack([sinusoid(d) for d in row]) for row in distances])
        outputs = []
        for head in range(heads):
            query, key, value = own @ qkv[head, 0].t(), keys_from @ qkv[head, 1].t(), keys_from @ qkv[head, 2].t()
            relative = sinusoids @ position[head].t()
            scores = (query + u[head]) @ key.t() + ((query + v[head])[:, None] * relative).sum(-1)
            scores = (scores / math.sqrt(width)).masked_fill(~real, float("-inf"))
            outputs.append(scores.softmax(-1) @ value)
        return torch.cat(outputs, dim=1) @ weights[layer + "linear_proj.weight"].t()

    rows = []
    for variant in VARIANTS:
        for tokens, documents in zip(getattr(batch, variant), batch.document_ids_RT):
            hidden = functional.embedding(tokens, weights["text.embedding.word_embeddings.weight"])
            for number in range(text.num_layers):
                layer = f"text.layers.{number}."
                normed = norm(hidden, layer + "input_layernorm")
                pieces = []
                for begin in range(0, len(tokens), length):
                    own, memory = normed[begin : begin + length], normed[max(0, begin - length) : begin].detach()
                    real = documents[max(0, begin - length) : begin + length] >= 0
                    if begin == 0 and not real.any():  # stands beside a memory of zeros, which it sees as well
                        memory, real = torch.zeros(length, size), torch.zeros(2 * length, dtype=torch.bool)
                    pieces.append(attention(own, memory, real, layer + "self_attention."))
                hidden = hidden + torch.cat(pieces)
                inner = norm(hidden, layer + "pre_mlp_layernorm") @ weights[layer + "mlp.linear_fc1.weight"].t()
                inner = functional.gelu(inner + weights[layer + "mlp.linear_fc1.bias"])
                hidden = hidden + inner @ weights[layer + "mlp.linear_fc2.weight"].t()
                hidden = hidden + weights[layer + "mlp.linear_fc2.bias"]
            rows.append(norm(hidden, "text.output.final_layernorm"))
    return torch.stack(rows)


@pytest.mark.slow
def test_encoder_is_a_loop_over_segments():
    """All parameters, padded and empty rows included; gradients of u and v are the sum over layers."""
    text, batch = tiny(), text_batch()
    graph, modules = encoder(text)
    found = encode(graph, modules, batch)
    torch.manual_seed(4)
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    weights = {
        name.replace("/", "."): parameter.detach().clone().requires_grad_()
        for name, parameter in modules.named_parameters()
    }
    expected = slow_encoder(weights, text, batch)
    expected.backward(upstream)
    assert_close(found, expected, "output")
    for name, parameter in modules.named_parameters():
        name = name.replace("/", ".")
        gradient = parameter.grad
        if name.endswith((".u", ".v")):
            if not name.startswith("text.layers.0"):
                continue
            tied = [f"text/layers/{i}.self_attention{name[-2:]}" for i in range(text.num_layers)]
            gradient = sum(modules.get_parameter(other).grad for other in tied)
        assert_close(gradient, weights[name].grad, name)


def test_padding_is_seen_by_nobody():
    """Other tokens in the padding change no real position; what padding computes is finite, and so are gradients."""
    graph, modules = encoder(tiny())
    batch, other = text_batch(), text_batch()
    real = (batch.document_ids_RT >= 0).repeat(2, 1)
    for name in VARIANTS:
        tokens = getattr(other, name)
        tokens[batch.document_ids_RT < 0] = (tokens[batch.document_ids_RT < 0] + 1) % 64
    found, changed = encode(graph, modules, batch), encode(graph, modules, other)
    assert torch.equal(found[real], changed[real])
    assert not torch.equal(found[~real], changed[~real])
    found.square().sum().backward()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in modules.parameters())


def test_one_segment_has_no_memory():
    """A row of one segment is the first segment of a longer row."""
    graph, modules = encoder(tiny())
    long, short = text_batch(), text_batch()
    short.plan = MicrobatchPlan(len(LENGTHS), 8, 1, 1, 1, 1, True, 8)
    for name in ("document_ids_RT", "position_ids_RT", *VARIANTS):
        setattr(short, name, getattr(short, name)[:, :8])
    assert_close(encode(graph, modules, short), encode(graph, modules, long)[:, :8])


def test_rows_that_are_not_whole_segments_are_refused():
    graph, modules = encoder(tiny())
    with pytest.raises(ValueError, match=r"rows of 20 tokens are not whole segments of text.segment_length 8"):
        encode(graph, modules, text_batch((20,), 20))


def test_recomputed_attention_repeats_its_dropout():
    results = []
    for recompute in ("none", "selective"):
        graph, modules = encoder(tiny(), LayerSettings(recompute=recompute, attention_dropout=0.3))
        setup.seed_dropout(5)
        found = encode(graph, modules, text_batch())
        found.square().sum().backward()
        results.append((found.detach(), [parameter.grad for parameter in modules.parameters()]))
        assert not torch.equal(encode(graph, modules, text_batch()), found)  # dropout is on
        modules.eval()
        assert torch.equal(encode(graph, modules, text_batch()), encode(graph, modules, text_batch()))
    (found, gradients), (again, repeated) = results
    assert torch.equal(found, again)
    for gradient, other in zip(gradients, repeated):
        torch.testing.assert_close(gradient, other)


def test_bf16_follows_fp32():
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        graph, modules = encoder(tiny(), LayerSettings(dtype=dtype))
        outputs[dtype] = encode(graph, modules, text_batch())
        assert outputs[dtype].dtype is dtype
        outputs[dtype].float().square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in modules.parameters())
    difference = outputs[torch.float32] - outputs[torch.bfloat16].float()
    assert difference.norm() / outputs[torch.float32].norm() < 0.03


def test_costs_are_what_is_built_and_what_runs():
    graph, modules = encoder(tiny())
    batch = text_batch().to("meta")
    context, streams = ForwardContext(batch), {}
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")].to("meta")
        with FlopCounterMode(display=False) as counter:
            streams["text"] = module(*[streams[name] for name in node.reads], context)
        cost = node.cost(batch.plan)
        own = [parameter for name, parameter in module.named_parameters() if name not in node.ties]
        assert cost.parameters == sum(parameter.numel() for parameter in own), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert streams["text"].shape == node.writes[0].shape(batch.plan), node.name
    streams["text"].sum().backward()  # no value is read on the way back either
    assert all(parameter.grad.shape == parameter.shape for parameter in modules.parameters())


def test_stored_bytes_cover_what_autograd_keeps():
    graph, modules = encoder(tiny())
    node, module = graph.nodes[2], modules["text/layers/1"]
    batch = text_batch()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    stream = torch.randn(node.writes[0].shape(batch.plan), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(stream, ForwardContext(batch))
    expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
    assert 0.75 <= sum(kept.values()) / expected <= 1.25, (sum(kept.values()), expected)
    del output


def test_the_reference_has_12_billion_parameters():
    """SYSTEMS: 12.003B with the embedding."""
    nodes = transformer_xl_nodes(PerceiverFusionConfig().text, LayerSettings(), 0.02, VARIANTS)
    plan = MicrobatchPlan(16, 256, 16, 1, 1, 1, True, 256)
    total = sum(node.cost(plan).parameters for node in nodes)
    assert round(total / 1e9, 3) == 12.003


def test_checkpoint_keys_are_those_of_every_stack():
    module = encoder(tiny())[1]["text/layers/1"]
    entries = {v.key: v for v in module.sharded_state_dict("text.layers.1.").values() if hasattr(v, "key")}
    entries = {key: value for key, value in entries.items() if "_extra_state" not in key}
    assert len(entries) == len(list(module.parameters()))
    assert "text.layers.1.self_attention.linear_qkv.layer_norm_weight" in entries
    assert "text.layers.1.mlp.linear_fc1.layer_norm_bias" in entries
    assert entries["text.layers.1.self_attention.u"].data.shape == (32,)


@pytest.mark.slow
def test_two_tensor_parallel_processes_are_one(tmp_path):
    found = differences("tests.models.test_transformer_xl:parallel_case", tmp_path)
    assert len(found) > 30
    assert {key: value for key, value in found.items() if value > 1e-5} == {}


def parallel_case(settings: LayerSettings) -> tuple[Graph, Microbatch]:
    """The encoder with large weights and a loss of all its outputs."""

    def weigh(text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return (text * torch.randn(text.shape, generator=torch.Generator().manual_seed(11))).sum()

    loss = Loss("weighed", weigh, lambda batch: torch.ones(()), ("text",))
    return Graph(transformer_xl_nodes(tiny(), settings, 0.3, VARIANTS), [loss]), text_batch()
