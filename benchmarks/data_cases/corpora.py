"""Real corpora of the benchmarks: dictionaries and documentation as text, photographs as JPEGs, from Debian."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from examples.data.packages import Package, fetch
from megatron_mm.platform.atomic_files import give_name, written_whole

TEXTS = (
    Package("apt", "dict-gcide", "", r"usr/share/dictd/gcide\.dict\.dz|usr/share/doc/.*/copyright", "GPL-3"),
    Package("apt", "dict-wn", "", r"usr/share/dictd/wn\.dict\.dz|usr/share/doc/.*/copyright", "WordNet"),
    Package("apt", "python3.11-doc", "", r"usr/share/doc/python3\.11/.*\.rst\.txt|.*/copyright", "PSF-2.0"),
)
PHOTOS = Package(
    "apt", "mate-backgrounds", "", r"usr/share/backgrounds/mate/nature/.*\.jpg|.*/copyright", "CC-BY-SA-4.0"
)
#: The text whose encoding takes what a command takes before its first document.
ONE = json.dumps({"text": "one"}) + "\n"
_LINES = 100
_TARS = 4


def are_in(folder: Path) -> bool:
    """Whether a folder has what earlier benchmarks, which left no marker, began with."""
    begun = [folder / "packages" / package.name / "usr" for package in (*TEXTS, PHOTOS)]
    begun += folder.glob("order-*/shard0.idx")
    one = folder / "one.jsonl"
    return any(path.exists() for path in begun) or (one.is_file() and one.read_text() == ONE)


def documents(folder: Path) -> Iterator[str]:
    """Entries of dictionaries in groups, and pages of documentation."""
    for package in TEXTS:
        for path in sorted(fetch(package, folder / "packages" / package.name).rglob("*")):
            if path.name.endswith(".dict.dz"):
                lines = gzip.decompress(path.read_bytes()).decode(errors="replace").split("\n")
                for start in range(0, len(lines), _LINES):
                    yield "\n".join(lines[start : start + _LINES])
            elif path.name.endswith(".rst.txt"):
                yield path.read_text(encoding="utf-8")


def text(folder: Path, smoke: bool) -> Path:
    """The documents as JSONL: 85 MB, or a hundred of them."""
    path = folder / ("text-smoke.jsonl" if smoke else "text.jsonl")
    if not path.exists():
        with written_whole(path, partial=path.with_suffix(".making"), encoding="utf-8") as stream:
            for number, document in enumerate(documents(folder)):
                if smoke and number == 100:
                    break
                if document.strip():
                    stream.write(json.dumps({"text": document}) + "\n")
    return path


def tokenizer(folder: Path, kind: str, smoke: bool, pieces: int = 32000, corpus: Path | None = None) -> Path:
    """A SentencePiece model of the documents, or of another corpus; of at most 1,000 pieces in a smoke run."""
    from megatron_mm.data.build.train_tokenizer import train_tokenizer

    pieces = min(pieces, 1000) if smoke else pieces
    path = folder / f"{kind}-{pieces}{'-other' if corpus else ''}.model"
    if corpus or not path.exists():
        train_tokenizer([str(corpus or text(folder, smoke))], str(path), pieces, kind, max_sentences=100000)
    return path


def photos(folder: Path, smoke: bool) -> Path:
    """A folder of WebDataset tars of photographs of 640 × 480 (JPEG, quality 90), parts of larger ones that overlap."""
    path = folder / ("photos-smoke" if smoke else "photos")
    if path.exists():
        return path
    making = path.with_suffix(".making")
    making.mkdir(exist_ok=True)
    parts = itertools.islice(_parts(folder), 24 if smoke else None)
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(making / f"photos-{i}.tar", "w")) for i in range(_TARS)]
        for number, image in enumerate(parts):
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=90)
            for ending, data in (("jpg", encoded.getvalue()), ("txt", f"photograph {number}".encode())):
                member = tarfile.TarInfo(f"{number:06}.{ending}")
                member.size = len(data)
                tars[number % _TARS].addfile(member, io.BytesIO(data))
    give_name(making, path)
    return path


def _parts(folder: Path) -> Iterator[Image.Image]:
    for source in sorted(fetch(PHOTOS, folder / "packages" / PHOTOS.name).rglob("*.jpg")):
        image = Image.open(source).convert("RGB")
        image = image.resize((1920, image.height * 1920 // image.width))
        for top in range(0, image.height - 479, 120):
            for left in range(0, 1920 - 639, 160):
                yield image.crop((left, top, left + 640, top + 480))


def photo_shards(folder: Path, tokenizer_model: str, smoke: bool) -> Path:
    """The photographs as a dataset folder."""
    from megatron_mm.data.build.multimodal import build_multimodal
    from megatron_mm.data.corpus.text_input import expand_inputs

    path = folder / ("photo-shards-smoke" if smoke else "photo-shards")
    if not path.exists():
        build_multimodal(expand_inputs([str(photos(folder, smoke))]), str(path), tokenizer_model, progress=False)
    return path
