"""Rules about a record's text. Each is off until it has a threshold; `gopher` sets those of the literature.

Gopher's are of Rae et al., arXiv:2112.11446, A1.1 "Quality filtering" and table A1 (repetition). They were made for
English web pages of 50 words and more: captions and other languages need thresholds of their own.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megatron_mm.data.cleaning.text_signatures import normalised
from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.data.corpus.text_input import open_lines
from megatron_mm.media.errors import DataError

_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*", "·")
_ELLIPSES = ("...", "…")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_WORD = re.compile(r"\w+")
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class TextRules:
    """Thresholds; None is off. A word is what white space separates."""

    gopher: bool = False
    """Set Gopher's thresholds (English web pages) wherever none is given."""
    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    """Gopher: 50."""
    max_words: int | None = None
    """Gopher: 100,000."""
    min_mean_word_length: float | None = None
    """Characters. Gopher: 3."""
    max_mean_word_length: float | None = None
    """Characters. Gopher: 10."""
    max_symbols_per_word: float | None = None
    """Hashes, and ellipses, a word. Gopher: 0.1."""
    max_bullet_lines: float | None = None
    """Share of lines that begin with a bullet. Gopher: 0.9."""
    max_ellipsis_lines: float | None = None
    """Share of lines that end with an ellipsis. Gopher: 0.3."""
    min_alphabetic_words: float | None = None
    """Share of words with a letter. Gopher: 0.8."""
    min_stop_words: int | None = None
    """How many of the, be, to, of, and, that, have, with occur. Gopher: 2."""
    max_duplicate_lines: float | None = None
    """Share of lines that repeat an earlier one. Gopher: 0.3."""
    max_duplicate_paragraphs: float | None = None
    """The same of paragraphs, between blank lines. Gopher: 0.3."""
    max_duplicate_line_characters: float | None = None
    """Share of characters in lines that repeat an earlier one. Gopher: 0.2."""
    max_duplicate_paragraph_characters: float | None = None
    """The same of paragraphs. Gopher: 0.2."""
    max_top_ngrams: tuple[float, ...] | None = None
    """Share of characters in the commonest n-gram, for n = 2, 3, 4. Gopher: 0.20 0.18 0.16."""
    max_duplicate_ngrams: tuple[float, ...] | None = None
    """Share of characters in repeated n-grams, for n = 5 to 10. Gopher: 0.15 0.14 0.13 0.12 0.11 0.10."""

    def filled(self) -> TextRules:
        """With Gopher's thresholds where they are asked for and none is set."""
        if not self.gopher:
            return self
        return replace(self, **{name: value for name, value in GOPHER.items() if getattr(self, name) is None})

    @functools.cached_property
    def wanted(self) -> bool:
        """Whether any rule is on."""
        return any(field.name != "gopher" and getattr(self, field.name) is not None for field in fields(self))

    def judge(self, text: str) -> Verdict | None:
        """The first rule (in the order of the fields) that a text breaks."""
        for name, value in _measures(text, self):
            limit = getattr(self, name)
            if isinstance(value, tuple):
                first = 2 if name == "max_top_ngrams" else 5
                for n, (share, most) in enumerate(zip(value, limit), first):
                    if share > most:
                        return Verdict(f"text: {name}", {"n": n, "value": round(share, 4), "limit": most})
            elif value < limit if name.startswith("min") else value > limit:
                return Verdict(f"text: {name}", {"value": round(value, 4), "limit": limit})
        return None


GOPHER: dict[str, object] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3.0,
    "max_mean_word_length": 10.0,
    "max_symbols_per_word": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_duplicate_lines": 0.3,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_line_characters": 0.2,
    "max_duplicate_paragraph_characters": 0.2,
    "max_top_ngrams": (0.20, 0.18, 0.16),
    "max_duplicate_ngrams": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}


