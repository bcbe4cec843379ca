"""Prompts to tensors and answers: the exported processor reads media as training does; the tool answers from either.

Truth: the training side's decoding and transforms (all kinds of files: tests/conversion/test_same_media.py), and
`model.generate` called by hand.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mm.conversion.convert import export
from megatron_mm.generation.generate import Decoding, Generator
from megatron_mm.generation.prompts import read_prompts
from megatron_mm.hf.processing_mm import MultimodalProcessor
from megatron_mm.media.decoding import decode_image, decode_sound, decode_video, resample
from megatron_mm.media.transforms import center_crop_box, image_tensor, log_mel_spectrogram
from megatron_mm.platform.tool import status_of
from tests.conversion.export_case import (
    draw,
    draw_animation,
    hf_model,
    random_weights,
    sing,
    tiny_recipe,
    train_tokenizer,
    write_training_folder,
)
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A training run, its export, and media."""
    root = tmp_path_factory.mktemp("generate")
    recipe = tiny_recipe()
    tokenizer = train_tokenizer(root / "spm.model")
    write_training_folder(root / "run" / "checkpoints", recipe, random_weights(recipe.model), tokenizer)
    export(root / "run", root / "exported", quiet=True)
    draw(root / "a.png"), draw(root / "b.png", (24, 50), "RGBA"), draw_animation(root / "v.gif")
    sing(root / "a.wav"), sing(root / "low.wav", rate=8000, seconds=0.9, pitch=300)
    return root


@pytest.fixture(scope="module")
def processor(work):
    return MultimodalProcessor.from_pretrained(work / "exported")


@pytest.fixture(scope="module")
def generator(work):
    return Generator.from_path(work / "exported")


def test_images_are_read_as_training_reads_them(work, processor):
    c = processor.config
    for name in ("a.png", "b.png"):
        image = decode_image((work / name).read_bytes())
        box = center_crop_box(*image.size)
        wanted = image_tensor(image, c.vision_image_size, box, c.image_mean, c.image_std)
        ((pixels, frame),) = processor.media("images", work / name)
        assert torch.equal(pixels, wanted)
        assert frame == -1


def test_videos_are_read_as_training_reads_them(work, processor):
    c = processor.config
    frames = decode_video((work / "v.gif").read_bytes(), c.frames_per_video)
    read = processor.media("videos", work / "v.gif")
    assert [number for _, number in read] == [0, 1, 2]
    for (pixels, _), image in zip(read, frames):
        box = center_crop_box(*image.size)
        wanted = image_tensor(image, c.vision_image_size, box, c.image_mean, c.image_std)
        assert torch.equal(pixels, wanted)


def test_sounds_are_read_as_training_reads_them(work, processor):
    c = processor.config
    for name in ("a.wav", "low.wav"):
        samples, rate = decode_sound((work / name).read_bytes())
        samples = resample(samples, rate, c.audio_sample_rate)
        wanted = log_mel_spectrogram(samples, c.audio_sample_rate, c.audio_seconds, c.audio_num_mel_bins)
        ((features, _),) = processor.media("audios", work / name)
        assert torch.equal(features, wanted)


