"""Pretrained models of transformers in the parts of the systems that they fit.

Truth: those models. The training graph, started from what was imported, computes what they do; whatever does not fit is
refused with the reason.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from megatron_mm.conversion.pretrained import import_pretrained
from megatron_mm.hf.vit import sine_cosine_positions
from megatron_mm.training.optimizer import Optimizer
from megatron_mm.training.warm_start import load_pretrained
from tests.conversion import system_case as case
from tests.support import recipes

pytestmark = pytest.mark.interface


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= 1e-5 * max(1.0, wanted.abs().max().item())


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights, no bias zero and no norm one; fixed positions as their checkpoints have them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                table = sine_cosine_positions(round((parameter.shape[1] - 1) ** 0.5), parameter.shape[2], parameter)
                parameter.copy_(table)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 if parameter.dim() < 2 else 0.05))
    return model.eval()


def llama(decoder, **changes):
    fields = {
        "vocab_size": decoder.vocab_size, "hidden_size": decoder.hidden_size, "num_hidden_layers": decoder.num_layers,
        "intermediate_size": decoder.ffn_hidden_size, "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups, "rms_norm_eps": decoder.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rotary_base},
    }  # fmt: skip
    return randomize(LlamaForCausalLM(LlamaConfig(**fields | changes)))


def gpt2(text, **changes):
    fields = {
        "vocab_size": text.vocab_size, "n_embd": text.hidden_size, "n_layer": text.num_layers,
        "n_head": text.num_attention_heads, "n_inner": text.ffn_hidden_size, "n_positions": 40,
    }  # fmt: skip
    return randomize(GPT2LMHeadModel(GPT2Config(**fields | changes)))


def opt(text, **changes):
    fields = {
        "vocab_size": text.vocab_size, "hidden_size": text.hidden_size, "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_attention_heads, "ffn_dim": text.ffn_hidden_size,
        "max_position_embeddings": 40, "word_embed_proj_dim": text.hidden_size,
    }  # fmt: skip
    return randomize(OPTForCausalLM(OPTConfig(**fields | changes)))


def vit_mae(vision, mae, kind=ViTMAEForPreTraining, **changes):
    fields = {
        "hidden_size": vision.hidden_size, "num_hidden_layers": vision.num_layers, "patch_size": vision.patch_size,
        "num_attention_heads": vision.num_attention_heads, "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.image_size, "layer_norm_eps": vision.layernorm_epsilon,
        "decoder_hidden_size": mae.hidden_size, "decoder_num_hidden_layers": mae.num_layers,
        "decoder_num_attention_heads": mae.num_attention_heads, "decoder_intermediate_size": mae.ffn_hidden_size,
        "mask_ratio": mae.mask_ratio,
    }  # fmt: skip
    return randomize(kind(ViTMAEConfig(**fields | changes)))


def started(config, tmp_path, **models) -> tuple[case.Trained, CheckpointReader]:
    """The training model of a recipe that begins with imported weights, random elsewhere."""
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
    dump_config(config, tmp_path / "recipe.yaml")
    folders = {name: tmp_path / name for name in models}
    folder = import_pretrained(tmp_path / "recipe.yaml", tmp_path / "imported", quiet=True, **folders)
    trained = case.trained(config)
    load_pretrained([folder], trained.pipeline, Optimizer(config, trained.pipeline))
    return trained, CheckpointReader(folder)


def left_out(trained: case.Trained, reader: CheckpointReader) -> set[str]:
    """Weights that were not imported."""
    return {name for name in trained.weights() if name not in reader}


def test_a_llama_is_the_decoder_of_the_vlm(tmp_path):
    config = case.with_vocabulary(recipes.small_vlm())
    source = llama(config.model.decoder)
    trained, reader = started(config, tmp_path, llama=source)
    missing = left_out(trained, reader)
    assert all(name.startswith(("vision.", "contrastive.", "decoder.cross_layers.")) for name in missing)
    weights = trained.weights()
    for name in missing:
        if name.endswith(".gate"):
            weights[name].zero_()
    batch = case.rows(config)
    real = batch.document_ids_RT >= 0
    close(trained.logits(batch)[real], source(batch.tokens_RT).logits[real])


def test_a_llama_is_the_decoder_of_avt_where_nothing_is_seen_or_heard(tmp_path):
    config = case.with_vocabulary(recipes.small_avt())
    source = llama(config.model.decoder)
    trained, reader = started(config, tmp_path, llama=source)
    inside = {name for name in left_out(trained, reader) if name.startswith("decoder.")}
    assert inside and all("cross_attn_layernorm" in name or "cross_attention" in name for name in inside)
    batch = case.rows(config, [7, 15], task="generation")
    assert (batch.image_slots_RK < 0).all() and (batch.clip_slots_R < 0).all() and (batch.sound_slots_RJ < 0).all()
    real = batch.document_ids_RT >= 0
    close(trained.logits(batch)[real], source(batch.tokens_RT).logits[real])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_gpt2_and_opt_are_the_text_encoder(family, tmp_path):
    """Their tables have more positions than the recipe; those of its rows are taken."""
    config = case.with_vocabulary(recipes.small_dual_encoder(causal_lm_weight=0.0))
    config = changed(config, {"model.text.activation": {"gpt2": "gelu_tanh", "opt": "relu"}[family]})
    text = config.model.text
    source = {"gpt2": gpt2, "opt": opt}[family](text)
    trained, reader = started(config, tmp_path, **{family: source})
    assert not {name for name in left_out(trained, reader) if name.startswith("text.")}
    batch = case.rows(config)
    real = batch.document_ids_RT >= 0
    hidden = source(batch.tokens_RT, output_hidden_states=True).hidden_states[-1]
    close(trained.streams(batch)["text"][real], hidden[real])


def test_the_dual_encoder_starts_from_its_first_phase_and_an_open_language_model(tmp_path):
    """The tower of one checkpoint, the text encoder of another, the rest as it was."""
    config = case.with_vocabulary(recipes.small_dual_encoder(causal_lm_weight=0.0))
    first = case.trained(case.with_vocabulary(recipes.small_dual_encoder(phase="mae")), seed=5)
    tower = {name: value.clone() for name, value in first.weights().items() if name.startswith("vision.")}
    mae = first.save(tmp_path / "mae", None)
    source = gpt2(config.model.text)
    source.save_pretrained(tmp_path / "gpt2")
    dump_config(config, tmp_path / "recipe.yaml")
    language = import_pretrained(tmp_path / "recipe.yaml", tmp_path / "lm", quiet=True, gpt2=tmp_path / "gpt2")
    trained = case.trained(config)
    before = {name: value.clone() for name, value in trained.weights().items()}
    patterns = ["vision.*", "text.*"]
    rows = load_pretrained([mae, language], trained.pipeline, Optimizer(config, trained.pipeline), patterns)
    assert {kind for nodes, kind in rows if nodes.startswith("vision.")} == {f"loaded from {mae}"}
    assert {kind for nodes, kind in rows if nodes.startswith("text.")} == {f"loaded from {language}"}
    after = trained.weights()
    assert tower and all(torch.equal(after[name], value) for name, value in tower.items())
    others = [name for name in after if not name.startswith(("vision.", "text."))]
    assert others and all(torch.equal(after[name], before[name]) for name in others)
    batch = case.rows(config)
    real = batch.document_ids_RT >= 0
    hidden = source(batch.tokens_RT, output_hidden_states=True).hidden_states[-1]
    close(trained.streams(batch)["text"][real], hidden[real])


@pytest.mark.parametrize("phase", ["mae", "joint"])
def test_vit_mae_is_the_tower_and_its_decoder(phase, tmp_path):
    config = case.with_vocabulary(recipes.small_vlm(phase=phase))
    vision, mae = config.model.vision, config.model.mae
    source = vit_mae(vision, mae)
    trained, reader = started(config, tmp_path, vit_mae=source)
    assert not {name for name in left_out(trained, reader) if name.startswith(("vision.", "mae."))}
    batch = case.rows(config)
    if phase == "mae":
        wanted = source(batch.images_ICHW, noise=batch.patch_noise_IP).logits
        close(trained.streams(batch)["mae_prediction"], wanted)
    else:
        order = torch.arange(vision.num_patches).expand(batch.plan.num_images, -1) / vision.num_patches
        source.vit.embeddings.config.mask_ratio = 0.0
        wanted = source.vit(batch.images_ICHW, noise=order).last_hidden_state
        close(trained.streams(batch)["image_memory"], wanted)


@pytest.mark.parametrize("spelling", ["transformers 5", "the hub's"])
def test_files_of_vit_mae_are_read_in_every_spelling(spelling, tmp_path):
    """The names of the hub's files are what transformers 4 gave; those of its modules are release 5's."""
    from safetensors.torch import save_file

    config = case.with_vocabulary(recipes.small_vlm(phase="mae"))
    source = vit_mae(config.model.vision, config.model.mae)
    source.save_pretrained(tmp_path / "saved")
    dump_config(config, tmp_path / "recipe.yaml")
    folder = import_pretrained(tmp_path / "recipe.yaml", tmp_path / "a", quiet=True, vit_mae=tmp_path / "saved")
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    if spelling == "the hub's":
        old = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
               "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
               "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
               "vit.layers": "vit.encoder.layer"}  # fmt: skip
        for new, name in old.items():
            state = {key.replace(new, name): value for key, value in state.items()}
    (tmp_path / "renamed").mkdir()
    save_file(state, tmp_path / "renamed" / "model.safetensors")
    (tmp_path / "renamed" / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    again = import_pretrained(tmp_path / "recipe.yaml", tmp_path / "b", quiet=True, vit_mae=tmp_path / "renamed")
    first, second = CheckpointReader(folder), CheckpointReader(again)
    names = case.trained(config).weights()
    assert names and all(torch.equal(first.read(name), second.read(name)) for name in names)


def test_a_tower_alone_leaves_the_decoder_as_it_is(tmp_path):
    config = case.with_vocabulary(recipes.small_vlm(phase="mae"))
    source = vit_mae(config.model.vision, config.model.mae, ViTMAEModel)
    trained, reader = started(config, tmp_path, vit_mae=source)
    assert left_out(trained, reader) == {name for name in trained.weights() if name.startswith("mae.")}


def refuse(config, source, message, tmp_path, **folders):
    dump_config(config, tmp_path / "recipe.yaml")
    if source is not None:
        source.save_pretrained(tmp_path / "source")
    folders = dict.fromkeys(folders, tmp_path / "source") if source is not None else folders
    with pytest.raises(ValueError, match=message):
        import_pretrained(tmp_path / "recipe.yaml", tmp_path / "out", quiet=True, **folders)
    assert not (tmp_path / "out").exists()


def test_families_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    small = {name: getattr(recipes, f"small_{name}")() for name in ("vlm", "dual_encoder", "perceiver_fusion", "avt")}
    wrong = (
        ("dual_encoder", "llama", "LayerNorm, learned positions, biases.*Llama is.*--gpt2 or --opt fits"),
        ("vlm", "gpt2", "RMSNorm, rotary positions.*GPT-2 is.*--llama fits"),
        ("avt", "opt", "OPT does not fit avt.*--llama fits"),
        ("perceiver_fusion", "gpt2", "a Transformer-XL.*nothing that can be imported fits"),
        ("vlm", "clip", "fixed sine-cosine positions.*--vit-mae fits"),
        ("avt", "vit_mae", "a Swin V2.*nothing that can be imported fits"),
        ("avt", "whisper", "a Conformer on the waveform"),
        ("vlm", "whisper", "no audio part"),
    )
    for system, family, message in wrong:
        refuse(small[system], None, message, tmp_path, **{family: tmp_path})
    mae = recipes.small_vlm(phase="mae")
    refuse(mae, None, "in the phase mae, which has no text", tmp_path, llama=tmp_path)
    both = {"gpt2": tmp_path, "opt": tmp_path}
    refuse(small["dual_encoder"], None, "both GPT-2 and OPT would fill the text part", tmp_path, **both)


def test_functions_and_sizes_that_differ_are_refused(tmp_path):
    config = case.with_vocabulary(recipes.small_dual_encoder())
    text = config.model.text
    for source, family, message in (
        (gpt2(text, activation_function="gelu"), "gpt2", "activation is 'gelu' in the checkpoint, 'gelu_tanh' in the"),
        (gpt2(text, vocab_size=300), "gpt2", "wte.weight has 300 rows, model.text.vocab_size is 320"),
        (gpt2(text, n_positions=20), "gpt2", "wpe.weight has positions for 20 tokens, model.text.max_positions is 32"),
        (gpt2(text, n_inner=80), "gpt2", r"c_fc.weight has shape \[80, 64\]; the recipe needs \[96, 64\]"),
        (gpt2(text, n_layer=3), "gpt2", "n_layer is 3 in the checkpoint, 2 in the recipe"),
        (gpt2(text, scale_attn_by_inverse_layer_idx=True), "gpt2", "scale_attn_by_inverse_layer_idx is True"),
        (opt(text), "opt", "activation is 'relu' in the checkpoint, 'gelu_tanh' in the recipe"),
        (opt(text, do_layer_norm_before=False, activation_function="gelu_new"), "opt",
         "lacks model.decoder.final_layer_norm.weight.*do_layer_norm_before is False"),
        (opt(text, word_embed_proj_dim=48), "opt", r"embed_tokens.weight has shape \[320, 48\]"),
        (opt(text), "gpt2", "no GPT-2 checkpoint, its config.json says model_type 'opt'"),
        (vit_mae(config.model.vision, config.model.mae, layer_norm_eps=1e-12), "vit_mae", "layer_norm_eps is 1e-12"),
        (vit_mae(config.model.vision, config.model.mae, decoder_hidden_size=16), "vit_mae",
         r"mask_token has shape \[16\]; the recipe needs \[32\]"),
    ):  # fmt: skip
        refuse(config, source, message, tmp_path, **{family: None})
        for file in (tmp_path / "source").iterdir():
            file.unlink()
    source = vit_mae(config.model.vision, config.model.mae)
    with torch.no_grad():
        source.vit.embeddings.position_embeddings.add_(0.5)
    refuse(config, source, "position_embeddings is not ViT-MAE's table of sines and cosines", tmp_path, vit_mae=None)


def test_a_vocabulary_is_resized_on_request(tmp_path):
    config = case.with_vocabulary(recipes.small_dual_encoder())
    source = gpt2(config.model.text, vocab_size=300)
    source.save_pretrained(tmp_path / "gpt2")
    dump_config(config, tmp_path / "recipe.yaml")
    folder = import_pretrained(
        tmp_path / "recipe.yaml", tmp_path / "out", gpt2=tmp_path / "gpt2", resize_vocab=True, quiet=True
    )
    rows = CheckpointReader(folder).read("text.embedding.word_embeddings.weight")
    assert torch.equal(rows[:300], source.transformer.wte.weight)
    torch.testing.assert_close(rows[300:], source.transformer.wte.weight.mean(0).expand(20, -1))


def test_other_models_with_llamas_names_are_refused(tmp_path):
    """Their tensors have its names, and biases or windows beside them."""
    config = case.with_vocabulary(recipes.small_vlm())
    llama(config.model.decoder).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "qwen2"}))
    dump_config(config, tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=r"no Llama checkpoint, its config\.json says model_type 'qwen2'"):
        import_pretrained(tmp_path / "recipe.yaml", tmp_path / "out", llama=tmp_path / "source", quiet=True)
