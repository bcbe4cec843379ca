"""Each part of Synapse against an implementation that others use, with the same random weights: outputs, gradients.

The oracles are Hugging Face's Llama, Mllama, CLIP and Whisper. Their parameters are mapped to ours by `ours`, and the
same map applied to their gradients gives what ours must be.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from megatron_mm.config.section import changed
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.systems.graph import build_graph
from tests.models import synapse_case as case
from tests.models.oracle import Get, assert_close, check, fused_qkv, llama_names, load, pairs_of_kv


def test_decoder_with_closed_gates_is_llama():
    config = changed(case.tiny_config(), {"cross_attention.gate_init": 0.0})
    decoder = config.decoder
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            rms_norm_eps=decoder.layernorm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rotary_base},
        )
    ).train()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph)
    load(modules, llama, lambda get: llama_names(config.decoder, get))
    batch = case.make_batch(config)
    rows, length = batch.tokens_RT.shape
    # One document a row, full length, then the plan without a mask and the plan with one must agree with Llama.
    batch.document_ids_RT = torch.zeros(rows, length, dtype=torch.long)
    batch.position_ids_RT = torch.arange(length).repeat(rows, 1)
    for maskless in (True, False):
        batch.plan = MicrobatchPlan(rows, length, 4, 2, 3, 1, maskless, length)
        llama.zero_grad()
        modules.zero_grad()
        expected = llama(batch.tokens_RT).logits
        losses = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch.labels_RT.flatten(), reduction="none")
        (losses * batch.loss_mask_RT.flatten()).sum().backward()
        context, streams = ForwardContext(batch), {}
        for node in graph.nodes:
            streams[node.writes[0].name] = modules[node.name.replace(".", "/")](
                *[streams[name] for name in node.reads], context
            )
        assert_close(streams["logits"].view_as(expected), expected.detach(), "logits")
        loss = graph.losses[0].compute(streams["logits"], context)
        assert_close(loss.detach(), (losses * batch.loss_mask_RT.flatten()).sum().detach(), "loss")
        loss.backward()
        check(modules, llama, lambda get: llama_names(config.decoder, get))


def test_packed_documents_are_what_they_are_alone():
    """Several documents with media in one row give each document the logits that it has in a row of its own."""
    config = case.tiny_config()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph)
    packed = case.make_batch(config)
    with torch.no_grad():
        logits_RTV = case.logits_of(graph, modules, packed)
        for row in range(packed.plan.num_rows):
            for document in range(int(packed.document_ids_RT[row].max()) + 1):
                where = packed.document_ids_RT[row] == document
                alone = one_document(packed, row, document)
                expected = case.logits_of(graph, modules, alone)[0]
                assert_close(logits_RTV[row][where], expected, f"row {row} document {document}")


def one_document(packed: Microbatch, row: int, document: int) -> Microbatch:
    where = packed.document_ids_RT[row] == document
    length = int(where.sum())
    images = packed.image_slots_RK[row][packed.image_slot_documents_RK[row] == document]
    sounds = packed.sound_slots_RJ[row][packed.sound_slot_documents_RJ[row] == document]

    def slots(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(found):
            return torch.tensor([[-1]]), torch.tensor([[-2]])
        return found[None], torch.zeros(1, len(found), dtype=torch.long)

    image_slots, image_documents = slots(images)
    sound_slots, sound_documents = slots(sounds)
    media = packed.plan.num_images, packed.plan.num_sounds, image_slots.shape[1], sound_slots.shape[1]
    plan = MicrobatchPlan(1, length, *media, True, length)
    return Microbatch(
        plan,
        torch.zeros(1, length, dtype=torch.long),
        torch.arange(length)[None],
        packed.loss_mask_RT[row][where][None],
        image_slots,
        image_documents,
        sound_slots,
        sound_documents,
        tokens_RT=packed.tokens_RT[row][where][None],
        labels_RT=packed.labels_RT[row][where][None],
        images_ICHW=packed.images_ICHW,
        image_frames_I=packed.image_frames_I,
        sounds_AMF=packed.sounds_AMF,
    )


def cross_names(get: Get, heads: int, groups: int) -> dict[str, torch.Tensor]:
    attention = "cross_attn."
    key_value = get(attention + "k_proj.weight"), get(attention + "v_proj.weight")
    return {
        "input_layernorm.weight": get("input_layernorm.weight"),
        "linear_q.weight": get(attention + "q_proj.weight"),
        "linear_kv_image.weight": pairs_of_kv(*key_value, groups),
        "q_layernorm.weight": get(attention + "q_norm.weight"),
        "k_layernorm.weight": get(attention + "k_norm.weight"),
        "linear_proj.weight": get(attention + "o_proj.weight"),
        "gate": get("cross_attn_attn_gate"),
    }


def test_gated_cross_attention_is_mllamas():
    """Rows with media: Mllama's sublayer. Positions without: the text, bit for bit, and only the residual gradient."""
    config = changed(
        case.tiny_config(),
        {
            "decoder.hidden_size": 32,
            "vision.hidden_size": 32,  # Mllama's memory has the width of its text
            "cross_attention.num_query_groups": 4,
        },
    )
    tokens, heads, groups = config.vision.tokens_per_image, 8, 4
    oracle = MllamaCrossAttentionDecoderLayer(
        MllamaTextConfig(
            hidden_size=32, num_attention_heads=heads, num_key_value_heads=groups, rms_norm_eps=1e-5,
            intermediate_size=16, num_hidden_layers=1, cross_attention_layers=[0], attn_implementation="eager",
        ),
        0,
    )  # fmt: skip
    node = next(n for n in build_graph(config, LayerSettings()).nodes if n.name == "decoder.cross_layers.0")
    module = node.build()
    case.fill(module)
    load(module, oracle, lambda get: cross_names(get, heads, groups))
    batch = case.make_batch(config)  # rows 0 and 2 hold media of some of their documents, row 1 has none
    rows, length = batch.tokens_RT.shape
    text = torch.randn(rows * length, 1, 32, requires_grad=True)
    images = torch.randn(4, tokens, 32, requires_grad=True)
    batch.sound_slots_RJ[:], batch.sound_slot_documents_RJ[:] = -1, -2
    sounds = torch.randn(2, config.audio.tokens_per_sound, config.audio.hidden_size, requires_grad=True)
    upstream = torch.randn(rows * length, 1, 32)
    found = module(text, images, sounds, ForwardContext(batch))
    found.backward(upstream)

    their_text = text.detach().view(rows, length, 32).clone().requires_grad_()
    their_images = images.detach().clone().requires_grad_()
    memory = their_images[batch.image_slots_RK.clamp(min=0)].flatten(1, 2)
    seen = batch.document_ids_RT[:, :, None] == batch.image_slot_documents_RK[:, None]
    visible = seen.any(-1)
    seen = seen.repeat_interleave(tokens, dim=2) | ~visible[:, :, None]  # Mllama, too, lets such rows attend to all
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
    attended, _ = oracle.cross_attn(oracle.input_layernorm(their_text), memory, attention_mask=mask)
    expected = their_text + oracle.cross_attn_attn_gate.tanh() * attended * visible[:, :, None]
    expected.backward(upstream.view(rows, length, 32))

    assert visible.any() and not visible.all()
    assert_close(found.view(rows, length, 32)[visible], expected[visible], "output")
    assert torch.equal(found.view(rows, length, 32)[~visible], text.view(rows, length, 32)[~visible])
    gradient = text.grad.view(rows, length, 32)
    assert_close(gradient[visible], their_text.grad[visible], "text")
    assert torch.equal(gradient[~visible], upstream.view(rows, length, 32)[~visible])
    assert_close(images.grad, their_images.grad, "images")
    assert torch.equal(sounds.grad, torch.zeros_like(sounds))
    check(module, oracle, lambda get: cross_names(get, heads, groups))


