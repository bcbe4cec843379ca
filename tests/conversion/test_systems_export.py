"""Every system's checkpoint as an exported folder and back: the same outputs, the same tokens, the same weights.

Truth: the streams of the training graph, greedy tokens of the training model computed anew for each, and the tensors
that the training code saved.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.config.load import RECIPES, load_config
from megatron_mm.conversion.convert import restore
from megatron_mm.generation.generate import Generator
from megatron_mm.hf.exported_model import CACHE
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import checkpoint_key
from megatron_mm.objectives.matching import hard_negatives
from megatron_mm.planner.assembly import full_plan
from megatron_mm.systems.export import model_entries
from megatron_mm.systems.graph import build_graph
from tests.conversion import system_case as case
from tests.conversion.export_case import train_tokenizer

pytestmark = pytest.mark.interface

AVT = [name for name in case.SYSTEMS if name.startswith("avt")]
PERCEIVER = [name for name in case.SYSTEMS if name.startswith("perceiver_fusion")]
IMAGE_TEXT = [name for name in case.SYSTEMS if name.startswith(("vlm", "dual_encoder"))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "spm.model")


@pytest.fixture(scope="module", params=case.SYSTEMS)
def work(request, tmp_path_factory, tokenizer):
    return case.Work(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


def close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    scale = max(1.0, wanted.abs().max().item())
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    assert (found - wanted).abs().max().item() <= 1e-5 * scale, name


def test_entries_are_the_weights_that_training_saved(work):
    """Each once, with the keys of the checkpoint: nothing is lost on the way."""
    entries = model_entries(work.config.model)
    names = [entry.training for entry in entries]
    weights = work.trained.weights()
    assert sorted(names) == sorted(weights)
    assert {entry.training: entry.shape for entry in entries} == {n: tuple(w.shape) for n, w in weights.items()}
    assert {checkpoint_key(name) for name in names} == CheckpointReader(work.checkpoint).shapes.keys()
    state = work.model.state_dict()
    assert sorted(p.name for e in entries for p in e.parts) == sorted(state)


@pytest.mark.parametrize(
    "recipe", ["synapse-70b", "vlm-14b", "dual-encoder", "perceiver-fusion-xl", "avt-33b", "synapse-tiny"]
)
def test_entries_of_full_size_count_every_parameter(recipe):
    """Against the closed forms of the graph's nodes, which tests/models compare with the modules."""
    config = load_config(RECIPES / f"{recipe}.yaml")
    entries = model_entries(config.model)
    graph, plan = build_graph(config.model, LayerSettings()), full_plan(config)
    counted = sum(node.cost(plan).parameters for node in graph.nodes)
    assert sum(math.prod(entry.shape) for entry in entries) == counted


def test_restored_weights_are_the_checkpoints(work, tmp_path):
    restored = restore(work.exported, tmp_path / "restored", quiet=True)
    before, after = CheckpointReader(work.checkpoint), CheckpointReader(restored)
    for name in work.trained.weights():
        assert torch.equal(before.read(name), after.read(name)), name
    assert load_config(restored / "config.yaml").model == load_config(work.checkpoint / "config.yaml").model
    assert (restored / "tokenizer.model").read_bytes() == (work.checkpoint / "tokenizer.model").read_bytes()


def test_what_transformers_saves_again_restores_too(work, tmp_path):
    work.model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    restored = restore(tmp_path / "again", tmp_path / "restored", quiet=True)
    before, after = CheckpointReader(work.checkpoint), CheckpointReader(restored)
    assert all(torch.equal(before.read(name), after.read(name)) for name in work.trained.weights())
    assert load_config(restored / "config.yaml").model == load_config(work.checkpoint / "config.yaml").model


@pytest.mark.parametrize("work", ["vlm", "dual_encoder", "perceiver_fusion", "avt"], indirect=True)
def test_bf16_follows_fp32(work):
    low = Generator.from_path(work.exported, dtype="bf16").model
    inputs = case.exported_inputs(case.rows(work.config), left=work.config.model.system != "perceiver_fusion")
    with torch.no_grad():
        wanted, found = work.model(**inputs), low(**inputs)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype is (torch.float32 if name.endswith(("embeds", "match_logits")) else torch.bfloat16)
            assert (found[name] - value).abs().max() < 0.05 * value.abs().max(), name


