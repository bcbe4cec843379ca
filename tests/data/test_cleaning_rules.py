"""Each rule, with a record that keeps it and one that just does not. Truth: counted by hand."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.cleaning.field_rules import FieldRules
from megatron_mm.data.cleaning.media_rules import (
    ImageRules,
    SoundRules,
    VideoRules,
    measure_video,
    silent_share,
)
from megatron_mm.data.cleaning.predicate import Predicate, PredicateError
from megatron_mm.data.cleaning.records import Record
from megatron_mm.data.cleaning.text_rules import GOPHER, Blocklist, TextRules
from megatron_mm.media.errors import DataError
from tests.data.test_bombs import animation as oversized

PROSE = (
    "The river that runs below the old mill was frozen for most of the winter, and the children of the village would "
    "skate on it until the light was gone. Nobody remembered when the wheel had last turned, but the miller kept it "
    "clean, as if the ice might have been gone by the morning and the grain be waiting at the door with its owner."
)


@pytest.mark.parametrize(
    "rule, limit, kept, dropped",
    [
        ("min_characters", 5, "12345", "1234"),
        ("max_characters", 5, "12345", "123456"),
        ("min_words", 3, "a b c", "a b"),
        ("max_words", 3, "a b c", "a b c d"),
        ("min_mean_word_length", 3.0, "abcd ab", "abc ab"),
        ("max_mean_word_length", 3.0, "abcd ab", "abcd abc"),
        ("max_symbols_per_word", 0.5, "# a", "# # a"),
        ("max_symbols_per_word", 0.5, "a... b", "a... b… c..."),
        ("max_bullet_lines", 0.5, "- a\nb", "- a\n• b\nc"),
        ("max_ellipsis_lines", 0.5, "a...\nb", "a...\nb…\nc"),
        ("min_alphabetic_words", 0.5, "1a 22", "1a 22 33"),
        ("min_stop_words", 2, "To be", "be be"),
        ("max_duplicate_lines", 0.25, "a\nb\nc\na", "a\nb\na"),
        ("max_duplicate_paragraphs", 0.25, "a\n\nb\n\nc\n \na", "a\n\nb\n\na"),
        ("max_duplicate_line_characters", 0.2, "a\na\nbbb", "a\na\nbb"),
        ("max_duplicate_paragraph_characters", 0.2, "a\n\na\n\nbbb", "a\n\na\n\nbb"),
        # "a b" twice is 4 of the 10 characters of the words (the others: cccccc)
        ("max_top_ngrams", (0.4,), "a b cccccc a b", "a b ccccc a b"),
        ("max_top_ngrams", (1.0, 0.5), "a b c dddddd a b c", "a b c ddddd a b c"),
        # five words of one character twice, and twenty others
        ("max_duplicate_ngrams", (0.5,), "a b c d e ffffffffff a b c d e", "a b c d e fffffffff a b c d e"),
    ],
)
def test_texts(rule, limit, kept, dropped):
    rules = TextRules(**{rule: limit})
    assert rules.wanted and rules.judge(kept) is None
    verdict = rules.judge(dropped)
    assert verdict is not None and verdict.reason == f"text: {rule}"


def test_no_rule_is_on_by_itself():
    assert not TextRules().wanted and TextRules().judge("") is None
    assert not any(rules.wanted for rules in (ImageRules(), SoundRules(), VideoRules()))


def test_gopher_keeps_prose_and_drops_what_repeats():
    rules = TextRules(gopher=True).filled()
    assert rules.judge(PROSE) is None
    assert rules.judge(PROSE[:200]).reason == "text: min_words"
    assert rules.judge("\n".join([PROSE] * 2)).reason == "text: max_duplicate_lines"
    # Two runs of 6 words twice among 50 more: no line repeats, the commonest pair is rare.
    words = [f"word{i}" for i in range(60)] + ["that", "have"]
    again = words[:12] + words[20:] + words[2:12]
    assert rules.judge(" ".join(words)) is None
    assert rules.judge(" ".join(words[:-1])).reason == "text: min_stop_words"
    assert rules.judge(" ".join(again)).reason == "text: max_duplicate_ngrams"
    assert TextRules(gopher=True, min_words=5).filled().judge(PROSE[:200]) is None
    assert set(GOPHER) <= set(TextRules.__dataclass_fields__)


def test_overlapping_ngrams_count_once():
    """A word ten times: every 5-gram repeats, and no character counts twice."""
    assert TextRules(max_duplicate_ngrams=(0.9,)).judge("x " * 10).detail["value"] == 1.0
    assert TextRules(max_duplicate_ngrams=(0.9,)).judge("x " * 5) is None


def test_blocklist(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a comment\n\nbadword\nVery  Bad phrase\n*スパム*\n", encoding="utf-8")
    rules = Blocklist(str(path))
    for text in ("a BadWord!", "very bad\nPHRASE.", "これはスパムです", "ｂａｄｗｏｒｄ"):
        assert rules.judge(text).reason == "blocklist", text
    for text in ("badwords", "very bad, a phrase", "phrase very bad", "comment"):
        assert rules.judge(text) is None, text
    path.write_text("good\n!!\n")
    with pytest.raises(DataError, match=r"words.txt, line 2: '!!' holds no word"):
        Blocklist(str(path))


def test_fields():
    rules = FieldRules((("nsfw", 0.5),), (("meta.score", 4.5),), (("language", "en"), ("language", "fr")))
    good = {"nsfw": 0.49, "meta": {"score": "4.6"}, "language": "fr"}
    assert rules.judge(good, "x") is None
    assert rules.judge({**good, "nsfw": 0.5}, "x").reason == "field: nsfw below 0.5"
    assert rules.judge({**good, "nsfw": float("nan")}, "x").detail == {"value": "nan"}
    assert rules.judge({**good, "meta": {"score": 4.5}}, "x").reason == "field: meta.score above 4.5"
    assert rules.judge({**good, "language": "de"}, "x").reason == "field: language is en or fr"
    with pytest.raises(DataError, match=r'a.jsonl, line 3: lacks the field "nsfw"'):
        rules.judge({"meta": {}}, "a.jsonl, line 3")
    with pytest.raises(DataError, match=r'x: field "nsfw" must be a number, not "high"'):
        rules.judge({**good, "nsfw": "high"}, "x")


@pytest.mark.parametrize(
    "rule, limit, kept, dropped",
    [
        ("min_side", 30, (30, 90), (29, 90)),
        ("max_side", 90, (30, 90), (91, 30)),
        ("max_aspect", 3.0, (90, 30), (30, 91)),
        ("min_pixels", 200, (10, 20), (10, 19)),
        ("max_pixels", 200, (10, 20), (10, 21)),
    ],
)
def test_images(rule, limit, kept, dropped):
    rules = ImageRules(**{rule: limit})
    good, bad = Image.new("RGB", kept), Image.new("RGB", dropped)
    assert rules.judge([good, good]) is None
    verdict = rules.judge([good, bad])
    assert (verdict.reason, verdict.detail["number"]) == (f"images: {rule}", 2)


def test_sounds():
    rate, tone = 8000, np.sin(np.arange(8000) * 0.1).astype(np.float32)
    assert SoundRules(min_seconds=1.0, max_seconds=1.0).judge([(tone, rate)]) is None
    assert SoundRules(min_seconds=1.0).judge([(tone[:-1], rate)]).reason == "audios: min_seconds"
    assert SoundRules(max_seconds=0.99).judge([(tone, rate)]).reason == "audios: max_seconds"
    half = np.concatenate([tone[:4000], np.zeros(4000, np.float32)])
    assert silent_share(half, rate, -60) == 0.5
    assert SoundRules(max_silence=0.5).judge([(half, rate)]) is None
    assert SoundRules(max_silence=0.49).judge([(half, rate)]).reason == "audios: max_silence"


def test_levels_are_rms():
    """A sine of amplitude a has an RMS of a/√2, that is −3.01 dB; a constant has its own."""
    sine = np.sin(2 * np.pi * 100 * np.arange(8000) / 8000) * 0.01  # −40 − 3.01 dBFS, two periods a frame
    assert [silent_share(sine, 8000, level) for level in (-43.02, -43.00)] == [0.0, 1.0]
    assert [silent_share(np.full(1000, 0.1), 8000, level) for level in (-20.01, -19.99)] == [0.0, 1.0]


def film(frames: int, rate: int) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=rate)
        track.width, track.height = 64, 32
        for number in range(frames):
            image = Image.new("RGB", (64, 32), (number * 9 % 256, 0, 0))
            container.mux(track.encode(av.VideoFrame.from_image(image)))
        container.mux(track.encode())
    return stream.getvalue()


def animation(form: str) -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (20, 40), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], duration=[100, 200, 300])
    return stream.getvalue()


@pytest.mark.parametrize(
    "data, expected",
    [
        (film(10, 5), {"seconds": 2.0, "frames": 10, "side": 32, "aspect": 2.0}),
        (animation("GIF"), {"seconds": 0.6, "frames": 3, "side": 20, "aspect": 2.0}),
        (animation("WEBP"), {"seconds": 0.6, "frames": 3, "side": 20, "aspect": 2.0}),
    ],
    ids=["mp4", "gif", "webp"],
)
def test_videos(data, expected):
    measured = measure_video(data)
    assert measured == pytest.approx(expected, rel=0.02)
    for name, value in expected.items():
        for bound, keeps, drops in (("min", 0.9, 1.1), ("max", 1.1, 0.9)):
            if f"{bound}_{name}" in VideoRules.__dataclass_fields__:
                assert VideoRules(**{f"{bound}_{name}": value * keeps}).judge([measured]) is None
                assert VideoRules(**{f"{bound}_{name}": value * drops}).judge([measured]).reason == (
                    f"videos: {bound}_{name}"
                )
    assert VideoRules(min_seconds=1).judge([{**measured, "seconds": None}]) is None


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_frames_too_large_to_be_measured(form):
    with pytest.raises(DataError, match="a video of 11000 × 11000 pixels; the limit is"):
        measure_video(oversized(form, 11000, 11000))


def test_predicate(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def short(record):\n    return None if len(record['text']) < 5 else 'long'\n"
        "def wide(record, media):\n    return all(image.width < 50 for image in media.images)\n"
        "def wrong(record):\n    return 7\n"
        "def fails(record):\n    return record['nothing']\n"
    )
    Image.new("RGB", (60, 10)).save(tmp_path / "wide.png")

    def record(line: bytes) -> Record:
        return Record(line, "a.jsonl, line 1", ("text",), str(tmp_path))

    short, wide = Predicate(f"{path}:short"), Predicate(f"{path}:wide")
    assert short.judge(record(b'{"text": "four"}')) is None
    assert short.judge(record(b'{"text": "fifth"}')).reason == "predicate: long"
    assert wide.judge(record(b'{"text": "a"}')) is None
    assert wide.judge(record(b'{"text": "<image>", "images": ["wide.png"]}')).reason == "predicate"
    with pytest.raises(PredicateError, match=r"a.jsonl, line 1: .*:wrong returned int; it must be"):
        Predicate(f"{path}:wrong").judge(record(b'{"text": "a"}'))
    with pytest.raises(PredicateError, match=r"a.jsonl, line 1: .*:fails failed \(KeyError: 'nothing'\)"):
        Predicate(f"{path}:fails").judge(record(b'{"text": "a"}'))
    with pytest.raises(DataError, match=r"mine.py has no function 'missing'"):
        Predicate(f"{path}:missing")
    with pytest.raises(DataError, match=r"must be module:function or file.py:function"):
        Predicate("mine")
    with pytest.raises(DataError, match="there is no module"):
        Predicate("nowhere_at_all:keep")
