"""How long a build will take and how large it will be, from real builds of samples of its input.

A few small builds find out how large a sample may be. Then several samples, spread evenly over the input and built one
after another with the workers asked for, say what a byte of input becomes; their differences say how sure that is. What
a build takes before its first line is known from the smallest, so it is counted once.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.corpus.line_samples import LineSamples, Sample
from megatron_mm.data.corpus.samples import KINDS, parse_line, refuse_file
from megatron_mm.data.corpus.text_input import media_folder
from megatron_mm.data.store.layout import TABLE
from megatron_mm.media.errors import DataError

_SAMPLES, _BLOCKS = 5, 8
#: Student's t for 95 % and the freedom that five samples leave.
_T95 = 2.78
_FIRST_BYTES, _GROWTH = 1 << 12, 4
#: A build's own files, as a share of its indexes, and what doubles while it is finished (`store/indexed.py`,
#: `multimodal.py`): 12 bytes of 20 for each document, and the table.
_WORKING_SHARE = 0.6


@dataclass
class Figure:
    """An estimate."""

    value: float
    margin: float | None
    """The true value lies within ± this share with about 95 % probability; None: not known."""


@dataclass
class Outcome:
    """One build."""

    line_bytes: int
    """Of its input."""
    seconds: float
    counts: dict[str, int]
    files: dict[str, int]
    """Bytes of each file, by its final path."""


@dataclass
class Estimate:
    """What is to be expected of a build."""

    files: int
    input_bytes: int
    share: float
    """Of the input that was built."""
    samples: int
    workers: int
    spent_seconds: float
    counts: dict[str, Figure]
    outputs: dict[str, Figure]
    """Bytes of each file."""
    seconds: Figure
    disk_bytes: Figure
    """Needed while it is built."""
    free_bytes: int
    disk: str
    """Folder whose disk it is."""
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the disk has room, were the margin used up too."""
        return self.disk_bytes.value * (1 + (self.disk_bytes.margin or 0)) <= self.free_bytes

    def to_dict(self) -> dict:
        """Ready for JSON."""
        return {**asdict(self), "fits": self.fits}


@dataclass
class Build:
    """A builder with its options.

    Args:
        output: prefix or folder of the real build.
        workers: processes.
        line: makes a line readable from another folder, given its input file.
        run: builds (file of lines, output) and returns counts.
    """

    output: str
    workers: int
    line: Callable[[bytes, str, int], bytes]
    run: Callable[[str, str], dict[str, int]]

    def outcome(self, sample: Sample, folder: str) -> Outcome:
        """Builds a sample in a new folder, which is removed.

        Raises:
            DataError: as the builder's, with the place in the input.
        """
        with tempfile.TemporaryDirectory(dir=folder) as work:
            lines, made = os.path.join(work, "sample.jsonl"), os.path.join(work, "made")
            with open(lines, "wb") as stream:
                stream.writelines(self.line(line, *origin) for line, origin in zip(sample.lines, sample.origins))
            begin = time.perf_counter()
            try:
                counts = self.run(lines, made)
            except DataError as error:
                raise DataError(_with_origins(str(error), lines, sample.origins)) from error
            seconds = time.perf_counter() - begin
            files = {}
            for parent, _, names in os.walk(work):
                for path in (os.path.join(parent, name) for name in names):
                    if path != lines:
                        files[self.output + path.removeprefix(made)] = os.path.getsize(path)
        return Outcome(sample.size, seconds, counts, files)


def _with_origins(message: str, lines: str, origins: Sequence[tuple[str, int]]) -> str:
    def place(found: re.Match) -> str:
        path, at = origins[int(found[1]) - 1]
        return f"{path}, the line at byte {at}"

    return re.sub(rf"{re.escape(lines)}, line (\d+)", place, message).replace(lines, "a sample of the input")