def _measures(text: str, rules: TextRules) -> Iterable[tuple[str, float | tuple[float, ...]]]:
    """(rule, what the text has) of the rules that are on; each is measured only if those before it were kept."""

    def on(*names: str) -> Iterable[str]:
        return (name for name in names if getattr(rules, name) is not None)

    for name in on("min_characters", "max_characters"):
        yield name, len(text)
    words = text.split()
    count = max(1, len(words))
    for name in on("min_words", "max_words"):
        yield name, len(words)
    for name in on("min_mean_word_length", "max_mean_word_length"):
        yield name, sum(map(len, words)) / count
    for name in on("max_symbols_per_word"):
        ellipses = text.count("...") + text.count("…")
        yield name, max(text.count("#"), ellipses) / count
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for name in on("max_bullet_lines"):
        yield name, _share(line.startswith(_BULLETS) for line in lines)
    for name in on("max_ellipsis_lines"):
        yield name, _share(line.endswith(_ELLIPSES) for line in lines)
    for name in on("min_alphabetic_words"):
        yield name, _share(any(map(str.isalpha, word)) for word in words)
    for name in on("min_stop_words"):
        yield name, len(_STOP_WORDS.intersection(_WORD.findall(text.lower())))
    paragraphs = [part.strip() for part in _BLANK_LINES.split(text) if part.strip()]
    for name in on("max_duplicate_lines"):
        yield name, _repeated(lines)[0]
    for name in on("max_duplicate_paragraphs"):
        yield name, _repeated(paragraphs)[0]
    for name in on("max_duplicate_line_characters"):
        yield name, _repeated(lines)[1]
    for name in on("max_duplicate_paragraph_characters"):
        yield name, _repeated(paragraphs)[1]
    for name in on("max_top_ngrams"):
        yield name, tuple(_top_ngram(words, n) for n in range(2, 2 + len(rules.max_top_ngrams or ())))
    for name in on("max_duplicate_ngrams"):
        yield name, _duplicate_ngrams(words, range(5, 5 + len(rules.max_duplicate_ngrams or ())))


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def _repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Shares of parts, and of their characters, that repeat an earlier part."""
    counts = Counter(parts)
    repeats = len(parts) - len(counts)
    characters = sum((times - 1) * len(part) for part, times in counts.items())
    return repeats / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _top_ngram(words: Sequence[str], n: int) -> float:
    """Share of the words' characters in the commonest n-gram; none that occurs once counts."""
    counts = Counter(zip(*(words[i:] for i in range(n))))
    if not counts:
        return 0.0
    most = max(counts.values())
    if most < 2:
        return 0.0
    # Of equally common ones the longest. Occurrences that overlap are counted for the characters of each.
    longest = max(sum(map(len, ngram)) for ngram, times in counts.items() if times == most)
    return min(1.0, most * longest / sum(map(len, words)))


def _duplicate_ngrams(words: Sequence[str], sizes: Iterable[int]) -> tuple[float, ...]:
    """Share of the words' characters in n-grams that occur more than once, for each n; none counts twice."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    shares, grams, have = [], ids, 1
    for n in sizes:
        if len(words) < n:
            shares.append(0.0)
            continue
        while have < n:  # pairs of (run of `have` words, next word), renumbered: exact, no hashing
            have += 1
            pairs = grams[:-1] * len(numbers) + ids[have - 1 :]
            _, grams, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        starts = np.flatnonzero(counts[grams] > 1)
        covered = np.zeros(len(words) + 1, dtype=np.int64)
        np.add.at(covered, starts, 1)
        np.add.at(covered, starts + n, -1)
        inside = np.cumsum(covered)[:-1] > 0
        shares.append(float(lengths[inside].sum() / lengths.sum()))
    return tuple(shares)


class Blocklist:
    """Words and phrases, one a line, found as whole words whatever their case; `*part*` inside of words too.

    Lines that are blank or begin with # say nothing.

    Args:
        path: of the file, UTF-8.

    Raises:
        DataError: it cannot be read, or a line holds no word.
    """

    def __init__(self, path: str) -> None:
        self._phrases: dict[str, list[tuple[str, ...]]] = {}
        self._parts: list[str] = []
        with open_lines(path) as (stream, _):
            for number, line in enumerate(stream, 1):
                try:
                    entry = normalised(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
                if not entry or entry.startswith("#"):
                    continue
                if len(entry) > 2 and entry[0] == entry[-1] == "*":
                    self._parts.append(entry[1:-1])
                    continue
                words = tuple(_WORD.findall(entry))
                if not words:
                    raise DataError(f"{path}, line {number}: {entry!r} holds no word")
                self._phrases.setdefault(words[0], []).append(words)

    def judge(self, text: str) -> Verdict | None:
        """Drops a text that holds an entry."""
        text = normalised(text)
        words = _WORD.findall(text)
        if not self._phrases.keys().isdisjoint(words):
            for place, word in enumerate(words):
                for phrase in self._phrases.get(word, ()):
                    if tuple(words[place : place + len(phrase)]) == phrase:
                        return Verdict("blocklist", {"entry": " ".join(phrase)})
        part = next((part for part in self._parts if part in text), None)
        return Verdict("blocklist", {"entry": f"*{part}*"}) if part is not None else None