def test_rows_without_any_media_pass_through_unchanged():
    config = case.tiny_config()
    node = next(n for n in build_graph(config, LayerSettings()).nodes if n.name == "decoder.cross_layers.0")
    module = case.fill(node.build())
    batch = case.make_batch(config)
    for name in ("image_slots_RK", "sound_slots_RJ"):
        getattr(batch, name)[:] = -1
    for name in ("image_slot_documents_RK", "sound_slot_documents_RJ"):
        getattr(batch, name)[:] = -2
    text = torch.randn(batch.tokens_RT.numel(), 1, 64, requires_grad=True)
    found = module(text, torch.randn(4, 5, 32), torch.randn(2, 6, 48), ForwardContext(batch))
    assert torch.equal(found, text)
    found.sum().backward()
    assert torch.equal(text.grad, torch.ones_like(text))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def clip_names(layers: int, heads: int, get: Get) -> dict[str, torch.Tensor]:
    names = {
        "vision.embeddings.patch_embedding.weight": get("embeddings.patch_embedding.weight"),
        "vision.embeddings.class_embedding": get("embeddings.class_embedding"),
        "vision.embeddings.position_embedding": get("embeddings.position_embedding.weight"),
        "vision.embeddings.pre_layernorm.weight": get("pre_layrnorm.weight"),
        "vision.embeddings.pre_layernorm.bias": get("pre_layrnorm.bias"),
    }
    parts = {
        "input_layernorm": "layer_norm1",
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    for i in range(layers):
        for kind in ("weight", "bias"):
            theirs, ours = f"encoder.layers.{i}.", f"vision.layers.{i}."
            names |= {f"{ours}{mine}.{kind}": get(f"{theirs}{name}.{kind}") for mine, name in parts.items()}
            qkv = [get(f"{theirs}self_attn.{x}_proj.{kind}") for x in "qkv"]
            names[f"{ours}self_attention.linear_qkv.{kind}"] = fused_qkv(*qkv, heads, heads)
    return names


def test_image_tower_is_clips():
    config = case.tiny_config()
    tower = config.vision
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=tower.hidden_size,
            intermediate_size=tower.ffn_hidden_size,
            num_hidden_layers=tower.num_layers,
            num_attention_heads=tower.num_attention_heads,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            hidden_act="quick_gelu",
        )
    ).train()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph)
    load(modules, clip, lambda get: clip_names(tower.num_layers, tower.num_attention_heads, get))
    batch = case.make_batch(config)
    batch.images_ICHW.requires_grad_()
    pixels = batch.images_ICHW.detach().clone().requires_grad_()
    found = case.tower(graph, modules, batch, "vision.")
    expected = clip(pixels).last_hidden_state
    # The temporal table starts at zero: frames are what stills are, until it learns.
    assert_close(found, expected, "memory")
    upstream = torch.randn(expected.shape)
    found.backward(upstream)
    expected.backward(upstream)
    assert_close(batch.images_ICHW.grad, pixels.grad, "pixels")
    check(modules, clip, lambda get: clip_names(tower.num_layers, tower.num_attention_heads, get))
    table = modules["vision/temporal"].position_embedding
    assert_close(table.grad[:2], upstream[1:3].sum(dim=1), "temporal table")
    assert torch.equal(table.grad[2:], torch.zeros_like(table.grad[2:]))


