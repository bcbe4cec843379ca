"""Work spread over processes with results in order and bounded memory: the loop of every builder.

Tasks are blocks of raw lines, because splitting, parsing and tokenising belong to the workers and one message a block
costs far less than one a document.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import BinaryIO, TypeVar

from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES, read_line
from megatron_mm.media.errors import DataError

LINE_END = b"\n"
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file, as raw bytes."""

    path: str
    first_line: int
    """Number of the first line, from 1."""
    data: bytes
    lines: int
    """Line ends in it."""
    end: int
    """Bytes of the file read so far, compressed bytes for compressed input; for progress bars."""


def line_blocks(
    path: str,
    stream: BinaryIO,
    raw: BinaryIO,
    block_bytes: int,
    block_lines: int,
    max_line: int = MAX_LINE_BYTES,
    first_line: int = 1,
) -> Iterator[LineBlock]:
    """Cuts a stream into blocks of whole lines.

    Args:
        path: name for messages.
        stream: the lines (decompressed).
        raw: what tells the progress, the file itself for the most part.
        block_bytes: a block ends once it holds this many bytes.
        block_lines: most lines of a block; 0 for no limit (faster).
        max_line: bytes of the longest line that is accepted.
        first_line: number of the line at which the stream stands.

    Raises:
        DataError: a line is longer than `max_line`, or compressed input is damaged.
    """
    first = first_line
    while True:
        if block_lines:
            lines: list[bytes] = []
            size = 0
            while len(lines) < block_lines and size < block_bytes:
                line = read_line(stream, max_line, f"{path}, line {first + len(lines)}")
                if not line:
                    break
                lines.append(line)
                size += len(line)
            data = b"".join(lines)
            count = data.count(LINE_END)
        else:
            data = stream.read(block_bytes)
            count = data.count(LINE_END)
            if data and not data.endswith(LINE_END):
                rest = read_line(stream, max_line, f"{path}, line {first + count}")
                data += rest
                count += rest.endswith(LINE_END)
        if not data:
            return
        yield LineBlock(path, first, data, count, raw.tell())
        first += count


def _end_with_parent() -> None:
    """Ends this process once its parent has ended, however that began or ended: the parent's end of a pipe closes."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start_worker(initializer: Callable[..., None] | None, initargs: tuple) -> None:
    """Leaves interrupts to the parent, which cancels the work and cleans up; ends with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays interrupts: one raised during a fork is raised in a callback of the fork, where Python drops it.

    A signal mask would not do: another thread (tqdm's monitor) takes the signal, and Python runs the handler here all
    the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in handlers:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in arrived:
        signal.raise_signal(number)


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple = (),
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) in the order of tasks, at most three tasks a worker in flight.

    Args:
        function: runs in the workers; an exception it raises surfaces here, the first in task order.
        tasks: read lazily.
        workers: processes; 0 runs everything in this one.
        initializer: runs once in each worker.
        initargs: its arguments.
    """
    if workers == 0:
        if initializer:
            initializer(*initargs)
        for task in tasks:
            yield task, function(task)
        return
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context(), initializer=_start_worker, initargs=(initializer, initargs)
    )
    pending: deque = deque()
    try:
        for task in tasks:
            with _interrupts_held():  # submitting starts the workers
                pending.append((task, executor.submit(function, task)))
            if len(pending) >= 3 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died (out of memory, or killed); use fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
