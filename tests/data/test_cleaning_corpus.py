"""A whole cleaning: killed and continued, counted, read by the builders.

Truth: the folder of an undisturbed run with another number of workers, byte for byte; counts made here of the lines;
the dataset that is built of a file from which the dropped lines were removed by hand.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.cleaning.drop_list import DropList
from megatron_mm.data.cleaning.duplicates import DuplicateRules
from megatron_mm.data.cleaning.field_rules import FieldRules
from megatron_mm.data.cleaning.media_rules import ImageRules, SoundRules
from megatron_mm.data.cleaning.scan import Rules
from megatron_mm.data.cleaning.text_rules import TextRules
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.jobs.parallel import LineBlock
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError
from tests.support.killing import kill_and_continue, undisturbed
from tests.support.programs import PYTHON

TOOLS = Path(__file__).parents[2] / "tools"
#: Cleans: python -c CLEAN output workers inputs.
CLEAN = """
import sys
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
output, workers, *inputs = sys.argv[1:]
clean_corpus(inputs, output, workers=int(workers), progress=False)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def crawl(folder: Path, records: int) -> list[Path]:
    """Two files of texts of which some come again, whole or changed a little."""
    dice, texts = random.Random(0), []
    for _ in range(records):
        if texts and dice.random() < 0.3:
            words = dice.choice(texts).split()
            for _ in range(dice.randrange(3)):
                words[dice.randrange(len(words))] = "another"
            texts.append(" ".join(words))
        else:
            texts.append(" ".join(f"{dice.getrandbits(24):x}" for _ in range(dice.choice((8, 60, 200)))))
    lines = [json.dumps({"text": text, "score": number / records}) + "\n" for number, text in enumerate(texts)]
    one, two = folder / "one.jsonl", folder / "two.jsonl.gz"
    one.write_text("".join(lines[: records // 2]))
    two.write_bytes(gzip.compress("".join(lines[records // 2 :]).encode()))
    return [one, two]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    inputs = crawl(tmp_path, 4000)
    out, whole = tmp_path / "out", tmp_path / "whole"
    undisturbed(CLEAN, whole, 0, *inputs)
    building = tmp_path / "out.building"
    said = kill_and_continue(CLEAN, lambda attempt: [out, (2, 0, 1)[attempt % 3], *inputs], building, 4, 0.1)
    assert ["continues an unfinished build" in text for text in said] == [False, True, True, True, True]
    assert contents(out) == contents(whole)
    assert json.loads((out / "report.json").read_text())["reasons"].keys() == {
        "exact duplicate", "near duplicate of text",
    }  # fmt: skip


def test_neither_workers_nor_memory_show(samples, tmp_path):
    for name, workers, memory in (("a", 0, 1.0), ("b", 2, 1.0), ("c", 1, 1e-5)):
        rules = DuplicateRules(memory_gb=memory)
        clean_corpus([str(samples)], str(tmp_path / name), duplicates=rules, workers=workers, progress=False)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert first.keys() == {"drops.npy", "dropped.jsonl", "manifest.json", "report.json", "report.md"}


@pytest.mark.parametrize("failing", ["Resolver", "write_manifest"])
def test_what_fails_in_the_second_pass_continues(failing, tmp_path, monkeypatch, capsys):
    """The disk is full while duplicates are looked for, or when the manifest is written."""
    inputs = list(map(str, crawl(tmp_path, 400)))
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[clean_corpus.__module__], failing, full)
        with pytest.raises(OSError, match="No space left"):
            clean_corpus(inputs, str(tmp_path / "out"), workers=0, progress=False)
    assert "the same command continues there" in capsys.readouterr().err
    clean_corpus(inputs, str(tmp_path / "out"), workers=2, progress=False)
    assert "continues an unfinished build" in capsys.readouterr().err
    clean_corpus(inputs, str(tmp_path / "whole"), workers=0, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.building").exists()


def test_an_input_that_grows_meanwhile_is_refused(tmp_path):
    """A predicate appends to the file that is read; the list would be of neither the old file nor the new."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    mine = tmp_path / "grows.py"
    mine.write_text(f"def keep(record):\n    open({str(tmp_path / 'a.jsonl')!r}, 'a').write(chr(10))\n")
    with pytest.raises(DataError, match=r"a.jsonl: has 15 bytes, but 14 when this run began"):
        rules = Rules(predicate=f"{mine}:keep")
        clean_corpus([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), rules=rules, workers=0, progress=False)


def test_the_report_adds_up(tmp_path):
    inputs = crawl(tmp_path, 400)
    rules = Rules(TextRules(min_words=10), fields=FieldRules(above=(("score", 0.1),)))
    report = clean_corpus(list(map(str, inputs)), str(tmp_path / "out"), rules=rules, workers=0, progress=False)
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
    reasons = [line["reason"] for line in dropped]
    assert {name: entry["records"] for name, entry in report["reasons"].items()} == {
        name: reasons.count(name) for name in set(reasons)
    }
    assert report["reasons"]["field: score above 0.1"]["records"] == 41  # 0/400 to 40/400
    assert set(reasons) > {"text: min_words", "exact duplicate", "near duplicate of text"}
    texts = [json.loads(line)["text"] for line in inputs[0].open()]
    texts += [json.loads(line)["text"] for line in gzip.decompress(inputs[1].read_bytes()).splitlines()]
    gone = [texts[line["line"] - 1 + (200 if line["file"].endswith("gz") else 0)] for line in dropped]
    assert all(text.startswith(line["text"]) and line["text"] for text, line in zip(gone, dropped))
    assert report["records"] == {"before": 400, "dropped": len(dropped), "after": 400 - len(dropped)}
    before, lost = sum(map(len, texts)), sum(map(len, gone))
    assert report["characters"] == {"before": before, "dropped": lost, "after": before - lost}
    assert sum(entry["characters"] for entry in report["reasons"].values()) == lost
    assert [(file["before"], file["dropped"]) for file in report["files"]] == [
        (200, sum(line["file"] == str(path) for line in dropped)) for path in inputs
    ]
    for name, entry in report["reasons"].items():
        assert len(entry["samples"]) == min(3, entry["records"])
        assert all(sample in dropped and sample["reason"] == name for sample in entry["samples"])
    table = (tmp_path / "out" / "report.md").read_text()
    assert f"| exact duplicate | {reasons.count('exact duplicate')} |" in table
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())


def test_unreadable_records_end_the_run_or_are_dropped(samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((samples.parent / "1-0.png").read_bytes()[:100])
    lines = [
        b'{"text": "good"}', b"not json", b'{"txt": "a"}', b'{"text": "<image>", "images": ["broken.png"]}',
        b'{"text": "<image>", "images": ["missing.png"]}', b'{"text": "a", "images": ["missing.png"]}',
        b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": " "}',
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    for number, named in ((2, "line 2: not JSON"), (4, r"line 4: .*broken.png: corrupt image")):
        bad = tmp_path / f"bad-{number}.jsonl"
        bad.write_bytes(lines[number - 1].rjust(len(lines[number - 1]) + number - 1, b"\n"))
        with pytest.raises(DataError, match=named):
            clean_corpus([str(bad)], str(tmp_path / "bad"), workers=0, progress=False)
    report = clean_corpus([str(path)], str(tmp_path / "out"), rules=Rules(on_error="drop"), workers=0, progress=False)
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open(encoding="utf-8")]
    assert [line["line"] for line in dropped] == list(range(2, 10))
    assert [line["reason"] for line in dropped] == ["unreadable"] * 7 + ["empty"]
    for line, said in zip(dropped, ("not JSON", "lacks the field", "corrupt image", "no such file", "placeholder")):
        assert said in line["detail"]["error"]
    assert report["reasons"]["unreadable"]["records"] == 7
    with pytest.raises(DataError, match="exists already; remove it"):
        clean_corpus([str(path)], str(tmp_path / "out"), progress=False)
    unseen = clean_corpus(
        [str(path)], str(tmp_path / "out"), rules=Rules(on_error="drop", check=False),
        duplicates=DuplicateRules(images="off", exact="off"), workers=0, overwrite=True, progress=False,
    )  # fmt: skip
    assert unseen["reasons"]["unreadable"]["records"] == 5  # media are not looked at


def test_rules_of_media_and_samples_with_them(samples, tmp_path):
    """Truth: `conftest.write_samples`: images are 40 + i % 7 wide, sounds (2400 + 10i) / 8000 seconds."""
    rules = Rules(images=ImageRules(min_pixels=40 * 36 + 1), audios=SoundRules(max_seconds=0.33))
    off = DuplicateRules(exact="off", near=None, images="off")
    clean_corpus([str(samples)], str(tmp_path / "out"), rules=rules, duplicates=off, workers=0, progress=False)
    found = {(line["line"], line["reason"]) for line in map(json.loads, (tmp_path / "out" / "dropped.jsonl").open())}
    small = {i + 1 for i in range(60) if (0, 1, 2, 1, 0)[i % 5] and i % 7 == 0}
    long = {i + 1 for i in range(60) if i % 3 == 0 and 2400 + 10 * i > 0.33 * 8000}
    assert found == {(n, "images: min_pixels") for n in small} | {(n, "audios: max_seconds") for n in long - small}


@pytest.fixture
def cleaned(samples, tmp_path) -> tuple[Path, list[int]]:
    """A cleaning of the samples by their text, and the lines that are left, by hand."""
    mine = tmp_path / "mine.py"
    mine.write_text("def keep(record):\n    return 'green' not in record['text'] or 'a green ball'\n")
    rules = Rules(predicate=f"{mine}:keep")
    off = DuplicateRules(exact="off", near=None, images="off")
    out = tmp_path / "clean"
    clean_corpus([str(samples)], str(out), rules=rules, duplicates=off, workers=0, progress=False)
    left = [number for number, line in enumerate(samples.open(), 1) if "green" not in json.loads(line)["text"]]
    assert len(left) == 45
    return out, left


@pytest.mark.parametrize("workers", [0, 2])
def test_builders_leave_dropped_lines_out(workers, cleaned, samples, tokenizer_path, tmp_path):
    folder, left = cleaned
    lines = samples.read_text().splitlines(keepends=True)
    by_hand = samples.parent / "by-hand.jsonl"
    by_hand.write_text("".join(lines[number - 1] for number in left))
    made = build_multimodal(
        [str(samples)], str(tmp_path / "x"), tokenizer_path, workers=workers, progress=False, drop=str(folder)
    )
    wanted = build_multimodal([str(by_hand)], str(tmp_path / "y"), tokenizer_path, workers=0, progress=False)
    assert made["counts"] == wanted["counts"] and made["counts"]["samples"] == 45
    files = {name: data for name, data in contents(tmp_path / "x").items() if name != "manifest.json"}
    assert files == {name: data for name, data in contents(tmp_path / "y").items() if name != "manifest.json"}
    identity = json.loads((folder / "manifest.json").read_text())["checksum"]
    assert made["options"]["drop"] == identity and "drop" not in wanted["options"]
    for name, source, drop in (("t", samples, str(folder)), ("u", by_hand, None)):
        build_text([str(source)], str(tmp_path / name), tokenizer_path, workers=workers, progress=False, drop=drop)
    one, other = (tmp_path / f"{name}_text_document.bin" for name in "tu")
    assert one.read_bytes() == other.read_bytes()
    assert Shard(str(tmp_path / "t_text_document")).manifest["options"]["drop"] == identity


def test_blocks_of_lines_wherever_they_are_cut(cleaned, samples):
    folder, left = cleaned
    drops, lines = DropList(str(folder)), samples.read_bytes().splitlines(keepends=True)
    for begin in range(0, 60, 3):
        for end in range(begin + 1, 61, 5):
            for cut in (None, -1):  # the last line of a file may have no end
                block = LineBlock(str(samples), begin + 1, b"".join(lines[begin:end])[:cut], end - begin, 0)
                assert drops.within(block) == set(range(begin + 1, end + 1)) - set(left)


def test_a_list_of_other_inputs_is_refused(cleaned, samples, tokenizer_path, tmp_path):
    folder, _ = cleaned

    def refused(message: str, source: Path = samples, drop: Path = folder) -> None:
        for build, output in ((build_multimodal, tmp_path / "x"), (build_text, tmp_path / "t")):
            with pytest.raises(DataError, match=message):
                build([str(source)], str(output), tokenizer_path, workers=0, progress=False, drop=str(drop))

    copy = samples.parent / "copy.jsonl"
    shutil.copy(samples, copy)
    refused(r"copy.jsonl: .*clean was made without this file", copy)
    refused(r"name a folder that tools/clean_corpus.py wrote", drop=tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    drops = np.load(damaged / "drops.npy")
    np.save(damaged / "drops.npy", drops[:-1])
    refused(r"drops.npy: damaged \(it and manifest.json disagree\)", drop=damaged)
    np.save(damaged / "drops.npy", drops + np.uint64(1))
    refused(r"drops.npy: damaged \(its SHA-256", drop=damaged)
    clean_corpus([str(copy)], str(tmp_path / "new"), workers=0, progress=False)
    with copy.open("a") as stream:
        stream.write("\n")
    refused(r"copy.jsonl: has \d+ bytes, but \d+ when .*; run tools/clean_corpus.py again", copy, tmp_path / "new")


@pytest.mark.slow
def test_the_tools(samples, tokenizer_path, tmp_path):
    (tmp_path / "words.txt").write_text("orange\n")

    def run(tool: str, *words: str) -> subprocess.CompletedProcess:
        command = [PYTHON, TOOLS / tool, "--input", str(samples), "--workers", "0", *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=tmp_path)

    options = ("--blocklist", "words.txt", "--images.max-aspect", "1.2", "--duplicates.images", "off")
    done = run("clean_corpus.py", "--output", "clean", *options)
    assert done.returncode == 0, done.stderr
    assert "| blocklist | 15 | 25.00% |" in done.stdout and "--drop clean" in done.stdout
    left = json.loads((tmp_path / "clean" / "report.json").read_text())["records"]["after"]
    model = ("--tokenizer-model", tokenizer_path, "--drop", "clean")
    done = run("preprocess_multimodal.py", "--output", "set", *model)
    assert done.returncode == 0 and f"wrote set: {left} samples" in done.stdout, done.stderr
    done = run("preprocess_data.py", "--output-prefix", "set", *model)
    assert done.returncode == 0 and f": {left} documents" in done.stdout, done.stderr
    done = run("clean_corpus.py", "--output", "more", "--field-below", "nsfw", "0.5")
    assert done.returncode == 1
    assert 'samples.jsonl, line 1: lacks the field "nsfw", which a rule asks for' in done.stderr