def test_temporal_positions_tell_frames_apart():
    config = case.tiny_config()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph)
    batch = case.make_batch(config)
    with torch.no_grad():
        before = case.tower(graph, modules, batch, "vision.")
        table = modules["vision/temporal"].position_embedding
        table.copy_(torch.randn(table.shape))
        change = case.tower(graph, modules, batch, "vision.") - before
    for image, frame in enumerate(batch.image_frames_I.tolist()):
        expected = table[frame] if frame >= 0 else torch.zeros_like(table[0])
        assert (change[image] - expected).abs().max() < 1e-5


def whisper_names(layers: int, heads: int, get: Get) -> dict[str, torch.Tensor]:
    kinds = ("weight", "bias")
    names = {f"audio.embeddings.{conv}.{kind}": get(f"{conv}.{kind}") for conv in ("conv1", "conv2") for kind in kinds}
    names |= {f"audio.output.final_layernorm.{kind}": get(f"layer_norm.{kind}") for kind in ("weight", "bias")}
    parts = {
        "input_layernorm": "self_attn_layer_norm",
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "final_layer_norm",
        "mlp.linear_fc1": "fc1",
        "mlp.linear_fc2": "fc2",
    }
    for i in range(layers):
        theirs, ours = f"layers.{i}.", f"audio.layers.{i}."
        for kind in ("weight", "bias"):
            names |= {f"{ours}{mine}.{kind}": get(f"{theirs}{name}.{kind}") for mine, name in parts.items()}
        qkv = [get(f"{theirs}self_attn.{x}_proj.weight") for x in "qkv"]
        names[f"{ours}self_attention.linear_qkv.weight"] = fused_qkv(*qkv, heads, heads)
        q, v = (get(f"{theirs}self_attn.{x}_proj.bias") for x in "qv")
        names[f"{ours}self_attention.linear_qkv.bias"] = fused_qkv(q, torch.zeros_like(q), v, heads, heads)
    return names


def test_audio_tower_is_whispers_encoder():
    config = case.tiny_config()
    tower = config.audio
    whisper = WhisperEncoder(
        WhisperConfig(
            d_model=tower.hidden_size,
            encoder_layers=tower.num_layers,
            encoder_attention_heads=tower.num_attention_heads,
            encoder_ffn_dim=tower.ffn_hidden_size,
            num_mel_bins=tower.num_mel_bins,
            max_source_positions=tower.tokens_per_sound,
        )
    ).train()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph)
    load(modules, whisper, lambda get: whisper_names(tower.num_layers, tower.num_attention_heads, get))
    batch = case.make_batch(config)
    batch.sounds_AMF.requires_grad_()
    features = batch.sounds_AMF.detach().clone().requires_grad_()
    found = case.tower(graph, modules, batch, "audio.")
    expected = whisper(features).last_hidden_state
    assert_close(found, expected, "memory")
    upstream = torch.randn(expected.shape)
    found.backward(upstream)
    expected.backward(upstream)
    assert_close(batch.sounds_AMF.grad, features.grad, "spectrogram")
    check(modules, whisper, lambda get: whisper_names(tower.num_layers, tower.num_attention_heads, get))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_factors_are_computed_in_fp32(dtype: torch.dtype):
    """bf16 positions would round 4,095 to 4,096: angles must not be made in the precision of the layers."""
    from megatron_mm.models.layers.attention import rotary_factors

    cos, _ = rotary_factors(torch.tensor([[4095]]), 8, 10000.0, dtype)
    expected = torch.tensor(4095.0).cos().to(dtype)
    assert cos[0, 0, 0, 0] == expected
