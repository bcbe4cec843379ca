"""What is in datasets as one page for a browser, which needs no other file and no network (`page.html` is its form).

Jinja escapes all that the page says, so markup in a sample is shown, not run; and a policy in the page's head forbids
scripts and every address but `data:`. Samples are made one at a time while the page is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np

from megatron_mm.config.outputs import Kind, check_file
from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import Tokenizer
from megatron_mm.data.view.inspection import summary
from megatron_mm.data.view.preview import Preview, preview
from megatron_mm.data.view.readable import readable_size
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import written_whole

#: Most tokens of a sample that are shown, as text and as chips.
MAX_TOKENS = 400
#: Most problems that are listed.
MAX_PROBLEMS = 100
_BARS = 32
#: Of every page's head (`page.html`).
_POLICY = "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:\""


def check_page(path: str | None) -> None:
    """Raises OutputError unless a page can be written to what --html names, if anything; only a page is replaced."""
    check_file(path, "--html", Kind("a page of datasets", _is_page))


@dataclass
class Entry:
    """A dataset on the page."""

    shard: Shard
    documents: Sequence[int]
    """Samples to show."""
    problems: list[str] | None = None
    """What `verify` found; None: not verified."""


@dataclass
class Chip:
    """A token."""

    piece: str
    id: int
    learned: bool
    valid: bool = True


@dataclass
class Sample:
    """A document, ready to show."""

    id: str
    document: int
    num_tokens: int
    prompt: str
    text: str
    chips: list[Chip]
    media: list[Preview] = field(default_factory=list)
    error: str = ""
    """Why there is no text."""


def write_page(path: str, entries: Sequence[Entry], tokenizer: Tokenizer | None) -> int:
    """Writes the page, atomically.

    Args:
        path: of the .html file.
        entries: the datasets, in order.
        tokenizer: shows samples as text; None: as ids alone.

    Returns:
        Bytes of the page.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = readable_size
    form = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    datasets = (_dataset(entry, tokenizer) for entry in entries)
    names = ", ".join(entry.shard.name for entry in entries)
    with written_whole(path, encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(form.generate(datasets=datasets, names=names, has_text=tokenizer is not None))
    return os.path.getsize(path)


def _is_page(path: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as stream:
        return _POLICY in stream.read(1000)


def _dataset(entry: Entry, tokenizer: Tokenizer | None) -> dict:
    shard, figures = entry.shard, summary(entry.shard)
    return {
        "figures": figures,
        "media": {kind: figures[kind] for kind in KINDS if figures.get(kind, {}).get("count")},
        "sources": shard.manifest.get("sources", []),
        "bars": histogram(shard.document_lengths()),
        "samples": (_sample(shard, document, tokenizer) for document in entry.documents),
        "shown": len(entry.documents),
        "problems": entry.problems,
        "max_problems": MAX_PROBLEMS,
    }


def _sample(shard: Shard, document: int, tokenizer: Tokenizer | None) -> Sample:
    tokens = shard.text.document(document)
    learned_from, shown = shard.prompt_length(document), tokens[:MAX_TOKENS].tolist()
    sample = Sample(shard.document_id(document), document, int(tokens.size), "", "", [])
    if tokenizer is None:
        sample.chips = [Chip(str(i), i, n >= learned_from) for n, i in enumerate(shown)]
    else:
        unlearned = set(tokenizer.unlearned_ids)
        for n, i in enumerate(shown):
            valid = 0 <= i < tokenizer.vocab_size
            piece = tokenizer.piece(i) if valid else str(i)
            sample.chips.append(Chip(piece, i, n >= learned_from and i not in unlearned, valid))
        if all(chip.valid for chip in sample.chips):
            sample.prompt = tokenizer.decode(shown[:learned_from])
            sample.text = tokenizer.decode(shown[learned_from:])
        else:
            wrong = next(chip.id for chip in sample.chips if not chip.valid)
            sample.error = f"holds the id {wrong}; the tokenizer has {tokenizer.vocab_size} pieces"
    for kind in KINDS:
        for record in shard.records(kind, document):
            try:
                data = shard.medium(kind, record)
            except (DataError, OSError) as error:
                sample.media.append(Preview(kind, "", error=str(error)))
            else:
                sample.media.append(preview(kind, data))
    return sample


@dataclass
class Bar:
    """Documents whose lengths lie within two bounds, both included."""

    low: int
    high: int
    count: int
    share: float
    """Of the highest bar."""


def histogram(lengths: np.ndarray) -> list[Bar]:
    """How many documents have which length.

    Bounds grow geometrically where the longest document has more than 16 times the tokens of the median, so that one
    outlier does not leave all others in the first bar.

    Args:
        lengths: tokens of each document, int64 [documents].
    """
    low, high, median = int(lengths.min()), int(lengths.max()), float(np.median(lengths))
    if high > 16 * max(1.0, median):
        inner = np.geomspace(max(1, low), high + 1, _BARS + 1)
    else:
        inner = np.linspace(low, high + 1, min(_BARS, high + 1 - low) + 1)
    edges = np.unique(np.concatenate([[low], np.round(inner).astype(np.int64), [high + 1]]))
    counts = np.bincount(np.searchsorted(edges, lengths, side="right") - 1, minlength=edges.size - 1)
    most = int(counts.max())
    return [
        Bar(int(a), int(b) - 1, int(count), int(count) / most) for (a, b), count in zip(pairwise(edges), counts)
    ]