@pytest.mark.parametrize("work", IMAGE_TEXT, indirect=True)
def test_outputs_are_the_training_graphs(work):
    """Logits of real tokens, embeddings, predictions, on rows with and without media, whichever side is padded."""
    batch = case.rows(work.config)
    streams = work.trained.streams(batch)
    images = batch.image_slots_RK[:, 0]
    assert (images >= 0).any() and (images < 0).any()
    for left in (True, False):
        inputs = case.exported_inputs(batch, left)
        with torch.no_grad():
            out = work.model(**inputs)
        checked = set()
        if "logits" in streams:
            wanted = streams["logits"].view(*batch.tokens_RT.shape, -1)[batch.document_ids_RT >= 0]
            close(out.logits[inputs["attention_mask"].bool()], wanted, "logits")
            checked.add("logits")
        for field, stream, real in (
            ("text_embeds", "text_embedding", torch.ones_like(images, dtype=torch.bool)),
            ("image_embeds", "image_embedding", images >= 0),
        ):
            if stream in streams:
                close(out[field][real], streams[stream][real], field)
                assert (out[field][~real] == 0).all()
                checked.add(field)
        if "mae_prediction" in streams:
            wanted = streams["mae_prediction"][images[images >= 0]]
            close(out.mae_prediction[images >= 0], wanted, "mae_prediction")
            checked.add("mae_prediction")
        assert checked | {CACHE} == out.keys() | {CACHE}


@pytest.mark.parametrize("work", PERCEIVER, indirect=True)
def test_pairs_and_hidden_tokens_are_the_training_graphs(work):
    """Own pairs and hard negatives of clean texts; logits of masked texts; rows cut to fewer segments or not."""
    batch, model = case.rows(work.config), work.model
    streams = work.trained.streams(batch)
    images, real = batch.image_slots_RK[:, 0], batch.document_ids_RT >= 0
    inputs = case.exported_inputs(batch, left=False)
    with torch.no_grad():
        clean = model(**inputs)
        memory, memory_mask = model.encode_media(inputs["pixel_values"], inputs["image_mask"])
        states, mask = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    close(clean.text_embeds, streams["text_embedding"], "text_embeds")
    close(clean.image_embeds[images >= 0], streams["image_embedding"][images >= 0], "image_embeds")
    embeddings = (streams[name] for name in ("image_embedding", "text_embedding", "logit_scale"))
    wrong_text, wrong_image, valid = hard_negatives(batch, *embeddings)
    assert valid.any() and not valid.all()
    own, with_text, with_image = streams["match_logits"].chunk(3)
    close(clean.match_logits, own, "own pairs")
    with torch.no_grad():
        texts = model.fuse(memory, memory_mask, states[wrong_text], mask[wrong_text])
        pictures = model.fuse(memory[wrong_image], memory_mask[wrong_image], states, mask)
        for latents, wanted, name in ((texts, with_text, "wrong texts"), (pictures, with_image, "wrong images")):
            found = model.match_projection(model.match_norm(latents.mean(dim=1)))
            close(found[valid > 0], wanted[valid > 0], name)
    if model.predicts:
        wanted = streams["logits"].view(*real.shape, -1)
        inputs["input_ids"] = batch.masked_tokens_RT
        short = real.sum(1).argmin()
        count = int(real[short].sum())
        with torch.no_grad():
            close(model(**inputs).logits[real], wanted[real], "logits")
            one = {name: value[short : short + 1] for name, value in inputs.items()}
            one |= {name: one[name][:, :count] for name in ("input_ids", "attention_mask")}
            close(model(**one).logits[0], wanted[short, :count], "logits of a row alone, unpadded")
        with pytest.raises(ValueError, match="padded on the right"):
            model(**case.exported_inputs(batch))


