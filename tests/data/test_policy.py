"""What cannot be used is left out or stood in for where asked: by builders line by line, in training medium by medium.

Truth: for a builder, the build of the same input without its bad lines; for training, rows of undamaged shards.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.reading.dataset import build_datasets, whole_dataset
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.view.inspection import verify
from megatron_mm.media.errors import DataError
from tests.support.corpus import build_corpus, corpus_config
from tests.support.killing import kill_and_continue, undisturbed
from tests.support.programs import PYTHON

TOOLS = Path(__file__).parents[2] / "tools"
BAD = {
    1: (b"{oops", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
    17: (b'{"text": 3}', 'field "text" must be a string, not int'),
    18: (b'{"text": "caf\xe9"}', "not UTF-8 (invalid continuation byte at byte 13)"),
    40: (b'{"text": "<image>", "images": ["gone.png"]}', "no such file: "),
    41: (b'{"text": "<image>", "images": ["0.wav"]}', "not an image that Pillow can read"),
    70: (b"[]", "a line must be a JSON object, not list"),
}


def with_bad_lines(samples: Path, copies: int = 1) -> tuple[Path, Path]:
    """The samples with bad lines among them, and without."""
    bad, good = samples.parent / f"some-bad-{copies}.jsonl", samples.parent / f"all-good-{copies}.jsonl"
    lines = samples.read_bytes().splitlines() * copies
    good.write_bytes(b"\n".join(lines) + b"\n")
    for number, (line, _) in BAD.items():
        lines.insert(min(number - 1, len(lines)), line)
    bad.write_bytes(b"\n".join(lines) + b"\n")
    return bad, good


def contents(folder: Path) -> dict[str, bytes]:
    """Files but manifests (which name the sources) and lists."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith((".json", ".jsonl"))}


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_listed(samples, tmp_path, tokenizer_path, workers):
    bad, good = with_bad_lines(samples)
    for name, source, options in (("bad", bad, {"on_error": "skip"}), ("good", good, {})):
        build_multimodal([str(source)], str(tmp_path / name), tokenizer_path, workers=workers, progress=False,
                         **options)  # fmt: skip
    assert contents(tmp_path / "bad") == contents(tmp_path / "good")
    found = listed(tmp_path / "bad" / "skipped.jsonl")
    numbers = [min(number, 66) for number in BAD]  # the last stands at the end
    assert [(entry["file"], entry["line"]) for entry in found] == [(str(bad), number) for number in numbers]
    for entry, (_, cause) in zip(found, BAD.values()):
        assert cause in entry["cause"] and str(bad) not in entry["cause"]
    assert not (tmp_path / "good" / "skipped.jsonl").exists()
    shard = Shard(str(tmp_path / "bad"), open_tokenizer(tokenizer_path))
    assert shard.manifest["counts"]["skipped"] == 6 and shard.manifest["counts"]["samples"] == 60
    assert shard.manifest["options"]["on_error"] == "skip"
    assert verify(shard, open_tokenizer(tokenizer_path), progress=False) == []


@pytest.mark.slow
def test_the_tools_say_how_many_and_where(samples, tmp_path, tokenizer_path):
    bad, good = with_bad_lines(samples)
    command = [PYTHON, str(TOOLS / "preprocess_multimodal.py"), "--input", str(bad), "--tokenizer-model",
               tokenizer_path, "--output", str(tmp_path / "x"), "--on-error"]  # fmt: skip
    run = subprocess.run([*command, "stop"], capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "some-bad-1.jsonl, line 1: not JSON" in run.stderr
    run = subprocess.run([*command, "skip"], capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert f"left out 6 samples; {tmp_path}/x/skipped.jsonl lists them with their causes" in run.stdout
    command = [PYTHON, str(TOOLS / "preprocess_data.py"), "--input", str(bad), "--tokenizer-model",
               tokenizer_path, "--output-prefix", str(tmp_path / "t"), "--on-error", "skip"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert f"left out 4 lines; {tmp_path}/t_skipped.jsonl lists them with their causes" in run.stdout
    counts = json.loads((tmp_path / "t_text_document.json").read_text())["counts"]
    assert counts["documents"] == 62 and counts["skipped"] == 4
    assert [entry["line"] for entry in listed(tmp_path / "t_skipped.jsonl")] == [1, 17, 18, 66]
    run = subprocess.run([*command, "--overwrite", "--input", str(good)], capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and "left out" not in run.stdout, run.stderr
    assert not (tmp_path / "t_skipped.jsonl").exists(), "the list of the replaced shard is gone with it"


def test_text_with_several_keys_leaves_out_whole_lines(tmp_path, tokenizer_path):
    (tmp_path / "bad.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": "one only"}\n{"a": "z", "b": "w"}\n')
    (tmp_path / "good.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": "z", "b": "w"}\n')
    for name in ("bad", "good"):
        build_text([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), tokenizer_path, ["a", "b"],
                   workers=0, progress=False, on_error="skip")  # fmt: skip
    for key in ("a", "b"):
        bad, good = (tmp_path / f"{name}_{key}_document" for name in ("bad", "good"))
        assert bad.with_suffix(".bin").read_bytes() == good.with_suffix(".bin").read_bytes()
        assert bad.with_suffix(".idx").read_bytes() == good.with_suffix(".idx").read_bytes()
    assert [entry["cause"] for entry in listed(tmp_path / "bad_skipped.jsonl")] == ['lacks the field "b" (it has: a)']


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_nothing_but_bad_lines(kind, tmp_path, tokenizer_path):
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n\n[]\n')
    build = build_multimodal if kind == "multimodal" else build_text
    message = r'none of the 2 lines of the input can be used; the first: .*bad.jsonl, line 1: lacks the field "text"'
    with pytest.raises(DataError, match=message):
        build([str(tmp_path / "bad.jsonl")], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False,
              on_error="skip")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_damage_that_hides_what_follows_stops_all_the_same(samples, tmp_path, tokenizer_path):
    import gzip

    path = samples.parent / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(samples.read_bytes())[:-30])
    with pytest.raises(DataError, match="damaged gzip"):
        build_multimodal([str(path)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False, on_error="skip")


#: python -c BUILD kind input output tokenizer workers.
BUILD = """
import sys
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
kind, source, output, tokenizer, workers = sys.argv[1:]
build = build_text if kind == "text" else build_multimodal
build([source], output, tokenizer, workers=int(workers), progress=False, on_error="skip")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_a_killed_build_ends_with_the_same_list(kind, samples, tmp_path, tokenizer_path):
    lines = samples.read_bytes().splitlines()
    source = samples.parent / f"killed-{kind}.jsonl"
    one = b"\n".join([*lines[:20], b"{oops", *lines[20:], b'{"text": 5}', b""])
    source.write_bytes(one * (12 if kind == "multimodal" else 900))
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.mkdir(), whole.mkdir()

    def words(folder: Path, workers: int) -> list[object]:
        return [kind, source, folder / "x", tokenizer_path, workers]

    undisturbed(BUILD, *words(whole, 0))
    said = kill_and_continue(BUILD, lambda attempt: words(out, attempt % 2), out / "x.building", 2)
    assert "continues an unfinished build" in said[1] and "continues an unfinished build" in said[2]
    names = ["x/skipped.jsonl", "x/text.bin"] if kind == "multimodal" else ["x_skipped.jsonl", "x_text_document.bin"]
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert len(listed(out / names[0])) == 2 * (12 if kind == "multimodal" else 900)


def test_another_policy_starts_anew(samples, tmp_path, tokenizer_path, monkeypatch, capsys):
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)
    source = samples.parent / "later.jsonl"
    source.write_bytes(samples.read_bytes() + b"{oops\n")
    with pytest.raises(DataError, match="line 61: not JSON"):
        build_multimodal([str(source)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    build_multimodal([str(source)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False, on_error="skip")
    assert "begun with other options: starts anew" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "x")


READ = {"tokens_RT", "labels_RT", "images_ICHW", "image_frames_I", "sounds_AMF"}


def damage(folder: str, copy: Path, records: dict[str, list[int]]) -> str:
    """A copy of a dataset whose records of some shards are zeros."""
    shutil.copytree(folder, copy)
    for name, numbers in records.items():
        reader = Shard(folder).media[{"images": "images", "sounds": "audios", "videos": "videos"}[name]]
        with open(copy / f"{name}.bin", "r+b") as stream:
            for number in numbers:
                stream.seek(int(reader.sequence_pointers[number]))
                stream.write(bytes(len(reader.document(number))))
    return str(copy)


def tensors(batch: Microbatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_media_are_grey_or_silent_and_all_else_is_as_it_was(config, folder, tmp_path, workers):
    bad = damage(folder, tmp_path / "bad" / "balls", {"images": [3, 20], "sounds": [5], "videos": [1]})
    batches = {}
    for path, policy in ((folder, "stop"), (bad, "skip")):
        config = changed(
            config,
            {
                "data.datasets": [DatasetConfig(path=path)],
                "data.on_corrupt": policy,
                "data.split": "1",
            },
        )
        train = build_datasets(config).train
        loader = MicrobatchLoader(train, 0, train.num_rows, 0, 1, train.num_rows, READ, workers)
        batches[path] = next(loader)
        loader.close()
        others = next(MicrobatchLoader(train, 0, train.num_rows, 0, 1, train.num_rows, {"tokens_RT"}))
        assert others.plan == batches[path].plan and others.corrupt_media == []
        for name, value in tensors(others).items():
            assert torch.equal(value, getattr(batches[path], name)), name
    good, skipped = batches[folder], batches[bad]
    assert good.plan == skipped.plan and good.sample_ids == skipped.sample_ids and good.corrupt_media == []
    for name in tensors(good).keys() - {"images_ICHW", "sounds_AMF"}:
        assert torch.equal(getattr(good, name), getattr(skipped, name)), name
    differ = (good.images_ICHW != skipped.images_ICHW).flatten(1).any(1)
    assert int(differ.sum()) == 2 + 3 and (skipped.images_ICHW[differ] == 0).all(), "two stills, a video of 3 frames"
    silent = (good.sounds_AMF != skipped.sounds_AMF).flatten(1).any(1)
    assert int(silent.sum()) == 1
    assert torch.allclose(skipped.sounds_AMF[silent], torch.tensor(-1.5)), "the floor: (log10 1e-10 + 4) / 4"
    for message in skipped.corrupt_media:
        assert re.search(r"bad/balls/\w+\.bin, record \d+ \(sample [\w-]+\): \w", message)
    names = [re.search(r"balls/(.*?) \(", message)[1] for message in skipped.corrupt_media]
    assert sorted(names[:3]) == ["images.bin, record 20", "images.bin, record 3", "videos.bin, record 1"]
    assert names[3:] == ["sounds.bin, record 5"], "images before sounds, whatever Python's hashes are"


def test_every_layout_reads_the_same_stand_ins(config, folder, tmp_path):
    """One rank with rows of two, or two ranks with rows of one: the same pixels for the same sample."""
    bad = damage(folder, tmp_path / "bad" / "balls", {"images": list(range(0, 40, 2))})
    config = changed(config, {"data.datasets": [DatasetConfig(path=bad)], "data.on_corrupt": "skip"})
    train = build_datasets(config).train

    def rows(size: int, ranks: int) -> dict[int, torch.Tensor]:
        found = {}
        for rank in range(ranks):
            loader = MicrobatchLoader(train, 0, size, rank, ranks, 4, READ)
            for batch in (next(loader) for _ in range(4)):
                for row, number in enumerate(batch.sample_numbers_R.tolist()):
                    slots = batch.image_slots_RK[row]
                    found[number] = batch.images_ICHW[slots[slots >= 0]]
        return found

    one, two = rows(2, 1), rows(1, 2)
    assert len(one.keys() & two.keys()) == 8
    for number in one.keys() & two.keys():
        assert torch.equal(one[number], two[number])
    assert any((image == 0).all() for images in one.values() for image in images)


def test_what_always_stops(config, folder, tmp_path):
    """Tokens outside the vocabulary, whatever the policy; corrupt media, where a model is scored."""
    bad = damage(folder, tmp_path / "bad" / "balls", {"images": [0]})
    config = changed(config, {"data.datasets": [DatasetConfig(path=bad)], "data.on_corrupt": "skip"})
    whole = whole_dataset(config)
    with pytest.raises(DataError, match=r"bad/balls/images\.bin, record 0 "):
        whole.microbatch(range(whole.num_rows), {"images_ICHW"})
    config = changed(config, {"data.split": "1"})
    train = build_datasets(config).train
    train._vocab_size = 20
    with pytest.raises(DataError, match=r"token ids from .* the vocabulary has 20"):
        train.microbatch(range(train.num_rows), {"tokens_RT"})


@pytest.mark.slow
def test_a_run_counts_and_names_them_in_any_layout(tmp_path):
    """Truth: the run of one process. A pipeline of two reads images in one process and loses in the other."""
    dataset, tokenizer = build_corpus(tmp_path / "corpus")
    bad = damage(str(dataset), tmp_path / "bad", {"images": list(range(0, 90, 9)), "sounds": [2]})
    losses, counts = {}, {}
    for stages in (1, 2):
        output = tmp_path / f"run-{stages}"
        config = changed(
            corpus_config(Path(bad), tokenizer, output),
            {
                "training.train_iters": 4,
                "optimizer.lr_decay_iters": 4,
                "checkpoint.save_interval": 0,
                "parallel.pipeline_model_parallel_size": stages,
                "data.on_corrupt": "skip",
            },
        )
        dump_config(config, tmp_path / "recipe.yaml")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if stages > 1 else []
        run = subprocess.run([PYTHON, *launcher, str(TOOLS.parent / "pretrain_multimodal.py"), "--config",
                              str(tmp_path / "recipe.yaml")], capture_output=True, encoding="utf-8")  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        figures = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses[stages], counts[stages] = ([figure[name] for figure in figures] for name in ("loss", "corrupt_media"))
        named = re.findall(r"warning: (\S+, record \d+) .*; it is read as grey or as silence", run.stdout)
        assert named and len(named) == len(set(named)) and all(bad in name for name in named)
        total, records = re.search(r"(\d+) times a medium did not decode \((\d+) records", run.stdout).groups()
        assert int(records) == len(named) and int(total) >= sum(counts[stages]) > 0
        assert f"{counts[stages][0]} corrupt media" in run.stdout or not counts[stages][0]
    assert counts[1] == counts[2]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
