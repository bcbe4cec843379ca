"""The page of inspect_dataset: what it says, that it stays small, and how a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.view.html_page import MAX_TOKENS, Entry, histogram, write_page
from megatron_mm.data.view.preview import IMAGE_SIDE, SOUND_BYTES, preview
from megatron_mm.data.view.readable import readable_size
from tests.support import browser
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).parents[2]
RED, GREEN, BLUE = (214, 40, 40), (42, 157, 80), (38, 70, 190)
ATTACK = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


def png(colour: tuple, size: tuple = (60, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def tone(seconds: float, form: str, rate: int = 8000, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.3)
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def animation(colours: list[tuple]) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (48, 48), colour) for colour in colours]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return out.getvalue()


def photograph() -> bytes:
    """A large image that no thumbnail compresses well: smooth shapes with grain."""
    y, x = np.mgrid[:1500, :2000]
    pixels = np.stack([x / 8, y / 6, (x + y) / 14], -1) + np.random.default_rng(1).normal(0, 12, (1500, 2000, 1))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


SAMPLES = [
    {"id": "flag", "prompt": "<image> <image>which colour?", "text": " red, then blue",
     "images": [png(RED), png(BLUE)]},
    {"id": "photo", "text": "<image>a large photograph", "images": [photograph()]},
    {"id": "tones", "prompt": "<audio><audio>", "text": "two tones",
     "audios": [tone(0.5, "WAV"), tone(0.75, "AIFF")]},
    {"id": "film", "prompt": "<video>", "text": "three colours", "videos": [animation([RED, GREEN, BLUE])]},
    {"id": ATTACK, "prompt": f"{ATTACK} & more", "text": f"answer {ATTACK} ünïcode"},
    {"id": "broken", "prompt": "<image><audio><video>", "text": "nothing to see", "images": [b"\x89PNG no image"],
     "audios": [b"no sound"], "videos": [b"no video"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tokenizer_path) -> str:
    """A dataset folder of `SAMPLES`, built unchecked, so that it has damaged media."""
    folder = tmp_path_factory.mktemp("shown")
    lines = []
    for sample in SAMPLES:
        media = {kind: [{"base64": base64.b64encode(data).decode()} for data in sample[kind]]
                 for kind in ("images", "audios", "videos") if kind in sample}  # fmt: skip
        lines.append(json.dumps({**sample, **media}) + "\n")
    (folder / "s.jsonl").write_text("".join(lines))
    output = str(folder / "shown")
    build_multimodal([str(folder / "s.jsonl")], output, tokenizer_path, workers=0, check=False, progress=False)
    return output


@pytest.fixture(scope="module")
def page(tmp_path_factory, shown, tokenizer_path) -> Path:
    """The page that the tool makes of it."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    command = [PYTHON, str(ROOT / "tools" / "inspect_dataset.py"), "--path", shown, "--tokenizer-model"]
    arguments = [tokenizer_path, "--samples", "6", "--verify", "--html", str(path)]
    run = subprocess.run([*command, *arguments], capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 1, "the damaged media are found"
    assert run.stdout.splitlines()[-1] == f"wrote {path}: 6 samples, {readable_size(path.stat().st_size)}", run.stderr
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory, page) -> Iterator:
    """The page in Chromium. Without a browser this fails in CI, and where it could be installed."""
    try:
        browser.install()
    except ValueError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(page.as_uri())
        yield driver


@pytest.fixture(scope="module")
def screenshot(tmp_path_factory, window) -> Image.Image:
    """The whole page as pixels, also below the window; beside it as screenshot.png."""
    taken = window.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    path = tmp_path_factory.mktemp("screenshot") / "screenshot.png"
    path.write_bytes(base64.b64decode(taken["data"]))
    return Image.open(path).convert("RGB")


