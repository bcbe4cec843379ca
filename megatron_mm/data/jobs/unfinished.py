"""A build that can be killed: OUTPUT.building has its files, and a journal of how far they and their sources are.

    OUTPUT.building/
        lock           held by the process that builds
        options.json   what is built, and how
        journal.json   written anew every few seconds: how far the sources were read, sizes of the files at that moment
        data/          the files: what the journal says, and perhaps more, which is cut off
        names.json     the final names, once all files are complete: who is killed while files get them is finished next

The same command takes a build up where the journal is. What follows depends on nothing else, so the result is
byte for byte that of a build that nobody interrupted, for any number of workers. With other options, or if what was
read has changed since, the build starts anew and says so. Finished files get their names by renaming; of what has those
names by then, only outputs of the same kind are replaced, and only if that was asked for (`Replacing`). A folder
OUTPUT.building that holds anything but the above is not a build's, and is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from megatron_mm.config.documents import load_json
from megatron_mm.config.outputs import OutputError, check_place
from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES
from megatron_mm.data.corpus.text_input import open_lines
from megatron_mm.data.jobs.parallel import LineBlock, Result, line_blocks, ordered_map
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import give_name, written_whole

JOURNAL_SECONDS = 5.0
_CHUNK = 1 << 20
_OWN = re.compile(r"lock|(options|journal|names)\.json(\.new)?|data|old-\d+")


class Sink(Protocol):
    """Where a build's results go."""

    def begin(self, state: dict | None) -> None:
        """Opens the files: new, or as they were at `state`."""

    def add(self, result) -> None:
        """Takes the next result."""

    def state(self) -> dict:
        """How far the files are; all of it is on the disk."""

    def close(self) -> None:
        """Closes the files, whatever they hold."""


