"""What exported folders of all systems read, where there is no megatron, and what tools make of them.

Truth: rows that the training side makes of the same samples, and the same modelling files in this process, which
test_systems_export.py compares with the training graph.
"""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.config.section import changed
from megatron_mm.conversion.convert import export, restore
from megatron_mm.conversion.hf_folder import adapter_of_folder
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.evaluate import token_scores
from megatron_mm.evaluation.streams import all_rows, reading_jsonl
from megatron_mm.generation.generate import Decoding, Generator
from megatron_mm.generation.prompts import read_prompts
from megatron_mm.hf.processing_mm import MultimodalProcessor
from megatron_mm.systems.export import adapter_of
from tests.conversion import system_case as case
from tests.conversion.export_case import draw, draw_animation, sing, train_tokenizer
from tests.support import recipes
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).resolve().parents[2]
MAIN = ("vlm", "dual_encoder", "perceiver_fusion", "avt")
SAMPLES = [
    {"id": "a", "prompt": "<image>", "text": "a red dog", "images": ["a.png"]},
    {"id": "b", "prompt": "what is this <image>", "text": "one two three cat", "images": ["b.png"]},
    {"id": "c", "prompt": "", "text": "the moon sings"},
    {"id": "d", "prompt": "<image>", "text": "green and blue sun " * 8, "images": ["a.png"]},
]
MOVING = [
    {"id": "e", "prompt": "<video><audio>", "text": "a dog barks", "videos": ["v.gif"], "audios": ["low.wav"]},
    {"id": "f", "prompt": "<audio>", "text": "a cat", "audios": ["a.wav"]},
    {"id": "g", "prompt": "<image><audio>", "text": "sun", "images": ["b.png"], "audios": ["a.wav"]},
]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files, samples and tokenizer."""
    root = tmp_path_factory.mktemp("media")
    draw(root / "a.png"), draw(root / "b.png", (24, 50), "RGBA"), draw_animation(root / "v.gif")
    sing(root / "a.wav"), sing(root / "low.wav", rate=8000, seconds=0.06, pitch=300)
    for name, samples in (("still", SAMPLES), ("moving", SAMPLES + MOVING)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    train_tokenizer(root / "spm.model")
    return root


@pytest.fixture(scope="module")
def works(media, tmp_path_factory):
    """The main systems, trained and exported."""
    return {name: case.Work(name, tmp_path_factory.mktemp(name), media / "spm.model") for name in MAIN}


@pytest.mark.parametrize("name", MAIN)
def test_samples_are_read_as_training_reads_them(media, name):
    """Ids, masks and media of whole rows: beginning, prompt, text, end, cut to the row; clips and waveforms."""
    config = case.with_vocabulary(case.SYSTEMS[name]())
    adapter = adapter_of(name, "")
    hf_config = adapter.load_class(adapter.config_class)(**adapter.fields(config))
    processor = MultimodalProcessor(hf_config, open_tokenizer(media / "spm.model"))
    file = media / ("moving.jsonl" if name == "avt" else "still.jsonl")
    with reading_jsonl(config, file, media / "spm.model") as reading:
        (batch,) = all_rows(reading, reading.model.inputs.fields, batch_size=16)
    samples = {sample["id"]: sample for sample in read_prompts(file)}
    found = processor([samples[name.rpartition("/")[2]] for name in batch.sample_ids], with_text=True)
    left = processor.inputs["padding_side"] == "left"
    wanted = case.exported_inputs(batch, left)
    length = found["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask"):
        wanted[key] = wanted[key][:, -length:] if left else wanted[key][:, :length]
    assert wanted["attention_mask"].sum(1).max() == config.data.seq_length, "one text is cut"
    assert found.keys() == wanted.keys() - {"patch_noise"}
    for key, value in found.items():
        assert torch.equal(value, wanted[key].to(value.dtype)), key


def test_what_a_row_has_no_place_for_is_left_out_and_said(media, caplog, monkeypatch):
    config = case.with_vocabulary(case.SYSTEMS["vlm"]())
    adapter = adapter_of("vlm", "")
    hf_config = adapter.load_class(adapter.config_class)(**adapter.fields(config))
    processor = MultimodalProcessor(hf_config, open_tokenizer(media / "spm.model"))
    first, second, sound = (media / name for name in ("a.png", "b.png", "a.wav"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for _ in range(2):
        found = processor([{"images": [first, second], "audios": [sound]}])
    assert torch.equal(found["pixel_values"], processor([{"images": [first]}])["pixel_values"])
    assert "input_values" not in found
    assert caplog.text.count("a row has no place for") == 1 and f"{second}, {sound}" in caplog.text


LOAD = """
import sys
for name in ("megatron", "megatron_mm"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
media, out, *folders = sys.argv[1:]
found = {}
for folder in folders:
    name = folder.split("/")[-2]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([{"prompt": "what is this", "images": [media + "/a.png"]}, {"prompt": "a cat"}])
    with torch.no_grad():
        result = {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}
    if "AutoModelForCausalLM" in model.config.auto_map:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        result["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    found[name.rstrip("0123456789")] = result
torch.save(found, out)
assert not any(name == "megatron" or name.startswith(("megatron.", "megatron_mm."))
               for name, module in sys.modules.items() if module is not None)
"""


@pytest.mark.slow
def test_exports_load_where_there_is_no_megatron(media, works, tmp_path):
    folders = [str(work.exported) for work in works.values()]
    command = [PYTHON, "-c", LOAD, str(media), str(tmp_path / "out.pt"), *folders]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    assert found.keys() == works.keys()
    for name, work in works.items():
        generator = Generator.from_path(work.exported)
        prompts = [{"prompt": "what is this", "images": [media / "a.png"]}, {"prompt": "a cat"}]
        inputs = generator.processor(prompts)
        with torch.no_grad():
            wanted = {k: v for k, v in generator.model(**inputs).items() if isinstance(v, torch.Tensor)}
        assert (name != "perceiver_fusion") == ("tokens" in found[name])
        if "tokens" in found[name]:
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
            wanted["tokens"] = generator.model.generate(**inputs, **options)
        assert found[name].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[name][key], value, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["vlm", "dual_encoder", "avt"])
def test_checkpoint_and_export_answer_the_same(media, works, name):
    """And their loss of the true texts is the training graph's."""
    work = works[name]
    prompts = read_prompts(media / ("moving.jsonl" if name == "avt" else "still.jsonl"))
    for prompt in prompts:
        prompt["text"] = " ".join(prompt["text"].split()[:4])
    exported, direct = Generator.from_path(work.exported), Generator.from_path(work.checkpoint)
    for decoding in (Decoding(6), Decoding(6, num_beams=3)):
        answers = list(exported.generate(prompts, decoding, batch_size=3))
        assert len(answers) == len(prompts) and answers == list(direct.generate(prompts, decoding, batch_size=16))
    losses = [token_scores(exported, prompts, batch_size).loss for batch_size in (2, 16)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_answers_end_where_positions_do(media, works):
    generator = Generator.from_path(works["dual_encoder"].exported)
    limit = generator.model.config.max_position_embeddings
    long = {"prompt": "one two three red " * 2}
    (answer,) = generator.generate([long], Decoding(500))
    assert isinstance(answer, str)
    with pytest.raises(ValueError, match=f"a prompt has .* tokens; this model has {limit} positions"):
        list(generator.generate([{"prompt": "one two three red " * 20}], Decoding(4)))
    with pytest.raises(ValueError, match=f"a text has 33 tokens; this model has {limit} positions"):
        generator.model(torch.ones(1, 33, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_folders_and_recipes_that_do_not_belong_together_are_refused(works, tmp_path):
    from megatron_mm.config.load import dump_config

    config = works["vlm"].config
    config = changed(config, {"model.cross_attention.every": 2})
    dump_config(config, tmp_path / "every.yaml")
    with pytest.raises(ValueError, match=r"cross_attention.every: 1 in the folder, 2 in the recipe"):
        restore(works["vlm"].exported, tmp_path / "out", config=tmp_path / "every.yaml", quiet=True)
    dump_config(works["avt"].config, tmp_path / "avt.yaml")
    with pytest.raises(ValueError, match=r"model_type: vlm in the folder, avt in the recipe"):
        restore(works["vlm"].exported, tmp_path / "out", config=tmp_path / "avt.yaml", quiet=True)
    dump_config(case.with_vocabulary(recipes.small_vlm(phase="mae")), tmp_path / "mae.yaml")
    with pytest.raises(ValueError, match=r"phase: joint in the folder, mae in the recipe"):
        restore(works["vlm"].exported, tmp_path / "out", config=tmp_path / "mae.yaml", quiet=True)
    with pytest.raises(ValueError, match="model_type is 'llama', not one of synapse, avt"):
        adapter_of_folder({"model_type": "llama"}, tmp_path)
    with pytest.raises(ValueError, match="no export of the system 'none_such'; there is one of synapse"):
        adapter_of("none_such", tmp_path / "config.yaml")


def test_a_tower_alone_needs_no_tokenizer(media, tmp_path):
    trained = case.trained(case.with_vocabulary(case.SYSTEMS["vlm-mae"]()))
    trained.save(tmp_path / "checkpoints", None)
    generator = Generator.from_path(export(tmp_path, tmp_path / "exported", quiet=True))
    inputs = generator.processor([{"images": [media / "a.png"]}])
    assert inputs.keys() == {"pixel_values", "image_mask"}
    with pytest.raises(ValueError, match="generates no text"):
        list(generator.generate([{"images": [media / "a.png"]}]))