def pixels(screenshot: Image.Image, element) -> np.ndarray:
    """Pixels of an element, uint8 [height, width, 3]."""
    box = element.parent.execute_script(
        "const r = arguments[0].getBoundingClientRect(); return [r.left, r.top + scrollY, r.right, r.bottom + scrollY]",
        element,
    )
    return np.asarray(screenshot.crop([round(side) for side in box]))


def elements(window, selector: str) -> list:
    return window.find_elements("css selector", selector)


def test_browser_draws_every_image(window, screenshot):
    drawn = window.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert drawn == [[True, 60, 40]] * 2 + [[True, IMAGE_SIDE, 240]] + [[True, 48, 48]] * 3
    images = elements(window, "figure img")
    for image, colour in zip([*images[:2], *images[3:]], [RED, BLUE, RED, GREEN, BLUE]):
        seen = pixels(screenshot, image)
        assert min(seen.shape[:2]) >= 96, "small images are enlarged"
        assert np.median(seen, axis=(0, 1)).tolist() == list(colour)
    photo = pixels(screenshot, images[2]).astype(float)
    assert photo[:, -40:, 0].mean() > photo[:, :40, 0].mean() + 100, "red grows to the right"


def test_browser_plays_every_sound(window):
    """The second is AIFF, which browsers do not play, as FLAC."""
    played = window.execute_async_script(
        """
        const done = arguments[0];
        const play = async sound => {
            await sound.play();
            while (!sound.ended) await new Promise(resolve => setTimeout(resolve, 20));
            return [sound.readyState, sound.duration, sound.currentTime, sound.controls];
        };
        Promise.all([...document.querySelectorAll("audio")].map(play)).then(done, error => done(String(error)));
        """
    )
    assert [(round(duration, 2), round(time, 2)) for _, duration, time, _ in played] == [(0.5, 0.5), (0.75, 0.75)]
    assert all(state >= 1 and controls for state, _, _, controls in played)
    kinds = [sound.get_attribute("src").split(";")[0] for sound in elements(window, "audio")]
    assert kinds == ["data:audio/wav", "data:audio/flac"]


def test_browser_shows_text_and_runs_none_of_it(window, screenshot):
    article = elements(window, "article")[4]
    assert article.find_element("css selector", "h2").text.startswith(ATTACK)
    assert article.find_element("css selector", ".prompt").text.endswith(f"{ATTACK} & more")
    learned = article.find_element("css selector", ".learned")
    assert learned.is_displayed() and ATTACK in learned.text and "ünïcode" in learned.text
    assert np.ptp(pixels(screenshot, learned).astype(int).sum(-1)) > 300, "letters are drawn"
    assert window.title == "shown"
    assert window.execute_script("return document.scripts.length") == 0
    assert not window.execute_script("return document.querySelectorAll('[onerror], [src=x]').length")
    assert window.get_log("browser") == [], "nothing was refused or failed"


def test_browser_needs_nothing_but_the_page(window, page):
    messages = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests if request["documentURL"] == page.as_uri()]
    assert asked[0] == page.as_uri()
    assert [url for url in asked[1:] if not url.startswith("data:")] == []


def test_browser_tells_tokens_apart(window, screenshot, shown, tokenizer_path):
    tokenizer, shard = open_tokenizer(tokenizer_path), Shard(shown)
    chips = elements(window, "article:nth-of-type(1) .chips span")
    tokens = shard.text.document(0).tolist()
    assert [chip.text for chip in chips] == [tokenizer.processor.id_to_piece(token) for token in tokens]
    learned_from = shard.prompt_length(0)
    for number, (chip, token) in enumerate(zip(chips, tokens)):
        off = number < learned_from
        assert chip.get_attribute("title") == f"id {token}" + (", not learned" if off else "")
    greyed, on = (np.median(pixels(screenshot, chips[n]), axis=(0, 1)) for n in (learned_from - 1, -1))
    assert np.ptp(greyed) < 8 < np.ptp(on), "unlearned chips are grey, learned ones are not"
    bars = elements(window, "svg rect")
    assert sum(bar.rect["height"] > 0 for bar in bars) >= 3


