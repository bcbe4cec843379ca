"""The second pass: equal and similar records, over all inputs together, in bounded memory.

Exact duplicates are equal 128-bit hashes. Nearly equal texts meet in a band of their MinHash signatures and are then
compared by the whole signature. Images meet in blocks of their perceptual hash: hashes of 64 bits that differ in d
agree in at least k of d + k blocks, so one table for each choice of k blocks finds every pair (Manku, Jain, Das Sarma,
"Detecting near-duplicates for web crawling", WWW 2007); larger k compares fewer strangers in more tables.

The first record in the order of the inputs is kept. Texts or images that are similar, directly or through others, make
a group; within it each record in order is dropped if it is similar to one that is kept, so each dropped record names a
kept one that is at least as similar as the threshold, and a chain of small changes does not drop its far end.

Hashes are sorted in partitions by their top bits, each of which fits the budget (if no single hash has more rows than
that); the result does not depend on it. Beyond it, memory holds what was found similar, 20 bytes a pair.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megatron_mm.data.cleaning.image_signatures import distances
from megatron_mm.data.cleaning.scan import (
    IMAGE_DTYPE,
    IMAGES,
    RECORD_DTYPE,
    RECORDS,
    TEXT_DTYPE,
    TEXTS,
    Wanted,
    band_file,
    read_rows,
)
from megatron_mm.data.cleaning.text_signatures import choose_bands, jaccard
from megatron_mm.data.jobs.parallel import ordered_map
from megatron_mm.data.reading.order import mixed
from megatron_mm.media.errors import DataError

#: Reasons, in the order in which they are looked for; 0 is a record that is kept.
KEPT, REJECTED_BY_RULE, EXACT, NEAR_TEXT, SAME_IMAGES = range(5)
REASONS = {EXACT: "exact duplicate", NEAR_TEXT: "near duplicate of text", SAME_IMAGES: "duplicate images"}
VERDICT_DTYPE = np.dtype([("reason", "u1"), ("original", "<u8"), ("score", "<f4")])
VERDICTS = "verdicts.bin"
_CHUNK = 1 << 20
_PAIRS = 1 << 14
#: Bytes that a row takes while its partition is sorted: hash, row, order, and copies of them.
_ROW_BYTES = 64


@dataclass(frozen=True)
class DuplicateRules:
    """What counts as a duplicate; the first record in the order of the inputs is kept."""

    exact: Literal["off", "normalised", "verbatim"] = "normalised"
    """Equal prompts, texts and media files; normalised: NFKC, lower case, white space collapsed."""
    near: float | None = 0.8
    """Jaccard similarity of word shingles from which texts are duplicates, or None. It is estimated by MinHash."""
    shingle_words: int = 5
    """Words of a shingle."""
    near_with_media: bool = False
    """Compare texts of records with media too: captions repeat, and their images tell them apart."""
    images: Literal["off", "same", "all", "any"] = "same"
    """Drop a record if one before it has the same images and no others, or if all, or any, of its images are in some
    records before it."""
    image_distance: int = 4
    """Bits of 64 by which perceptual hashes of one image differ at most."""
    image_across_prompts: bool = False
    """Compare images of records with different prompts too: several questions about an image are not duplicates."""
    memory_gb: float = 1.0
    """Budget for comparing, over all workers."""

    def check(self) -> None:
        """Raises DataError where a value is out of its range."""
        if self.near is not None and not 0.3 <= self.near <= 1:
            raise DataError(f"duplicates.near must be from 0.3 to 1, not {self.near:g}")
        if self.shingle_words < 1:
            raise DataError(f"duplicates.shingle_words must be at least 1, not {self.shingle_words}")
        if not 0 <= self.image_distance <= 16:
            raise DataError(f"duplicates.image_distance must be from 0 to 16 bits, not {self.image_distance}")
        if not self.memory_gb > 0:
            raise DataError(f"duplicates.memory_gb must be more than 0, not {self.memory_gb:g}")

    def wanted(self) -> Wanted:
        """The signatures that these rules need."""
        return Wanted(
            exact=self.exact,
            cut=choose_bands(self.near) if self.near is not None else None,
            shingle_words=self.shingle_words,
            texts_with_media=self.near_with_media,
            images=self.images != "off",
            prompts=not self.image_across_prompts,
        )


class Links(NamedTuple):
    """Rows that are similar to an earlier one."""

    rows: np.ndarray
    originals: np.ndarray
    scores: np.ndarray


Compare = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(rows, others) → (whether they are similar, how much)."""