def test_prompts_become_padded_rows_with_their_media(work, processor):
    inputs = processor(
        [
            {"prompt": "what is this", "images": [work / "a.png"], "audios": [work / "a.wav"]},
            {"videos": [work / "v.gif"]},
            {"prompt": "a red sun"},
        ]
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    sp = processor.tokenizer
    assert ids[0][mask[0]].tolist() == [2, *sp.encode("<image><audio>what is this")]
    assert ids[1][mask[1]].tolist() == [2, *sp.encode("<video>")]
    assert ids[2][mask[2]].tolist() == [2, *sp.encode("a red sun")]
    assert mask[:, -1].all() and (ids[~mask] == 0).all()
    assert inputs["image_mask"].tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert inputs["image_frames"].tolist() == [[-1, -1, -1], [0, 1, 2], [-1, -1, -1]]
    assert inputs["sound_mask"].tolist() == [[True], [False], [False]]
    assert "pixel_values" not in processor({"prompt": "a red sun"})


def test_placeholders_are_added_only_where_missing():
    complete = MultimodalProcessor.with_placeholders
    assert complete({"prompt": "see", "images": ["a", "b"], "audios": ["c"]}) == "<image><image><audio>see"
    assert complete({"prompt": "see <image> and", "images": ["a", "b"]}) == "<image>see <image> and"
    assert complete({"prompt": "hear <audio>", "audios": ["a"]}) == "hear <audio>"
    with pytest.raises(ValueError, match="2 <image> but names 1 images"):
        complete({"prompt": "<image><image>", "images": ["a"]})


def test_decoding_stops_at_the_end_and_refuses_what_is_no_piece(processor):
    ids = processor.tokenizer.encode("a red sun")
    assert processor.decode([*ids, 3, *ids]) == "a red sun"
    assert processor.decode([2, *ids, 0]) == "a red sun"
    with pytest.raises(ValueError, match="319 is no id of the tokenizer, which has 300 pieces"):
        processor.decode([2, *ids, 319])


def test_bad_media_are_named(work, processor, tmp_path):
    for name, kind, data in (
        ("x.png", "images", b"\x89PNG no"),
        ("x.wav", "audios", b"RIFF"),
        ("x.mp4", "videos", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as one of the {kind}"):
            processor({kind: [tmp_path / name]})
    sing(tmp_path / "short.wav", rate=48000, seconds=1 / 48000)
    with pytest.raises(ValueError, match=r"short.wav: .*1 samples at 48000 Hz are none at 16000 Hz"):
        processor({"audios": [tmp_path / "short.wav"]})
    (tmp_path / "cut.png").write_bytes((work / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut.png: cannot be read"):
        processor({"images": [tmp_path / "cut.png"]})
    with pytest.raises(ValueError, match=r"gone.png: No such file"):
        processor({"images": [tmp_path / "gone.png"]})


def test_checkpoint_and_export_answer_the_same(work, generator):
    prompts = [
        {"prompt": "what is", "images": [work / "a.png"]},
        {"prompt": "the sound", "audios": [work / "a.wav"]},
        {"prompt": "", "videos": [work / "v.gif"]},
        {"prompt": "one two"},
    ]
    direct = Generator.from_path(work / "run")
    for decoding in (Decoding(8), Decoding(8, num_beams=3), Decoding(8, top_p=0.9, seed=4)):
        wanted = list(generator.generate(prompts, decoding, batch_size=3))
        assert len(wanted) == 4
        assert list(direct.generate(prompts, decoding, batch_size=3)) == wanted
    reference = hf_model(tiny_recipe())
    for name, tensor in generator.model.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name


def test_batches_do_not_change_greedy_answers(work, generator):
    prompts = [{"prompt": "what is", "images": [work / "a.png"]}, {"prompt": "one two three red"}, {"prompt": "a"}]
    together = list(generator.generate(prompts, Decoding(10), batch_size=3))
    assert together == list(generator.generate(prompts, Decoding(10), batch_size=1))


def test_decoding_out_of_range_is_refused():
    for wrong in (Decoding(0), Decoding(num_beams=0), Decoding(top_p=1.5), Decoding(top_p=0.5, temperature=0)):
        with pytest.raises(ValueError, match="must"):
            wrong.arguments()
    with pytest.raises(ValueError, match="choose one"):
        Decoding(top_p=0.9, num_beams=2).arguments()


def test_prompt_files_are_checked_line_by_line(tmp_path, work):
    file = tmp_path / "p.jsonl"
    good = {"prompt": "x", "images": ["a.png"], "text": "truth"}
    for line, message in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a line must be a JSON object"),
        ('{"prompt": 3}', 'line 2: field "prompt" must be a string'),
        ('{"images": "a.png"}', 'line 2: field "images" must be a list'),
        ('{"images": ["none.png"]}', r"line 2: no such file: .*none.png"),
        ('{"prompt": "<image>"}', "line 2: the prompt has 1 <image> but names 0 images"),
    ):
        file.write_text(json.dumps(good) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=message):
            read_prompts(file, work)
    file.write_text(json.dumps(good) + "\n\n")
    (prompt,) = read_prompts(file, work)
    assert prompt == {
        "id": "line 1", "prompt": "x", "text": "truth", "images": [str(work / "a.png")], "audios": [], "videos": [],
    }  # fmt: skip
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"none.jsonl: No such file"):
        read_prompts(tmp_path / "none.jsonl")


def run_tool(monkeypatch, capsys, *arguments):
    """The tool's main in this process: its status (usage errors exit), output and errors."""
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools" / "generate.py")
    tool = sys.modules["generate_tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    try:
        status = status_of(tool.main)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_tool_answers_a_file_of_prompts(work, tmp_path, generator, monkeypatch, capsys):
    lines = [{"id": "p", "images": ["a.png"], "text": "a cat"}, {"id": "q", "audios": ["a.wav"]}]
    (work / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("--input", work / "prompts.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    status, out, err = run_tool(monkeypatch, capsys, "--model", work / "exported", *arguments)
    assert status == 0, err
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    prompts = [{"images": [work / "a.png"]}, {"audios": [work / "a.wav"]}]
    assert [line["generated"] for line in got] == list(generator.generate(prompts, Decoding(6)))
    assert [line.get("reference") for line in got] == ["a cat", None] and [line["id"] for line in got] == ["p", "q"]
    assert all(f"{line['id']}: {line['generated']}" in out for line in got)
    assert not list(tmp_path.glob("*.part"))


def test_the_tool_says_what_is_wrong(work, tmp_path, monkeypatch, capsys):
    model = ("--model", work / "exported")
    status, _, err = run_tool(monkeypatch, capsys, *model, "--image", tmp_path / "none.png")
    assert status == 1 and "no such file" in err
    assert run_tool(monkeypatch, capsys, *model, "--prompt", "x", "--input", "y")[0] == 2
    assert run_tool(monkeypatch, capsys, *model)[0] == 2
    status, _, err = run_tool(monkeypatch, capsys, "--model", tmp_path / "none", "--prompt", "x")
    assert status == 1 and "none: no such folder" in err


def test_answers_before_a_corrupt_file_are_kept(work, tmp_path, monkeypatch, capsys):
    (work / "bad.png").write_bytes(b"no picture")
    (work / "bad.jsonl").write_text('{"images": ["a.png"]}\n{"images": ["bad.png"]}\n')
    arguments = ("--input", work / "bad.jsonl", "--output", tmp_path / "bad.jsonl", "--batch-size", 1)
    status, _, err = run_tool(monkeypatch, capsys, "--model", work / "exported", *arguments)
    assert status == 1 and "bad.png: cannot be read" in err and "answers so far are in" in err
    assert len((tmp_path / "bad.jsonl.part").read_text().splitlines()) == 1
    assert not (tmp_path / "bad.jsonl").exists()


def test_answers_of_an_earlier_start_are_kept(tmp_path, monkeypatch, capsys):
    """A second start of a tool that was killed fails before its first answer: the twelve of the first are all there."""
    lines = [{"id": number, "prompt": f"question {number}"} for number in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    earlier = "".join(json.dumps({**line, "generated": "answer"}) + "\n" for line in lines[:12])
    (tmp_path / "out.jsonl.part").write_text(earlier)
    (tmp_path / "out.jsonl.part.1").write_text("of one more start\n")

    class Broken:
        def generate(self, *_, **__):
            raise ValueError("a medium cannot be read")
            yield

    monkeypatch.setattr(Generator, "from_path", classmethod(lambda cls, *_, **__: Broken()))
    arguments = ("--model", tmp_path, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    status, _, err = run_tool(monkeypatch, capsys, *arguments)
    assert status == 1 and "answers of an earlier start are in" in err and "out.jsonl.part.2" in err
    assert (tmp_path / "out.jsonl.part.2").read_text() == earlier
    assert (tmp_path / "out.jsonl.part.1").read_text() == "of one more start\n"
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl.part.1", "out.jsonl.part.2"]


def test_prompts_are_not_replaced_by_answers(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    file = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "in.jsonl")
    status, _, err = run_tool(monkeypatch, capsys, "--model", tmp_path, *file)
    assert status == 2 and "in.jsonl: holds something else than JSONL with generated" in err
    assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "x"}\n' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_the_tool_runs_from_the_command_line_on_a_checkpoint(work, generator):
    command = [PYTHON, ROOT / "tools" / "generate.py", "--model", work / "run", "--image", work / "a.png"]
    done = subprocess.run([*command, "--max-new-tokens", "5"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == next(generator.generate([{"images": [work / "a.png"]}], Decoding(5)))
