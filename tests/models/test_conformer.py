"""The Conformer tower against Hugging Face's, over tensor-parallel processes, and against its closed-form costs.

Oracles are Wav2Vec2ConformerModel, with LayerNorm over channels put in place of its BatchNorm (the one documented
difference), and Wav2Vec2-BERT's layer as it is, which has that LayerNorm but shifts its convolution to the past.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2BertConfig, Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
    Wav2Vec2BertEncoderLayer,
    Wav2Vec2BertRelPositionalEmbedding,
)

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, names_of
from megatron_mm.models.initialization import initialize_module
from megatron_mm.models.layers.conformer import relative_positions
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.parts.conformer.section import ConformerConfig
from megatron_mm.platform import setup
from tests.models import conformer_case as case
from tests.models.synapse_case import build, fill
from tests.models.tensor_parallel import differences


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [A, C, L], which is what BatchNorm1d takes."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def oracle_names(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under the names and shapes of an exported tower."""
    named = {}
    for name, value in tensors.items():
        if "pointwise_conv" in name:
            value = value.squeeze(-1)
        named[prefix + name.replace("batch_norm", "depthwise_layer_norm")] = value
    return named


def wav2vec2_conformer(tower: ConformerConfig) -> Wav2Vec2ConformerModel:
    config = Wav2Vec2ConformerConfig(
        hidden_size=tower.hidden_size, num_hidden_layers=tower.num_layers, intermediate_size=tower.ffn_hidden_size,
        num_attention_heads=tower.num_attention_heads, conv_depthwise_kernel_size=tower.conv_kernel_size,
        conv_dim=[tower.front_channels] * len(tower.front_kernels), conv_kernel=tower.front_kernels,
        conv_stride=tower.front_strides, num_feat_extract_layers=len(tower.front_kernels), conv_bias=True,
        feat_extract_norm="layer", position_embeddings_type="relative", hidden_act="swish", hidden_dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, conformer_conv_dropout=0.0,
        layerdrop=0.0, mask_time_prob=0.0, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=1,
    )
    model = Wav2Vec2ConformerModel(config).train()
    for layer in model.encoder.layers:
        layer.conv_module.batch_norm = ChannelsFirstLayerNorm(tower.hidden_size)
    del model.encoder.pos_conv_embed  # made by Hugging Face, but used in no forward pass
    case.randomize(model)
    return model


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_tower_is_wav2vec2_conformer_with_layer_norm(recompute: str):
    tower = case.tiny_tower()
    model = wav2vec2_conformer(tower)
    graph = case.tower_graph(tower, LayerSettings(recompute=recompute))
    modules, batch = build(graph), case.make_batch(tower)
    entries = names_of(conformer_nodes(tower, LayerSettings(), 0.02, "hf"))
    ours, theirs = case.parameters(modules), dict(model.named_parameters())
    assert set(ours) == {entry.training for entry in entries}
    for name, value in case.training_tensors(entries, oracle_names(theirs, "hf.")).items():
        ours[name].data.copy_(value)
    expected = model(batch.waveforms_AN.clone()).last_hidden_state
    found = case.memory(graph, modules, batch)
    assert found.shape == (2, tower.tokens_per_sound, tower.hidden_size)
    case.assert_close(found, expected)
    upstream = torch.randn(found.shape)
    expected.backward(upstream)
    found.backward(upstream)
    gradients = oracle_names({name: parameter.grad for name, parameter in theirs.items()}, "hf.")
    for name, gradient in case.training_tensors(entries, gradients).items():
        case.assert_close(ours[name].grad, gradient, name)


def bert_layer(tower: ConformerConfig) -> tuple[Wav2Vec2BertEncoderLayer, torch.Tensor]:
    """Wav2Vec2-BERT's layer with Transformer-XL's positions, and the table of those."""
    config = Wav2Vec2BertConfig(
        hidden_size=tower.hidden_size, intermediate_size=tower.ffn_hidden_size, hidden_act="swish",
        num_attention_heads=tower.num_attention_heads, conv_depthwise_kernel_size=tower.conv_kernel_size,
        position_embeddings_type="relative", hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        conformer_conv_dropout=0.0, attn_implementation="eager",
    )
    layer = Wav2Vec2BertEncoderLayer(config).train()
    case.randomize(layer)
    return layer, Wav2Vec2BertRelPositionalEmbedding(config)(torch.empty(1, tower.tokens_per_sound, 1))