def link(rows: np.ndarray, buckets: np.ndarray, compare: Compare, all_pairs: bool = False) -> Links:
    """Compares the rows of each bucket with the first of it; what is not similar to it goes on without it.

    So a row is linked to the first row of its bucket that is similar and itself similar to none before it. All buckets
    go at once; the number of rounds is the largest number of such firsts.

    Args:
        rows: in order within each bucket, [n].
        buckets: of each row; equal ones stand together.
        all_pairs: link every similar pair instead.
    """
    found = []
    while rows.size:
        first = np.append(True, buckets[1:] != buckets[:-1])
        others = np.flatnonzero(~first)
        leaders = rows[np.flatnonzero(first)][np.cumsum(first) - 1][others]
        similar = np.zeros(others.size, dtype=bool)
        for begin in range(0, others.size, _PAIRS):
            part = slice(begin, begin + _PAIRS)
            similar[part], scores = compare(rows[others[part]], leaders[part])
            hits = similar[part]
            found.append(Links(rows[others[part]][hits], leaders[part][hits], scores[hits].astype(np.float32)))
        left = others if all_pairs else others[~similar]
        rows, buckets = rows[left], buckets[left]
    return join(found)


def join(links: Sequence[Links]) -> Links:
    """All links in one."""
    if not links:
        return Links(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Links(*(np.concatenate(column) for column in zip(*links)))


def groups_of(links: Links) -> tuple[np.ndarray, np.ndarray]:
    """Connected components.

    Returns:
        (rows that are linked, ascending; the number of the group of each).
    """
    rows, ends = np.unique(np.concatenate([links.rows, links.originals]), return_inverse=True)
    first, second = np.split(ends, 2)
    labels = np.arange(rows.size)
    while first.size:
        low = np.minimum(labels[first], labels[second])
        if (labels[first] == labels[second]).all():
            break
        for ends in (first, second):
            np.minimum.at(labels, labels[ends], low)
            np.minimum.at(labels, ends, low)
        while (labels[labels] != labels).any():
            labels = labels[labels]
    return rows, labels


def _partitions(rows: int, memory: float) -> int:
    """Bits of a hash by which rows are parted so that a part fits the memory."""
    return max(0, math.ceil(math.log2(max(1.0, rows * _ROW_BYTES / memory))))


def _part(hashes: Iterator[np.ndarray], bits: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and rows of a partition whose hash another row of it has, in order of the hashes and then the rows."""
    kept, rows, begin = [], [], 0
    for chunk in hashes:
        chosen = np.flatnonzero(chunk >> np.uint64(64 - bits) == part) if bits else np.arange(chunk.size)
        kept.append(chunk[chosen])
        rows.append(chosen + begin)
        begin += chunk.size
    values, numbers = np.concatenate(kept), np.concatenate(rows)
    order = np.argsort(values, kind="stable")
    values, numbers = values[order], numbers[order]
    same = values[1:] == values[:-1]
    shared = np.append(same, False)[: values.size] | np.append(False, same)[: values.size]
    return values[shared], numbers[shared]


def _chunks(table: np.ndarray, take: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    yield np.empty(0, dtype=np.uint64)
    for begin in range(0, len(table), _CHUNK):
        yield take(table[begin : begin + _CHUNK])


@dataclass(frozen=True)
class _Task:
    """Sorting and comparing one partition."""

    folder: str
    stage: int
    part: int
    bits: int
    band: int = 0
    """Of the signatures of texts; of images, the number of the table."""
    threshold: float = 0.0
    blocks: tuple[tuple[int, int], ...] = ()
    """(shift, width) of the blocks of a perceptual hash that must agree."""


def _find(task: _Task) -> Links:
    """Links of a partition; runs in a worker."""
    path = os.path.join
    verdicts = read_rows(path(task.folder, VERDICTS), VERDICT_DTYPE)
    if task.stage == EXACT:
        records = read_rows(path(task.folder, RECORDS), RECORD_DTYPE)
        hashes, rows = _part(_chunks(records, _exact_hashes), task.bits, task.part)
        kept = verdicts["reason"][rows] == KEPT
        rows, buckets = rows[kept], hashes[kept]

        def equal(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            same = records["exact"][first, 1] == records["exact"][second, 1]
            return same, np.ones(len(first), np.float32)

        return link(rows, buckets, equal)
    table_name, dtype = (TEXTS, TEXT_DTYPE) if task.stage == NEAR_TEXT else (IMAGES, IMAGE_DTYPE)
    table = read_rows(path(task.folder, table_name), dtype)
    if task.stage == NEAR_TEXT:
        bands = read_rows(path(task.folder, band_file(task.band)), np.dtype("<u8"))
        hashes, rows = _part(_chunks(bands, np.asarray), task.bits, task.part)
    else:
        hashes, rows = _part(_chunks(table, lambda part: _block_hashes(part, task.blocks)), task.bits, task.part)
    kept = verdicts["reason"][table["record"][rows]] == KEPT
    rows, buckets = rows[kept], hashes[kept]
    if task.stage == NEAR_TEXT:
        return link(rows, buckets, text_comparison(table, task.threshold))
    return _link_images(table, rows, buckets, int(task.threshold), task.band == 0)


def _exact_hashes(records: np.ndarray) -> np.ndarray:
    """Half of the hashes; records that a rule dropped have none, and any number spreads them over the partitions."""
    return np.where(records["rejected"], mixed(records["line"].copy()), records["exact"][:, 0])


def _link_images(table: np.ndarray, rows: np.ndarray, buckets: np.ndarray, most: int, first_table: bool) -> Links:
    """All similar pairs of each bucket; of images with one signature only the first is compared with others."""
    _, keys = np.unique(_signatures(table[rows]), return_inverse=True)
    order = np.lexsort((rows, keys, buckets))
    rows, buckets, keys = rows[order], buckets[order], keys[order]
    first = np.ones(rows.size, dtype=bool)
    first[1:] = (buckets[1:] != buckets[:-1]) | (keys[1:] != keys[:-1])
    leaders = rows[np.flatnonzero(first)][np.cumsum(first) - 1]
    same = np.flatnonzero(~first) if first_table else np.empty(0, np.int64)  # they meet in every table
    rows, buckets, repeats = rows[first], buckets[first], Links(rows[same], leaders[same], np.zeros(same.size, "f4"))
    order = np.lexsort((rows, buckets))
    return join([repeats, link(rows[order], buckets[order], image_comparison(table, most), all_pairs=True)])


def _signatures(images: np.ndarray) -> np.ndarray:
    """What tells images apart, [n] bytes: all but the record."""
    size = images.dtype.itemsize - images.dtype["record"].itemsize
    columns = np.ascontiguousarray(images).view(np.uint8).reshape(len(images), images.dtype.itemsize)[:, -size:]
    return np.ascontiguousarray(columns).view(f"V{size}").ravel()


def text_comparison(table: np.ndarray, threshold: float) -> Compare:
    """Similarity of rows of texts.bin, estimated."""

    def compare(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = jaccard(table["signature"][first], table["signature"][second])
        return scores >= threshold, scores

    return compare


def image_comparison(table: np.ndarray, most: int) -> Compare:
    """Distance in bits of rows of images.bin."""

    def compare(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one, other = table[first], table[second]
        bits = distances(one, other)
        return (bits <= most) & (one["prompt"] == other["prompt"]), bits

    return compare


def _block_hashes(table: np.ndarray, blocks: Sequence[tuple[int, int]]) -> np.ndarray:
    values = np.zeros(len(table), dtype=np.uint64)
    for shift, width in blocks:
        block = (table["hash"] >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        values = (values << np.uint64(width)) | block
    return mixed(values ^ mixed(table["prompt"] + np.uint64(1)))


def block_tables(distance: int, images: int) -> list[tuple[tuple[int, int], ...]]:
    """Choices of blocks of a 64-bit hash, one of which any two hashes within a distance agree in.

    Args:
        distance: bits.
        images: how many are to be compared, from which the number of blocks follows.

    Returns:
        (shift, width) of the blocks of each choice.
    """

    def cut(extra: int) -> list[tuple[tuple[int, int], ...]]:
        edges = [64 * i // (distance + extra) for i in range(distance + extra + 1)]
        blocks = [(low, high - low) for low, high in itertools.pairwise(edges)]
        return list(itertools.combinations(blocks, extra))

    def cost(extra: int) -> float:  # a table is sorted; strangers meet where their blocks agree by chance
        tables = cut(extra)
        width = min(sum(width for _, width in table) for table in tables)
        return len(tables) * (30 * images + images**2 / 2 ** (width + 1))

    return cut(min(range(1, 5), key=cost))


class Resolver:
    """Finds the duplicates among the rows of the first pass.

    Args:
        folder: with the files of `scan.RowWriter`; VERDICTS is written beside them.
        rules: what counts as a duplicate.
        workers: processes; 0 works in this one.
        say: is told what is done.
    """

    def __init__(self, folder: str, rules: DuplicateRules, workers: int, say: Callable[[str], None]) -> None:
        self._folder, self._rules, self._workers, self._say = folder, rules, workers, say
        self._memory = rules.memory_gb * 1e9 / max(1, workers)
        self._records = read_rows(os.path.join(folder, RECORDS), RECORD_DTYPE)
        self._verdicts = np.memmap(
            os.path.join(folder, VERDICTS), dtype=VERDICT_DTYPE, mode="w+", shape=max(1, len(self._records))
        )
        for begin in range(0, len(self._records), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            self._verdicts["reason"][part] = self._records["rejected"][part] * np.uint8(REJECTED_BY_RULE)

    def resolve(self) -> np.ndarray:
        """Finds all duplicates.

        Returns:
            Rows of VERDICT_DTYPE, one a record: why it is dropped, the record that it repeats, and how similar they are
            (Jaccard, or bits).
        """
        if self._rules.exact != "off":
            self._say("exact duplicates")
            bits = _partitions(len(self._records), self._memory)
            found = self._search([_Task(self._folder, EXACT, part, bits) for part in range(1 << bits)])
            self._drop(EXACT, found.rows, found.originals, found.scores)
        if self._rules.near is not None:
            self._near_texts(self._rules.near)
        if self._rules.images != "off":
            self._images()
        self._verdicts.flush()
        return self._verdicts[: len(self._records)]

    def _search(self, tasks: Sequence[_Task]) -> Links:
        self._verdicts.flush()
        return join([links for _, links in ordered_map(_find, tasks, self._workers)])

    def _drop(self, reason: int, records: np.ndarray, originals: np.ndarray, scores: np.ndarray) -> None:
        self._verdicts["reason"][records] = reason
        self._verdicts["original"][records] = originals
        self._verdicts["score"][records] = scores

    def _near_texts(self, threshold: float) -> None:
        self._say("near duplicates of text")
        table = read_rows(os.path.join(self._folder, TEXTS), TEXT_DTYPE)
        bits = _partitions(len(table), self._memory)
        bands = choose_bands(threshold).bands
        pairs = itertools.product(range(bands), range(1 << bits))
        tasks = [_Task(self._folder, NEAR_TEXT, part, bits, band, threshold) for band, part in pairs]
        rows, groups = groups_of(self._search(tasks))
        order = np.argsort(groups, kind="stable")
        found = link(rows[order], groups[order], text_comparison(table, threshold))
        record = table["record"]
        self._drop(NEAR_TEXT, record[found.rows], record[found.originals], found.scores)

    def _images(self) -> None:
        self._say("duplicate images")
        table = read_rows(os.path.join(self._folder, IMAGES), IMAGE_DTYPE)
        bits, most = _partitions(len(table), self._memory), self._rules.image_distance
        tasks = [
            _Task(self._folder, SAME_IMAGES, part, bits, number, most, blocks)
            for number, blocks in enumerate(block_tables(most, len(table)))
            for part in range(1 << bits)
        ]
        rows, groups = groups_of(self._search(tasks))
        order = itertools.groupby(range(rows.size), lambda place: int(table["record"][rows[place]]))
        records = ((record, np.array(list(places))) for record, places in order)
        find = self._same_images if self._rules.images == "same" else self._any_or_all_images
        for record, original, score in find(table, rows, groups, records):
            self._drop(SAME_IMAGES, np.array([record]), np.array([original]), np.array([score]))

    def _same_images(
        self, table: np.ndarray, rows: np.ndarray, groups: np.ndarray, records: Iterator[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[int, int, int]]:
        """(record, original, bits) of records whose images are those of one that is kept, and as many."""
        compare = image_comparison(table, self._rules.image_distance)
        kept: dict[tuple[int, ...], list[np.ndarray]] = {}
        """Rows of kept records, by the groups of their images."""
        for record, places in records:
            if len(places) < self._records["images"][record]:  # one of its images is like no other
                continue
            mine, others = rows[places], kept.setdefault(tuple(sorted(groups[places].tolist())), [])
            for theirs in others:
                similar, bits = compare(np.repeat(mine, theirs.size), np.tile(theirs, mine.size))
                nearest = np.where(similar, bits, 255).reshape(mine.size, theirs.size)
                if (worst := max(nearest.min(axis=1).max(), nearest.min(axis=0).max())) < 255:
                    yield record, int(table["record"][theirs[0]]), int(worst)
                    break
            else:
                others.append(mine)

    def _any_or_all_images(
        self, table: np.ndarray, rows: np.ndarray, groups: np.ndarray, records: Iterator[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[int, int, int]]:
        """(record, original, bits) of records any or all of whose images are in some that are kept; the original is
        that of the likest image."""
        compare = image_comparison(table, self._rules.image_distance)
        signatures = _signatures(table[rows])
        kept: dict[int, dict[bytes, int]] = {}
        """Images of kept records by group and signature: the first row of each."""
        for record, places in records:
            best = []
            for place in places:
                earlier = np.array([*kept.get(int(groups[place]), {}).values()], dtype=np.int64)
                similar, bits = compare(np.full(earlier.size, rows[place]), earlier)
                if similar.any():
                    nearest = int(np.argmin(np.where(similar, bits, 255)))
                    best.append((int(bits[nearest]), int(table["record"][earlier[nearest]])))
            needed = 1 if self._rules.images == "any" else int(self._records["images"][record])
            if best and len(best) >= needed:
                bits, original = min(best)
                yield record, original, bits
                continue
            for place in places:
                kept.setdefault(int(groups[place]), {}).setdefault(signatures[place].tobytes(), int(rows[place]))
