"""Peak memory of tools/preprocess_data.py and its workers on a corpus, and on one that is twenty times as large."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.data import ROOT, Arguments, Figure
from benchmarks.data_cases import corpora

_MEGABYTES = (100, 2000)


def repeated(source: Path, target: Path, size: int) -> Path:
    """The lines of a file again and again, up to a size in bytes."""
    if not target.exists() or target.stat().st_size < size:
        with target.open("wb") as out:
            while out.tell() < size:
                with source.open("rb") as stream:
                    for line in stream:
                        out.write(line)
                        if out.tell() >= size:
                            break
    return target


def peak_memory(command: list[str]) -> int:
    """Bytes that a command and its children held at most, shared pages counted once (PSS)."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    return peak


def run(arguments: Arguments) -> Iterator[Figure]:
    """Peaks and their ratio."""
    source = corpora.text(arguments.folder, arguments.smoke)
    model = corpora.tokenizer(arguments.folder, "bpe", arguments.smoke)
    peaks = []
    for megabytes in (1, 2) if arguments.smoke else _MEGABYTES:
        path = repeated(source, arguments.folder / f"text-{megabytes}.jsonl", megabytes << 20)
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(path), "--overwrite"]
        command += ["--tokenizer-model", str(model), "--workers", str(arguments.workers)]
        peaks.append(peak_memory([*command, "--output-prefix", str(arguments.folder / "work-memory")]) / (1 << 20))
        yield Figure(
            "memory", f"peak with {arguments.workers} workers, {megabytes:,} MB of text", peaks[-1], "MiB", "<= 1024"
        )
    yield Figure("memory", "peak of the larger corpus over that of the smaller", peaks[1] / peaks[0], "x", "<= 1.1")