@pytest.mark.parametrize("work", AVT, indirect=True)
def test_tokens_of_both_tasks_are_the_training_graphs(work):
    """Causal and masked microbatches of rows with an image or a clip, a sound, both or nothing."""
    kinds = {"all": range(12), "no clips": [1, 4, 0, 7], "sounds alone": [0, 7, 12], "no media": [7, 15]}
    for kind, numbers in kinds.items():
        for task in ("generation", "masked_lm"):
            batch = case.rows(work.config, numbers, task)
            streams, masked = work.trained.streams(batch), task == "masked_lm"
            seen, heard = (batch.image_slots_RK[:, 0] >= 0) | (batch.clip_slots_R >= 0), batch.sound_slots_RJ[:, 0] >= 0
            assert kind != "all" or ((seen & heard).any() and (~seen & ~heard).any())
            if masked and batch.masked_tokens_RT is not None:  # a contrastive AVT alone has no text to mask
                batch = replace(batch, tokens_RT=batch.masked_tokens_RT)
            for left in (True, False):
                inputs = case.exported_inputs(batch, left)
                with torch.no_grad():
                    out = work.model(**inputs, bidirectional=masked)
                if work.model.config.has_text:
                    wanted = streams["logits"].view(*batch.tokens_RT.shape, -1)[batch.document_ids_RT >= 0]
                    close(out.logits[inputs["attention_mask"].bool()], wanted, f"logits, {kind}, {task}")
                for name, real in (("vision", seen), ("audio", heard)):
                    if work.model.config.contrasts and real.any():
                        found = out[f"{name}_embeds"]
                        close(found[real], streams[f"{name}_embedding"][real], f"{name}, {kind}")
                        assert (found[~real] == 0).all()
                    else:
                        assert f"{name}_embeds" not in out


@pytest.mark.parametrize("work", ["avt"], indirect=True)
def test_sights_and_sounds_are_embedded_alone(work):
    inputs = case.exported_inputs(case.rows(work.config, range(12)))
    with torch.no_grad():
        out, model = work.model(**inputs), work.model
        close(model.get_image_features(**inputs) + model.get_video_features(**inputs), out.vision_embeds, "vision")
        close(model.get_audio_features(**inputs), out.audio_embeds, "audio")
        assert model.similarity(out.vision_embeds, out.audio_embeds).shape == (12, 12)
        both = {"image_mask": torch.ones(12).bool(), "video_mask": torch.ones(12).bool()}
        with pytest.raises(ValueError, match="both an image and a video"):
            model(**(inputs | both))


@pytest.mark.parametrize("work", IMAGE_TEXT + PERCEIVER, indirect=True)
def test_features_alone_are_those_of_the_forward_pass(work):
    if not work.model.config.contrasts:
        with pytest.raises(ValueError, match="trained without that objective"):
            work.model.get_image_features(torch.zeros(1, 3, 32, 32))
        return
    inputs = case.exported_inputs(case.rows(work.config), left=work.model.config.inputs["padding_side"] == "left")
    with torch.no_grad():
        out = work.model(**inputs)
        close(work.model.get_image_features(**inputs), out.image_embeds, "image")
        close(work.model.get_text_features(**inputs), out.text_embeds, "text")


def test_greedy_tokens_are_the_training_models(work):
    if not work.model.config.generates:
        with pytest.raises(ValueError, match="generates no text"):
            next(Generator(work.model, None).generate([{"prompt": "a"}]))
        return
    batch = case.rows(work.config, task="generation")
    lengths = torch.tensor([2, 5, 3, 6, 4, 9])
    inputs = case.exported_inputs(case.prefix(batch, lengths))
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, -9:], inputs["attention_mask"][:, -9:]
    inputs.pop("patch_noise", None)
    wanted = case.greedy(work.trained, batch, lengths, 8, work.model.config.tokenizer_size)
    beams = ({"num_beams": 2, "use_cache": True}, {"num_beams": 2, "use_cache": False})
    for arguments in ({}, {"use_cache": False}, *beams):
        found = work.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, **arguments)
        if "num_beams" not in arguments:
            assert found[:, 9:].tolist() == wanted.tolist()
            continue
        wanted = found if arguments["use_cache"] else wanted
        assert found.tolist() == wanted.tolist(), "beams with and without cache"