def text_build(
    output_prefix: str, tokenizer: str, json_keys: Sequence[str], append_eod: bool, workers: int, **options
) -> Build:
    """What tools/preprocess_data.py would do (the arguments of `build_text`)."""

    def run(lines: str, output: str) -> dict[str, int]:
        report = build_text([lines], output, tokenizer, json_keys, append_eod, workers, progress=False, **options)
        counts = {"documents": int(next(iter(report.values()))["documents"])}
        for key, figures in zip(json_keys, report.values()):
            counts["tokens" if len(json_keys) == 1 else f'tokens of "{key}"'] = int(figures["tokens"])
        return counts

    return Build(output_prefix, workers, lambda line, path, at: line, run)


def multimodal_build(
    output: str, tokenizer: str, media_root: str | None, workers: int, check: bool, **options
) -> Build:
    """What tools/preprocess_multimodal.py would do (the arguments of `build_multimodal`)."""

    def line(line: bytes, path: str, at: int) -> bytes:
        """With whole paths of media: the builder reads it from elsewhere."""
        if not line.strip():
            return line
        record = parse_line(line, f"{path}, the line at byte {at}")
        root = media_folder(path, media_root)
        for kind in KINDS:
            for number, medium in enumerate(record[kind] if isinstance(record.get(kind), list) else ()):
                if not isinstance(medium, str):
                    continue
                if root is not None:
                    record[kind][number] = os.path.join(os.path.abspath(root), medium)
                elif options.get("on_error") == "skip":
                    return b"{}\n"  # a line that the builder leaves out too
                else:
                    refuse_file(kind, medium, f"{path}, the line at byte {at}")
        return json.dumps(record).encode() + b"\n"

    def run(lines: str, made: str) -> dict[str, int]:
        manifest = build_multimodal([lines], made, tokenizer, None, workers, check, progress=False, **options)
        return manifest["counts"]

    return Build(output, workers, line, run)


def estimate(inputs: Sequence[str], build: Build, seconds: float = 20.0, megabytes: float = 64.0) -> Estimate:
    """Builds samples and says what the whole build would be.

    Args:
        inputs: files of the formats of `corpus/text_input.py`.
        build: the builder.
        seconds: to spend, about.
        megabytes: most lines to build, in all samples together.

    Raises:
        DataError: the input or a sampled line cannot be used.
        ValueError: a limit is not positive.
    """
    for name, value in (("--seconds", seconds), ("--megabytes", megabytes)):
        if not value > 0:
            raise ValueError(f"{name} is {value:g}; it must be above 0")
    begin, most_bytes = time.perf_counter(), int(megabytes * 1e6)
    disk = _existing_folder(build.output)
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=disk) as folder:
        samples = LineSamples(inputs, folder, most_bytes)
        first, outcomes = _outcomes(samples, build, folder, begin + seconds, most_bytes)
    total = samples.line_bytes
    built = sum(outcome.line_bytes for outcome in outcomes)
    is_whole = len(outcomes) == 1 and samples.is_exact

    def figure(value: Callable[[Outcome], float]) -> Figure:
        return Figure(value(outcomes[0]), 0.0) if is_whole else _scaled(outcomes, value, total)

    counts = {name: figure(lambda outcome, name=name: outcome.counts.get(name, 0)) for name in outcomes[0].counts}
    outputs = {}
    for path in sorted({path for outcome in outcomes for path in outcome.files}):
        if path.endswith(".json"):  # a manifest does not grow
            outputs[path] = Figure(max(outcome.files.get(path, 0) for outcome in outcomes), 0.0)
        else:
            outputs[path] = figure(lambda outcome, path=path: outcome.files.get(path, 0))
    needed = figure(lambda outcome: sum(map(_disk_bytes, outcome.files, outcome.files.values())))
    return Estimate(
        len(inputs), samples.bytes, min(1.0, built / total), len(outcomes), build.workers, time.perf_counter() - begin,
        counts, outputs, _time(first, outcomes, total, is_whole), needed, shutil.disk_usage(disk).free, disk,
        samples.notes,
    )  # fmt: skip