def load_layer(tower: ConformerConfig, oracle: nn.Module) -> tuple[nn.Module, list]:
    """Our block with the oracle's weights, and the entries of its parameters."""
    node = case.tower_graph(tower).nodes[1]
    layer, ours = fill(node.build()), "audio.layers.0."
    entries = [
        entry
        for entry in names_of(conformer_nodes(tower, LayerSettings(), 0.02, "hf"))
        if entry.training.startswith(ours)
    ]
    source = oracle_names(dict(oracle.named_parameters()), "hf.encoder.layers.0.")
    for name, value in case.training_tensors(entries, source).items():
        layer.get_parameter(name.removeprefix(ours)).data.copy_(value)
    return layer, entries


def compare_gradients(layer: nn.Module, oracle: nn.Module, entries: list, part: str = "") -> None:
    """Those of parameters whose training name within the block begins with `part`."""
    entries = [entry for entry in entries if entry.training.startswith(f"audio.layers.0.{part}")]
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    expected = case.training_tensors(entries, oracle_names(gradients, "hf.encoder.layers.0."))
    assert expected
    for name, gradient in expected.items():
        case.assert_close(layer.get_parameter(name.removeprefix("audio.layers.0.")).grad, gradient, name)


def test_block_is_wav2vec2_bert_where_its_convolution_has_one_tap():
    """With a kernel of 1 there is no past to shift to: all of the layer coincides, as it is."""
    tower = case.tiny_tower(conv_kernel_size=1)
    oracle, positions = bert_layer(tower)
    layer, entries = load_layer(tower, oracle)
    theirs = torch.randn(2, tower.tokens_per_sound, tower.hidden_size, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    expected = oracle(theirs, relative_position_embeddings=positions)
    found = layer(ours, case.context())
    case.assert_close(found, expected)
    upstream = torch.randn(found.shape)
    expected.backward(upstream)
    found.backward(upstream)
    case.assert_close(ours.grad, theirs.grad)
    compare_gradients(layer, oracle, entries)


def test_convolution_is_wav2vec2_berts_shifted_by_half_a_kernel():
    """Theirs ends at a position where ours is centred on it: ours at t is theirs at t + (kernel - 1) / 2."""
    tower = case.tiny_tower()
    shift = tower.conv_kernel_size // 2
    oracle, _ = bert_layer(tower)
    layer, entries = load_layer(tower, oracle)
    theirs = torch.randn(2, tower.tokens_per_sound, tower.hidden_size, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    expected = oracle.conv_module(theirs)[:, shift:]
    found = layer.convolution(layer.convolution_layernorm(ours))[:, :-shift]
    case.assert_close(found, expected)
    upstream = torch.randn(found.shape)
    expected.backward(upstream)
    found.backward(upstream)
    case.assert_close(ours.grad, theirs.grad)
    compare_gradients(layer, oracle, entries, "convolution")


@pytest.mark.slow
def test_two_tensor_parallel_processes_are_one(tmp_path: Path):
    found = differences("tests.models.conformer_case:tensor_parallel_case", tmp_path)
    assert len(found) > 50
    assert max(found.values()) <= 1e-5, {name: value for name, value in found.items() if value > 1e-5}


def test_checkpoint_entries_of_tensor_parallel_processes_make_up_those_of_one():
    """Weights of each of two processes, put where their entries say, are the weights that one process has."""
    tower, written = case.tiny_tower(), {}
    expected = checkpoint_pieces(tower, ParallelSizes(), 0)
    setup.shutdown()
    try:
        for rank in range(2):
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
            setup.initialize_groups(ParallelSizes(tp=2), gloo=False)
            for (key, offset), (shape, value) in checkpoint_pieces(tower, ParallelSizes(tp=2), rank).items():
                whole = written.setdefault(key, torch.full(shape, float("nan")))
                whole[tuple(slice(at, at + size) for at, size in zip(offset, value.shape))] = value
            setup.shutdown()
    finally:
        if torch.distributed.is_initialized():
            setup.shutdown()
        setup.initialize(ParallelSizes(), seed=1)
    assert {key for key, _ in expected} == set(written)
    for (key, offset), (_, value) in expected.items():
        part = tuple(slice(at, at + size) for at, size in zip(offset, value.shape))
        assert torch.equal(written[key][part], value), key


def checkpoint_pieces(tower: ConformerConfig, sizes: ParallelSizes, rank: int) -> dict[tuple, tuple]:
    """(key, offset) -> (shape of the whole, this process's part), of every parameter of the tower."""
    pieces = {}
    for node in case.tower_graph(tower, LayerSettings(sizes=sizes)).nodes:
        module = node.build()
        initialize_module(module, node.name, 7, rank, sizes.tp)
        entries = sharded_state_dict_default(module, f"{node.name}.", tp_group=get_tensor_model_parallel_group())
        weights = {name: entry for name, entry in entries.items() if not name.endswith("_extra_state")}
        assert weights.keys() == {f"{node.name}.{name}" for name, _ in module.named_parameters()}
        for entry in weights.values():
            for piece in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                pieces[piece.key, piece.global_offset] = (piece.global_shape, piece.data.detach())
    return pieces


def test_attention_dropout_changes_training_only():
    """Half of the probabilities dropped: other numbers in training, the same in evaluation."""
    tower = case.tiny_tower()
    graph, batch = case.tower_graph(tower, LayerSettings(attention_dropout=0.5)), case.make_batch(tower)
    modules = build(graph)
    case.randomize(modules)
    first, second = case.memory(graph, modules, batch), case.memory(graph, modules, batch)
    assert torch.isfinite(first).all() and (first - second).abs().max() > 1e-2
    modules.eval()
    assert torch.equal(case.memory(graph, modules, batch), case.memory(graph, modules, batch))


def test_a_sound_does_not_depend_on_the_others():
    tower = case.tiny_tower()
    graph, batch = case.tower_graph(tower), case.make_batch(tower, sounds=3)
    modules = build(graph)
    case.randomize(modules)
    together = case.memory(graph, modules, batch)
    alone = case.make_batch(tower, sounds=1)
    alone.waveforms_AN = batch.waveforms_AN[1:2]
    case.assert_close(case.memory(graph, modules, alone), together[1:2])


def test_costs_are_what_is_built_and_runs():
    tower = case.tiny_tower()
    graph, batch = case.tower_graph(tower), case.make_batch(tower)
    modules = build(graph).to("meta")
    context, streams = ForwardContext(batch.to("meta")), {}
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")]
        with FlopCounterMode(display=False) as counter:
            streams[node.writes[0].name] = module(*[streams[name] for name in node.reads], context)
        cost = node.cost(batch.plan)
        assert cost.parameters == sum(p.numel() for p in module.parameters()), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert streams[node.writes[0].name].shape == node.writes[0].shape(batch.plan), node.name


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_stored_bytes_cover_what_autograd_keeps(recompute: str):
    """Each closed form is within a quarter of the bytes that autograd really saves, weights aside."""
    tower = case.tiny_tower(seconds=0.1)
    graph, batch = case.tower_graph(tower, LayerSettings(recompute=recompute)), case.make_batch(tower)
    for node in graph.nodes[:2]:
        module = fill(node.build())
        context = ForwardContext(batch)
        streams = [torch.randn(graph.streams[name].shape(batch.plan), requires_grad=True) for name in node.reads]
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        own |= {relative_positions(stream, context).untyped_storage().data_ptr() for stream in streams}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(*streams, context)
        expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
        assert 0.75 <= sum(kept.values()) / expected <= 1.25, (node.name, sum(kept.values()), expected)
        del output


def test_reference_tower_has_1_82_billion_parameters():
    plan = MicrobatchPlan(1, 2048, 1, 1, 1, 1, True, 2048)
    tower = ConformerConfig()
    assert tower.tokens_per_sound == 499
    total = sum(node.cost(plan).parameters for node in case.tower_graph(tower).nodes)
    assert abs(total / 1.820e9 - 1) < 0.01