def test_damaged_media_say_so_in_place(window):
    errors = [error.text for error in elements(window, "article:nth-of-type(6) .error")]
    assert [error.split(":")[0] for error in errors] == ["image", "audio", "video"]
    assert "corrupt" in errors[0] or "not an image" in errors[0]
    assert "not a sound" in errors[1]
    assert len(elements(window, ".problems li")) == 3, "what --verify found is listed"


def test_text_cannot_become_markup(page):
    """Without a browser, and without the policy that forbids scripts: escaping alone must do."""
    text = page.read_text()
    assert "<script" not in text and "onerror=\"" not in text and "&lt;script&gt;" in text
    assert re.search(r"default-src 'none'", text)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)


def test_page_stays_small(page):
    """The photograph has some 10 MB, its thumbnail has less than 40 kB."""
    assert len(SAMPLES[1]["images"][0]) > 5e6
    assert page.stat().st_size < 120_000


def test_long_sounds_are_cut_and_short_ones_kept():
    long = tone(40, "WAV", 16000)
    assert len(long) > SOUND_BYTES
    shown = preview("audios", long)
    assert "first 30 s as FLAC" in shown.caption and "40.00 s at 16,000 Hz" in shown.caption
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(shown.uris[0].partition(",")[2])))
    assert (samples.size, rate) == (30 * 16000, 16000)
    for form, subtype, mime in (("OGG", "VORBIS", "ogg"), ("FLAC", "PCM_16", "flac"), ("WAV", "PCM_16", "wav")):
        data = tone(0.2, form, subtype=subtype)
        assert preview("audios", data).uris == [f"data:audio/{mime};base64,{base64.b64encode(data).decode()}"]
    assert preview("audios", tone(0.2, "WAV", subtype="IMA_ADPCM")).uris[0].startswith("data:audio/flac")


def test_text_shard_without_tokenizer_and_long_documents(tmp_path):
    writer = IndexedWriter(str(tmp_path / "t"), np.uint16)
    writer.add_documents(np.arange(1000) % 300, np.array([3, 0, 997]))
    writer.finalize()
    shard = Shard(str(tmp_path / "t"))
    size = write_page(str(tmp_path / "p.html"), [Entry(shard, [0, 1, 2])], None)
    text = (tmp_path / "p.html").read_text()
    assert size == len(text.encode())
    assert text.count('title="id ') == 3 + MAX_TOKENS and f"and {997 - MAX_TOKENS} more tokens" in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".crc", ".ends", ".html", ".idx", ".lengths"]


def test_ids_beyond_the_tokenizer_are_marked(tmp_path, folder, tokenizer_path):
    shutil.copytree(folder, tmp_path / "f")
    shard, tokenizer = Shard(str(tmp_path / "f")), open_tokenizer(tokenizer_path)
    tokens = np.memmap(tmp_path / "f" / "text.bin", dtype=np.int32, mode="r+")
    tokens[2] = 70_000
    write_page(str(tmp_path / "p.html"), [Entry(shard, [0])], tokenizer)
    text = (tmp_path / "p.html").read_text()
    assert f"holds the id 70000; the tokenizer has {tokenizer.vocab_size} pieces" in text
    assert text.count('class="wrong"') == 1


@pytest.mark.parametrize("scale", [1, 1000])
def test_histogram_counts_every_document_once(scale):
    lengths = np.array([0, 1, 1, 2, 5, 9, 9, 9, 40 * scale])
    bars = histogram(lengths)
    assert sum(bar.count for bar in bars) == lengths.size and max(bar.share for bar in bars) == 1
    for bar in bars:
        assert bar.count == ((lengths >= bar.low) & (lengths <= bar.high)).sum()
    assert (bars[0].low, bars[-1].high) == (0, 40 * scale) and len(bars) <= 34
    assert histogram(np.array([7, 7]))[0].count == 2