def _outcomes(
    samples: LineSamples, build: Build, folder: str, deadline: float, most_bytes: int
) -> tuple[Outcome, list[Outcome]]:
    """The smallest build, and those to judge by: of everything, or of samples of like size."""
    begin, size, readable = time.perf_counter(), _FIRST_BYTES, samples.readable_bytes
    half = begin + (deadline - begin) / 2

    def is_whole(size: float) -> bool:
        return size >= readable and readable <= most_bytes

    if is_whole(2 * size * _SAMPLES):
        whole = build.outcome(samples.all(), folder)
        return whole, [whole]
    # Twice: the first build of all may wait for what later ones find in memory.
    tried = [build.outcome(samples.draw(0, 1, _BLOCKS, size), folder) for _ in range(2)]
    first = pilot = min(tried, key=lambda outcome: outcome.seconds)
    slope = first.seconds / first.line_bytes
    while time.perf_counter() < half and _GROWTH * size * _SAMPLES <= min(most_bytes, readable):
        size *= _GROWTH
        pilot = build.outcome(samples.draw(0, 1, _BLOCKS, size), folder)
        further = pilot.seconds - first.seconds
        if further > 0 and pilot.line_bytes > first.line_bytes:
            slope = further / (pilot.line_bytes - first.line_bytes)
        if further > (deadline - begin) / 10:
            break
    left = max(0.0, deadline - time.perf_counter())
    if is_whole((left - first.seconds) / slope):
        return first, [build.outcome(samples.all(), folder)]
    size = max(size, int(min((left / _SAMPLES - first.seconds) / slope, most_bytes / _SAMPLES, readable / _SAMPLES)))
    drawn = (samples.draw(number, _SAMPLES, _BLOCKS, size) for number in range(_SAMPLES))
    return first, [build.outcome(sample, folder) for sample in drawn]


def _scaled(outcomes: Sequence[Outcome], value: Callable[[Outcome], float], total: float) -> Figure:
    """A sum over the input from samples: the ratio estimator, with the error that the samples' differences show."""
    size = sum(outcome.line_bytes for outcome in outcomes)
    ratio = sum(map(value, outcomes)) / size
    if len(outcomes) == 1 or not ratio:
        return Figure(ratio * total, None)
    count = len(outcomes)
    squares = sum((value(outcome) - ratio * outcome.line_bytes) ** 2 for outcome in outcomes)
    error = math.sqrt(squares / (count - 1) / count) / (size / count) / ratio
    return Figure(ratio * total, _T95 * error * math.sqrt(max(0.0, 1 - size / total)))


def _time(first: Outcome, outcomes: Sequence[Outcome], total: float, is_whole: bool) -> Figure:
    """Seconds: those of the smallest build, and as many for each further byte as the others took."""
    if is_whole:
        return Figure(outcomes[0].seconds, None)
    further = [outcome.line_bytes - first.line_bytes for outcome in outcomes]
    longer = [outcome.seconds - first.seconds for outcome in outcomes]
    slope = sum(longer) / sum(further) if sum(further) > 0 else 0.0
    if slope <= 0:  # samples as small as the smallest, or a machine too busy to tell: at most this
        slope = sum(outcome.seconds for outcome in outcomes) / sum(outcome.line_bytes for outcome in outcomes)
        return Figure(slope * total, None)
    value, count = first.seconds + slope * max(0.0, total - first.line_bytes), len(outcomes)
    if count == 1:
        return Figure(value, None)
    squares = sum((t - slope * size) ** 2 for t, size in zip(longer, further))
    return Figure(value, _T95 * math.sqrt(squares / (count - 1) / count) / (sum(longer) / count))


def _disk_bytes(path: str, size: int) -> float:
    """Bytes that a file takes while it is built."""
    if path.endswith(".idx"):
        return size * (1 + _WORKING_SHARE)
    return 2 * size if os.path.basename(path) == TABLE else size


def _existing_folder(path: str) -> str:
    """The folder in which an output will be made, or what there is of the way to it."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder
