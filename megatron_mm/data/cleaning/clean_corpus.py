"""Corpus → a list of what to leave out, with reasons: two passes, and a folder that the builders take as --drop.

The first pass (`scan.py`) turns every line into rows of fixed size in worker processes and can be killed and continued
like any build (`jobs/unfinished.py`); the second (`duplicates.py`) compares the rows of all inputs. The corpus itself
is not written again: terabytes of it stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from megatron_mm.data.cleaning.drop_list import DROPS, FORMAT, VERSION
from megatron_mm.data.cleaning.duplicates import (
    KEPT,
    NEAR_TEXT,
    REASONS,
    REJECTED_BY_RULE,
    SAME_IMAGES,
    DuplicateRules,
    Resolver,
)
from megatron_mm.data.cleaning.predicate import Predicate
from megatron_mm.data.cleaning.report import Tally, markdown, summarise
from megatron_mm.data.cleaning.scan import (
    IMAGE_DTYPE,
    IMAGES,
    RECORD_DTYPE,
    RECORDS,
    REJECTED,
    TEXT_DTYPE,
    TEXTS,
    RowWriter,
    Rules,
    Worker,
    read_rows,
    scan_block,
)
from megatron_mm.data.cleaning.text_rules import Blocklist
from megatron_mm.data.cleaning.text_signatures import PERMUTATIONS
from megatron_mm.data.jobs.unfinished import Lines, Replacing, Source, UnfinishedBuild, check_output
from megatron_mm.data.reading.order import mixed
from megatron_mm.data.store.manifest import MANIFEST, differs_from_folder, sha256, write_manifest
from megatron_mm.media.errors import DataError

DROPPED, REPORT, TABLE = "dropped.jsonl", "report.json", "report.md"
_FILES = re.compile("|".join(map(re.escape, (DROPS, DROPPED, REPORT, TABLE))))
_RESULT = "result"
_BLOCK_BYTES = 1 << 18
_CHUNK = 1 << 16


def clean_corpus(
    inputs: Sequence[str],
    output: str,
    text_keys: Sequence[str] = ("text",),
    media_root: str | None = None,
    rules: Rules | None = None,
    duplicates: DuplicateRules | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Finds what to drop of a corpus.

    Args:
        inputs: files of the formats of `corpus/text_input.py`; of equal records the first in this order is kept.
        output: folder to make (`drop_list.py`).
        text_keys: text fields, which every record must have; "prompt" only if it is there.
        media_root: folder of the media; None: that of each input file.
        rules: what a record must be.
        duplicates: what counts as one record twice.
        workers: processes; 0 works in this one. The output does not depend on it.
        overwrite: replace an existing folder of a cleaning.
        progress: show bars.

    Returns:
        The report (`report.summarise`).

    Raises:
        DataError: a record cannot be used (file, line and cause are named; what was read before it is kept where the
            run was long), a rule cannot be, or the output exists.
    """
    rules, duplicates = rules or Rules(), duplicates or DuplicateRules()
    advice = "remove it, choose another name or pass --overwrite"
    replacing = Replacing(overwrite, lambda path: differs_from_folder(path, FORMAT, _FILES), advice)
    check_output(output, [output], replacing)
    sizes = _check(inputs, text_keys, rules, duplicates)
    options = _options(text_keys, rules, duplicates)
    root = os.path.abspath(media_root) if media_root is not None else None
    build = UnfinishedBuild(output, {"format": FORMAT, "version": VERSION, **options, "media_root": root})
    wanted = duplicates.wanted()
    writer = RowWriter(build.data, wanted.cut.bands if wanted.cut else 0)
    initargs = (tuple(inputs), tuple(text_keys), media_root, rules, wanted)
    lines = Lines(scan_block, Worker.start, initargs, workers, _BLOCK_BYTES, 256)
    total = sum(sizes.values())

    def say(text: str) -> None:
        if progress:
            print(f"comparing: {text}", file=sys.stderr, flush=True)

    try:
        build.begin()
        with tqdm(total=total, unit="B", unit_scale=True, desc="records", disable=not progress, mininterval=0.5) as bar:
            for _ in build.read_lines(inputs, writer, lines, bar):
                bar.set_postfix(records=writer.records, rejected=writer.rejected, refresh=False)
        if not writer.records:
            raise DataError(f"{', '.join(inputs)}: no records")
        writer.state()
        writer.close()
        verdicts = Resolver(build.data, duplicates, workers, say).resolve()
        report = _write(build.data, sizes, verdicts, options, _comparing(build.data, duplicates))
        build.place([(_RESULT, output)], replacing)
    except BaseException as error:
        writer.close()
        build.explain(error)
        raise
    return report


def _check(inputs: Sequence[str], text_keys: Sequence[str], rules: Rules, duplicates: DuplicateRules) -> dict[str, int]:
    """Bytes of each input. Raises DataError where the run could only fail, or would drop everything."""
    duplicates.check()
    if not text_keys:
        raise DataError("text_keys names no field")
    for path, times in Counter(map(os.path.abspath, inputs)).items():
        if times > 1:
            raise DataError(f"{path}: given {times} times; every record would be a duplicate of itself")
    if rules.blocklist:
        Blocklist(rules.blocklist)
    return {path: Source.of(path).size for path in inputs}


def _options(text_keys: Sequence[str], rules: Rules, duplicates: DuplicateRules) -> dict:
    """All that the result depends on but inputs and media; of files that hold rules, their checksums."""
    values = {"text_keys": list(text_keys), "rules": asdict(rules), "duplicates": asdict(duplicates)}
    values["duplicates"].pop("memory_gb")
    values["rules"]["text"] = asdict(rules.text.filled())
    if rules.blocklist:
        values["rules"]["blocklist"] = sha256(rules.blocklist)
    if rules.predicate:
        values["rules"]["predicate"] = {"function": rules.predicate, "sha256": Predicate(rules.predicate).identity}
    return json.loads(json.dumps(values))  # as the report will be read: lists, not tuples


def _comparing(folder: str, rules: DuplicateRules) -> dict:
    """How duplicates were looked for, in figures."""
    out: dict = {}
    if (cut := rules.wanted().cut) is not None:
        out["texts"] = {
            "compared": os.path.getsize(os.path.join(folder, TEXTS)) // TEXT_DTYPE.itemsize,
            "permutations": PERMUTATIONS,
            **cut._asdict(),
            "recall_at_threshold": round(cut.recall(rules.near or 0.0), 4),
        }
    if rules.images != "off":
        out["images"] = {"compared": os.path.getsize(os.path.join(folder, IMAGES)) // IMAGE_DTYPE.itemsize}
    return out


def _rejections(folder: str) -> Iterator[dict]:
    with open(os.path.join(folder, REJECTED), "rb") as stream:
        yield from map(json.loads, stream)


def _write(folder: str, sizes: dict[str, int], verdicts: np.ndarray, options: dict, comparing: dict) -> dict:
    """Writes the result beside the rows.

    Raises:
        DataError: an input has changed since it was begun.
    """
    for path, size in sizes.items():
        if os.path.getsize(path) != size:
            raise DataError(f"{path}: has {os.path.getsize(path)} bytes, but {size} when this run began; run it again")
    inputs = list(sizes)
    result = os.path.join(folder, _RESULT)
    os.makedirs(result, exist_ok=True)
    records = read_rows(os.path.join(folder, RECORDS), RECORD_DTYPE)
    names = ("records", "dropped", "characters", "dropped_characters")
    tally = Tally({path: dict.fromkeys(names, 0) for path in inputs})
    rejections, numbers = _rejections(folder), []

    def place(record: int) -> dict:
        return {"file": inputs[int(records["file"][record])], "line": int(records["line"][record])}

    with open(os.path.join(result, DROPPED), "wb") as stream:
        for begin in range(0, len(records), _CHUNK):
            rows, reasons = records[begin : begin + _CHUNK], verdicts["reason"][begin : begin + _CHUNK]
            for file in np.unique(rows["file"]):
                here = rows["file"] == file
                counts, gone = tally.files[inputs[int(file)]], here & (reasons != KEPT)
                characters = rows["characters"].astype(np.int64)
                for name, value in zip(names, (here.sum(), gone.sum(), characters[here].sum(), characters[gone].sum())):
                    counts[name] += int(value)
            dropped = np.flatnonzero(reasons != KEPT) + begin
            numbers.append(records["line"][dropped])
            lots = mixed(dropped.astype(np.uint64) + np.uint64(1)).tolist()
            for record, lot in zip(dropped.tolist(), lots):
                reason = int(verdicts["reason"][record])
                if reason == REJECTED_BY_RULE:
                    rejection = next(rejections)
                    why = {"reason": rejection["reason"], "detail": rejection["detail"]}
                else:
                    detail = {"of": place(int(verdicts["original"][record]))}
                    score = float(verdicts["score"][record])
                    if reason == NEAR_TEXT:
                        detail["similarity"] = round(score, 3)
                    elif reason == SAME_IMAGES:
                        detail["bits"] = int(score)
                    why = {"reason": REASONS[reason], "detail": detail}
                text = bytes(records["excerpt"][record]).decode(errors="ignore")
                line = {**place(record), **why, "text": text}
                stream.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                tally.drop(line, int(records["characters"][record]), lot)
    np.save(os.path.join(result, DROPS), np.concatenate(numbers))
    report = summarise(tally, options, comparing)
    for name, text in ((REPORT, json.dumps(report, indent=2) + "\n"), (TABLE, markdown(report))):
        with open(os.path.join(result, name), "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
    sources = [
        {
            "name": os.path.basename(path),
            "path": os.path.abspath(path),
            "bytes": sizes[path],
            "records": tally.files[path]["records"],
            "dropped": tally.files[path]["dropped"],
        }
        for path in inputs
    ]
    manifest = {"format": FORMAT, "version": VERSION, "options": options, "sources": sources}
    write_manifest(os.path.join(result, MANIFEST), manifest, result + os.sep, [DROPS, DROPPED, REPORT, TABLE])
    return report