@dataclass
class Source:
    """How far an input file was read."""

    path: str
    size: int
    modified: int
    """Nanoseconds."""
    line: int = 1
    """Number of the first line that was not read."""
    offset: int = 0
    """Bytes of the lines read (decompressed, or made of the records)."""
    checksum: int = 0
    """CRC-32 of these bytes."""
    done: bool = False

    @classmethod
    def of(cls, path: str) -> Source:
        """A file of which nothing was read."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        return cls(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)

    def took(self, block: LineBlock) -> None:
        """A block of its lines was built."""
        self.line = block.first_line + block.lines
        self.offset += len(block.data)
        self.checksum = zlib.crc32(block.data, self.checksum)

    def unchanged(self) -> bool:
        """Whether what was read of the file is what it holds now."""
        now = Source.of(self.path)
        if (now.size, now.modified) == (self.size, self.modified):
            return True
        left, checksum = self.offset, 0
        with open_lines(self.path) as (stream, _):
            while left and (data := stream.read(min(_CHUNK, left))):
                left, checksum = left - len(data), zlib.crc32(data, checksum)
            ends_here = not stream.read(1)
        self.size, self.modified = now.size, now.modified
        return not left and checksum == self.checksum and (ends_here or not self.done)


@dataclass
class Lines:
    """How the lines of the sources are built."""

    function: Callable[[LineBlock], Result]
    initializer: Callable[..., None]
    initargs: tuple
    workers: int
    block_bytes: int
    block_lines: int = 0
    max_line: int = MAX_LINE_BYTES


@dataclass(frozen=True)
class Replacing:
    """What a build may replace when its files or folders get their names."""

    allowed: bool
    """Whether anything (--overwrite)."""
    differs: Callable[[str], str | None]
    """What tells that a path is not an output of the same kind, such as "holds notes.txt"; None: it is one."""
    advice: str
    """What to do about something that may not be replaced."""

    def check(self, paths: Sequence[str]) -> None:
        """Raises DataError if a path is taken and may not be replaced, OutputError if it never is."""
        for path in paths:
            if not os.path.lexists(path):
                continue
            if not self.allowed:
                raise DataError(f"{path}: exists already; {self.advice}")
            if difference := self.differs(path):
                raise OutputError(f"{path}: {difference}, and is not replaced; choose another name")


class UnfinishedBuild:
    """The folder of a build, locked by this process until it is placed or left (`explain`).

    Args:
        output: what is built.
        options: everything but the sources that the result depends on, as JSON.
    """

    def __init__(self, output: str, options: dict) -> None:
        self.output = os.path.abspath(output)
        self.folder = f"{self.output}.building"
        self.data = os.path.join(self.folder, "data")
        self._journal = os.path.join(self.folder, "journal.json")
        self._names = os.path.join(self.folder, "names.json")
        self._options = options
        self._lock: TextIO | None = None
        self._last: dict | None = None

    def begin(self) -> UnfinishedBuild:
        """Makes or takes up the folder. Before this nothing is on the disk, so that a caller can clean up from there
        on (`explain`), whatever interrupts it.

        Raises:
            DataError: another process builds the same output, or the folder is not one of a build.
        """
        if foreign := self._foreign():
            raise OutputError(f"{self.folder}: {foreign}, so it is not of a build; move it or choose another name")
        if not self._locked():
            raise DataError(f"{self.folder}: another process is building {self.output}; wait for it or stop it")
        self._take_up(self._options)
        return self

    def _foreign(self) -> str | None:
        """What tells that the folder was not made by a build; None if one did, or if it is not there."""
        if not os.path.lexists(self.folder):
            return None
        if os.path.islink(self.folder) or not os.path.isdir(self.folder):
            return "is no folder"
        names = sorted(os.listdir(self.folder))
        if others := [name for name in names if not _OWN.fullmatch(name)]:
            return f"holds {others[0]}"
        if names and not os.path.isfile(os.path.join(self.folder, "lock")):
            return "holds no lock"
        if "data" in names and not isinstance(self._read("options.json"), dict):
            return "holds data without the options of a build"
        return None

    def _locked(self) -> bool:
        """Whether this process has the folder, which is made if it is missing."""
        if self._lock is not None:
            return True
        os.makedirs(self.folder, exist_ok=True)
        lock = open(os.path.join(self.folder, "lock"), "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._lock = lock
        return True

    def _take_up(self, options: dict) -> None:
        path = os.path.join(self.folder, "options.json")
        wanted = json.dumps(options, sort_keys=True, ensure_ascii=False)
        found, journal = self._read("options.json"), self._read("journal.json")
        if found == json.loads(wanted):
            self._last = journal
        elif found is not None and journal:
            self._say("was begun with other options: starts anew")
        if self._last is None:
            self._clear()
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(wanted)
        os.makedirs(self.data, exist_ok=True)

    def _read(self, name: str) -> Any:
        """A file of the folder, None where it is missing or was cut off."""
        try:
            return load_json(os.path.join(self.folder, name))
        except (OSError, ValueError):
            return None

    def _clear(self) -> None:
        self._last = None
        if os.path.exists(self._journal):
            os.remove(self._journal)
        shutil.rmtree(self.data, ignore_errors=True)

    def _say(self, text: str) -> None:
        print(f"{self.folder}: {text}", file=sys.stderr, flush=True)

    def _record(self, sources: Sequence[Source], sink: Sink) -> None:
        state = {"files": sink.state(), "sources": [asdict(source) for source in sources]}
        _write(self._journal, state)

    def _taken_up(self, inputs: Sequence[str], sink: Sink) -> list[Source]:
        """The sources that were begun, and the sink opened where they left it."""
        if self._last is not None:
            sources = [Source(**source) for source in self._last["sources"]]
            same = [source.path for source in sources] == [os.path.abspath(path) for path in inputs[: len(sources)]]
            if same and all(os.path.exists(source.path) and source.unchanged() for source in sources):
                try:
                    sink.begin(self._last["files"])
                except (DataError, OSError) as error:
                    sink.close()
                    self._say(f"is damaged ({error}): starts anew")
                else:
                    self._say("continues an unfinished build")
                    return sources
            else:
                self._say("its sources have changed: starts anew")
            self._clear()
            os.makedirs(self.data)
        sink.begin(None)
        return []

    def read_lines(self, inputs: Sequence[str], sink: Sink, lines: Lines, bar: tqdm) -> Iterator[LineBlock]:
        """Builds the lines of the inputs, in order, from where an earlier build stopped.

        Yields:
            each block that was built.

        Raises:
            DataError: a line cannot be used; what was built until then is kept.
        """
        sources = self._taken_up(inputs, sink)
        bar.update(sum(source.size for source in sources if source.done))
        recorded = time.monotonic()
        for number, path in enumerate(inputs):
            if number == len(sources):
                sources.append(Source.of(path))
            source = sources[number]
            if source.done:
                continue
            with open_lines(path, lines.max_line) as (stream, raw):
                if source.offset:
                    stream.seek(source.offset)
                shown = 0
                limits = (lines.block_bytes, lines.block_lines, lines.max_line)
                blocks = line_blocks(path, stream, raw, *limits, first_line=source.line)
                work = ordered_map(lines.function, blocks, lines.workers, lines.initializer, lines.initargs)
                for block, result in work:
                    sink.add(result)
                    source.took(block)
                    bar.update(block.end - shown)
                    shown = block.end
                    yield block
                    if time.monotonic() > recorded + JOURNAL_SECONDS:
                        self._record(sources, sink)
                        recorded = time.monotonic()
            source.done = True

    def place(self, names: Sequence[tuple[str, str]], replacing: Replacing) -> None:
        """Gives finished files or folders their names, in this order, and removes the rest.

        Args:
            names: (path within `data`, "" for all of it; final path).
            replacing: what may have those names; it may have come while this was built.

        Raises:
            DataError: something else has one of the names; none is given then.
        """
        replacing.check([final for _, final in names])
        _write(self._names, [(name, os.path.abspath(final)) for name, final in names])
        self._rename()

    def _rename(self) -> None:
        names, folder = load_json(self._names), os.path.dirname(self.output)
        for number, (name, final) in enumerate(names):
            if os.path.basename(name) != name or os.path.dirname(final) != folder:  # no build writes elsewhere
                raise DataError(
                    f"{self._names}: gives {name!r} the name {final!r}, which is not in {folder}; remove it"
                )
            made = os.path.join(self.data, name) if name else self.data
            if not os.path.exists(made):  # it has its name
                continue
            give_name(made, final, os.path.join(self.folder, f"old-{number}"))
        self._remove()

    def complete(self) -> None:
        """Gives the names that a killed process had no time to give, if its build was complete but for them."""
        if os.path.exists(self._names) and not self._foreign() and self._locked():
            self._rename()
            self._say("was complete but for its names, which it has now")

    def explain(self, error: BaseException) -> None:
        """Ends an unfinished build: its folder is kept if a journal was begun, and the user told so."""
        if not os.path.exists(self.folder) or self._foreign() or not self._locked():
            return
        if not (os.path.exists(self._journal) or os.path.exists(self._names)):
            self._remove()
            return
        self._lock.close()
        kept = f"{self.folder} keeps what was built, and the same command continues there"
        if isinstance(error, KeyboardInterrupt):
            error.args = (kept,)
        else:
            print(kept, file=sys.stderr, flush=True)

    def _remove(self) -> None:
        """Removes what a build makes, last what the next one needs to finish this if it is killed."""
        own, last = filter(_OWN.fullmatch, os.listdir(self.folder)), ("names.json", "options.json", "lock")
        for name in sorted(own, key=lambda name: last.index(name) if name in last else -1):
            path = os.path.join(self.folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)
        self._lock.close()


def _write(path: str, value: object) -> None:
    """Writes JSON that is whole or as it was before, whatever happens."""
    with written_whole(path, partial=f"{path}.new", durable=True, encoding="utf-8") as stream:
        json.dump(value, stream, ensure_ascii=False)


def check_output(output: str, paths: Sequence[str], replacing: Replacing) -> None:
    """Completes an output that lacks but names, then looks at what is there.

    Args:
        output: as the user named it.
        paths: files or folders that it consists of.

    Raises:
        DataError: a path exists and may not be replaced, or `output` is no place for one.
    """
    check_place(output, "the output")
    UnfinishedBuild(output, {}).complete()
    replacing.check(paths)
