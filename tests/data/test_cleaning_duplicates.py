"""Duplicates over several inputs: planted ones, groups, partitions, and images against comparison of all with all."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import itertools
import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_mm.data.cleaning import duplicates
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.cleaning.duplicates import (
    EXACT,
    KEPT,
    REJECTED_BY_RULE,
    SAME_IMAGES,
    DuplicateRules,
    Links,
    Resolver,
    block_tables,
    groups_of,
    link,
)
from megatron_mm.data.cleaning.scan import IMAGE_DTYPE, IMAGES, RECORD_DTYPE, RECORDS, TEXTS
from megatron_mm.data.reading.order import mixed
from megatron_mm.media.errors import DataError


def passage(dice: random.Random, words: int = 120) -> str:
    return " ".join(f"{dice.getrandbits(40):x}" for _ in range(words))


def reworded(text: str, changes: int) -> str:
    """With every so many-th word another."""
    words = text.split()
    step = len(words) // changes
    return " ".join(f"other{i}" if i % step == step // 2 else word for i, word in enumerate(words))


def jaccard(first: str, second: str, size: int = 5) -> float:
    one, other = ({tuple(w[i : i + size]) for i in range(len(w) - size + 1)} for w in (first.split(), second.split()))
    return len(one & other) / len(one | other)


def run(inputs: list[Path], output: Path, **options) -> dict[tuple[str, int], dict]:
    """The lines of dropped.jsonl, by file name and line."""
    shutil.rmtree(output, ignore_errors=True)
    clean_corpus([str(path) for path in inputs], str(output), workers=0, progress=False, **options)
    lines = [json.loads(line) for line in (output / "dropped.jsonl").open(encoding="utf-8")]
    return {(Path(line["file"]).name, line["line"]): line for line in lines}


def origin(line: dict) -> tuple[str, int]:
    return Path(line["detail"]["of"]["file"]).name, line["detail"]["of"]["line"]


def test_planted_texts_across_files_and_formats(tmp_path):
    dice = random.Random(0)
    first, second, third, fourth = (passage(dice) for _ in range(4))
    close, far = reworded(second, 2), reworded(third, 8)
    assert jaccard(second, close) > 0.83 and jaccard(third, far) < 0.6
    one, two, three = tmp_path / "one.jsonl", tmp_path / "two.csv", tmp_path / "three.jsonl.gz"
    with one.open("w") as stream:
        for text in (first, second, third):
            stream.write(json.dumps({"text": text}) + "\n\n")  # lines 1, 3, 5
    with two.open("w", newline="") as stream:  # the header is line 1
        csv.writer(stream).writerows([["text"], [first.upper() + "  "], [fourth], [close]])
    three.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in (far, fourth)).encode()))
    dropped = run([one, two, three], tmp_path / "out")
    found = {place: (line["reason"], origin(line)) for place, line in dropped.items()}
    assert found == {
        ("two.csv", 2): ("exact duplicate", ("one.jsonl", 1)),
        ("two.csv", 4): ("near duplicate of text", ("one.jsonl", 3)),
        ("three.jsonl.gz", 2): ("exact duplicate", ("two.csv", 3)),
    }
    similarity = dropped["two.csv", 4]["detail"]["similarity"]
    assert abs(similarity - jaccard(second, close)) < 4 * 0.035
    # In the other order the others are kept; verbatim, upper case is another text, but near.
    assert set(run([three, two, one], tmp_path / "out")) == {("one.jsonl", 1), ("one.jsonl", 3), ("two.csv", 3)}
    rules = DuplicateRules(exact="verbatim", near=None)
    assert set(run([one, two, three], tmp_path / "out", duplicates=rules)) == {("three.jsonl.gz", 2)}
    assert not run([one, two, three], tmp_path / "out", duplicates=DuplicateRules(exact="off", near=None))


def test_what_a_rule_drops_is_nobodys_original(tmp_path):
    """The first of two equal texts has a bad score; the second is kept."""
    path = tmp_path / "a.jsonl"
    text = passage(random.Random(0))
    path.write_text("".join(json.dumps({"text": text, "nsfw": score}) + "\n" for score in (0.9, 0.1, 0.2)))
    from megatron_mm.data.cleaning.field_rules import FieldRules
    from megatron_mm.data.cleaning.scan import Rules

    dropped = run([path], tmp_path / "out", rules=Rules(fields=FieldRules(below=(("nsfw", 0.5),))))
    assert dropped["a.jsonl", 1]["reason"] == "field: nsfw below 0.5"
    assert origin(dropped["a.jsonl", 3]) == ("a.jsonl", 2) and len(dropped) == 2


def test_a_chain_of_changes_keeps_its_far_end(tmp_path):
    """Each text resembles the one before it; the last does not resemble the first.

    Dropped ones name a kept one that they resemble (less four standard deviations of the estimate), and one that
    resembles none before it within as many is kept: all in one group would leave the first alone.
    """
    dice = random.Random(5)
    words = passage(dice, 300).split()
    chain = []
    for step in range(6):
        chain.append(" ".join(words))
        words[step * 40 : step * 40 + 12] = [f"new{step}x{i}" for i in range(12)]
    assert all(jaccard(a, b) > 0.88 for a, b in itertools.pairwise(chain)) and jaccard(chain[0], chain[5]) < 0.64
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chain))
    dropped = run([path], tmp_path / "out")
    kept = set(range(1, 7)) - {line for _, line in dropped}
    assert ("a.jsonl", 2) in dropped and 1 in kept and len(kept) > 1
    for (_, line), entry in dropped.items():
        assert origin(entry)[1] in kept and jaccard(chain[line - 1], chain[origin(entry)[1] - 1]) > 0.66


def test_links_and_groups():
    """Buckets of numbers that are similar within 10. Truth: written out."""
    rows, buckets = np.array([0, 5, 12, 30, 31, 100, 7, 9]), np.array([1, 1, 1, 1, 1, 1, 2, 2])

    def compare(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return abs(first - second) <= 10, abs(first - second)

    found = link(rows, buckets, compare)
    assert set(zip(found.rows, found.originals)) == {(5, 0), (31, 30), (9, 7)}
    every = link(rows, buckets, compare, all_pairs=True)
    assert set(zip(every.rows, every.originals)) == {(5, 0), (12, 5), (31, 30), (9, 7)}
    members, labels = groups_of(every)
    groups = {tuple(members[labels == label]) for label in set(labels)}
    assert groups == {(0, 5, 12), (30, 31), (7, 9)}
    nothing = Links(*(np.empty(0, np.int64) for _ in range(3)))
    assert groups_of(nothing)[0].size == 0 and link(rows[:0], buckets[:0], compare).rows.size == 0


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_block_tables_miss_nothing(distance):
    """Whatever bits of a hash change, the blocks of one table stay, for every number of images."""
    dice = random.Random(0)
    for images in (100, 10**6, 10**8):
        tables = block_tables(distance, images)
        assert sorted({block for table in tables for block in table})[0][0] == 0
        for _ in range(200):
            changed = set(dice.sample(range(64), distance))
            assert any(
                all(not changed & set(range(shift, shift + width)) for shift, width in table) for table in tables
            )
    if distance == 4:
        assert len(block_tables(4, 100)) == 5 < len(block_tables(4, 10**8))


def write_rows(folder: Path, hashes: np.ndarray, per_record: int) -> None:
    """Files of a first pass that saw images of these hashes, so many a record."""
    folder.mkdir()
    records = np.zeros(len(hashes) // per_record, dtype=RECORD_DTYPE)
    records["line"], records["images"] = np.arange(1, len(records) + 1), per_record
    images = np.zeros(len(hashes), dtype=IMAGE_DTYPE)
    images["record"], images["hash"] = np.arange(len(hashes)) // per_record, hashes
    records.tofile(folder / RECORDS), images.tofile(folder / IMAGES)
    (folder / TEXTS).write_bytes(b"")


@pytest.mark.parametrize("mode, per_record", [("any", 1), ("any", 3), ("all", 2), ("same", 1), ("same", 2)])
def test_images_are_found_as_by_comparing_all_with_all(mode, per_record, tmp_path):
    """Truth: in order, a record is dropped if any (all) of its hashes is within 4 bits of one of the kept records.

    For "same" it is one kept record, each of whose hashes is within 4 bits of one of this record too.

    1,800 hashes: random ones, their neighbours within 3 bits, neighbours of neighbours, so that there are chains.
    """
    dice = random.Random(1)
    hashes = [dice.getrandbits(64) for _ in range(300)]
    while len(hashes) < 1800:
        value = dice.choice(hashes)
        for bit in dice.sample(range(64), dice.randrange(4)):
            value ^= 1 << bit
        hashes.append(value)
    dice.shuffle(hashes)
    if (mode, per_record) == ("same", 2):  # pairs come again, turned round
        hashes[900:] = [value ^ 3 << dice.randrange(63) for value in reversed(hashes[:900])]
    kept: list[list[int]] = []
    expected = []
    for record in range(len(hashes) // per_record):
        mine = hashes[record * per_record : (record + 1) * per_record]

        def within(first: list[int], second: list[int]) -> list[bool]:
            return [any((value ^ other).bit_count() <= 4 for other in second) for value in first]

        found = within(mine, [value for values in kept for value in values])
        same = any(all(within(mine, values)) and all(within(values, mine)) for values in kept)
        expected.append({"any": any(found), "all": all(found), "same": same}[mode])
        if not expected[-1]:
            kept.append(mine)
    assert 0.1 < np.mean(expected) < 0.95
    write_rows(tmp_path / "rows", np.array(hashes, dtype=np.uint64), per_record)
    rules = DuplicateRules(exact="off", near=None, images=mode)
    for memory in (1.0, 2e-5):  # the second makes partitions
        verdicts = Resolver(str(tmp_path / "rows"), DuplicateRules(**{**vars(rules), "memory_gb": memory}), 0, print)
        reasons = verdicts.resolve()["reason"]
        assert ((reasons == SAME_IMAGES) == expected).all() and set(reasons) == {KEPT, SAME_IMAGES}


def test_exact_hashes_in_partitions(tmp_path):
    """Truth: a dict. Half of a hash being equal is not enough; what a rule dropped is no original."""
    dice = np.random.default_rng(0)
    folder = tmp_path / "rows"
    write_rows(folder, np.arange(3000), 1)
    records = np.fromfile(folder / RECORDS, dtype=RECORD_DTYPE)
    records["exact"] = dice.integers(0, 40, (3000, 2)) * 0x0404040404040404
    records["rejected"] = dice.random(3000) < 0.2
    records["exact"][records["rejected"]] = 0
    records.tofile(folder / RECORDS)
    first: dict[tuple[int, ...], int] = {}
    for memory in (1.0, 1e-5):
        rules = DuplicateRules(near=None, images="off", memory_gb=memory)
        verdicts = Resolver(str(folder), rules, 0, print).resolve()
        for number, record in enumerate(records):
            original = number if record["rejected"] else first.setdefault(tuple(record["exact"].tolist()), number)
            wanted = REJECTED_BY_RULE if record["rejected"] else KEPT if original == number else EXACT
            assert verdicts["reason"][number] == wanted
            assert wanted != EXACT or verdicts["original"][number] == original


@pytest.mark.slow
def test_memory_is_that_of_a_partition(tmp_path, monkeypatch):
    """400,000 hashes, each twice, in parts of 1 MB: less than an eighth of what all at once take."""
    monkeypatch.setattr(duplicates, "_CHUNK", 1 << 12)
    write_rows(tmp_path / "rows", np.arange(400_000) // 2, 1)
    records = np.memmap(tmp_path / "rows" / RECORDS, dtype=RECORD_DTYPE)
    records["exact"][:, 0] = np.random.default_rng(0).permutation(mixed(np.arange(400_000, dtype=np.uint64) // 2))
    found = []
    monkeypatch.setattr(duplicates, "join", lambda links: found.append(len(links)) or Links(*(np.empty(0, int),) * 3))
    peaks = []
    for memory in (1.0, 1e-3):
        rules = DuplicateRules(near=None, images="off", memory_gb=memory)
        resolver = Resolver(str(tmp_path / "rows"), rules, 0, print)
        tracemalloc.start()
        resolver.resolve()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < min(peaks[0] / 8, 2e6) and found


def drawing(seed: int) -> Image.Image:
    dice = random.Random(seed)
    image = Image.new("RGB", (160, 120), tuple(dice.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = dice.randrange(130), dice.randrange(90)
        box = (x, y, x + dice.randrange(15, 70), y + dice.randrange(15, 70))
        draw.ellipse(box, fill=tuple(dice.randrange(256) for _ in range(3)))
    return image


@pytest.fixture
def illustrated(tmp_path) -> Path:
    """Lines of one or two images; the images come again in other files and sizes, inline too."""
    for seed in range(4):
        drawing(seed).save(tmp_path / f"{seed}.png")
        drawing(seed).resize((120, 90)).save(tmp_path / f"{seed}.jpg", quality=80)
    stream = io.BytesIO()
    drawing(0).resize((200, 150)).save(stream, "WEBP", quality=85, method=0)
    inline = {"base64": base64.b64encode(stream.getvalue()).decode()}
    lines = [
        {"prompt": "<image>", "text": "zero", "images": ["0.png"]},
        {"prompt": "<image>", "text": "null", "images": ["0.jpg"]},
        {"prompt": "<image> How many?", "text": "none", "images": ["0.png"]},
        {"prompt": "<image>", "text": "naught", "images": [inline]},
        {"prompt": "<image><image>", "text": "one, two", "images": ["1.png", "2.png"]},
        {"prompt": "<image><image>", "text": "one, three", "images": ["1.jpg", "3.png"]},
        {"prompt": "<image><image>", "text": "two, one", "images": ["2.jpg", "1.png"]},
        {"prompt": "<image>", "text": "ZERO", "images": ["0.png"]},
        {"prompt": "<image><image>", "text": "three, zero", "images": ["3.png", "0.png"]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({}, {2: 1, 4: 1, 7: 5, 8: 1}),
        ({"images": "all"}, {2: 1, 4: 1, 7: 5, 8: 1, 9: 1}),
        ({"images": "any"}, {2: 1, 4: 1, 6: 5, 7: 5, 8: 1, 9: 1}),
        ({"images": "off"}, {8: 1}),
        ({"image_across_prompts": True}, {2: 1, 3: 1, 4: 1, 7: 5, 8: 1}),
        ({"image_distance": 0, "exact": "off"}, {8: 1}),
    ],
    ids=["same", "all", "any", "off", "across-prompts", "equal-hashes"],
)
def test_images_of_records(rules, expected, illustrated, tmp_path):
    dropped = run([illustrated], tmp_path / "out", duplicates=DuplicateRules(**rules))
    found = {line: origin(entry)[1] for (_, line), entry in dropped.items()}
    if "image_distance" in rules:  # small changes of a hash are chance here; a file repeated is not
        assert found[8] == 1 and dropped["a.jsonl", 8]["detail"]["bits"] == 0 and 3 not in found and 6 not in found
        return
    assert found == expected
    # "ZERO" with the file of "zero": equal, unless only images are compared
    assert dropped["a.jsonl", 8]["reason"] == "exact duplicate"


def test_captions_are_not_compared_as_texts(illustrated, tmp_path):
    text = passage(random.Random(0))
    lines = [{"text": f"<image>{text}", "images": [f"{seed}.png"]} for seed in range(3)]
    illustrated.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not run([illustrated], tmp_path / "out")
    rules = DuplicateRules(near_with_media=True)
    assert set(run([illustrated], tmp_path / "out", duplicates=rules)) == {("a.jsonl", 2), ("a.jsonl", 3)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"near": 1.2}, "near must be from 0.3 to 1, not 1.2"),
        ({"shingle_words": 0}, "shingle_words must be at least 1, not 0"),
        ({"image_distance": 17}, "image_distance must be from 0 to 16 bits, not 17"),
        ({"memory_gb": 0.0}, "memory_gb must be more than 0, not 0"),
    ],
)
def test_rules_out_of_range(wrong, message, illustrated, tmp_path):
    with pytest.raises(DataError, match=message):
        run([illustrated], tmp_path / "out", duplicates=DuplicateRules(**wrong))


def test_an_input_given_twice_is_refused(illustrated, tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl: given 2 times"):
        run([illustrated, tmp_path / "." / "a.jsonl"], tmp_path / "out")
