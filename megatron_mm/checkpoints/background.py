"""A rank's end of the process that writes its checkpoints (writer.py)."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

import megatron_mm
from megatron_mm.checkpoints.image import Image, own_paths

#: What the writer runs. It imports from where this process does, whatever its working folder holds.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_mm.checkpoints.writer import main; main(int(sys.argv[2]))"
)


class BackgroundWriter:
    """Writes files of pieces, one at a time, while this process goes on.

    The whole file is copied into memory that both processes have; it is kept for the next one. It is no file of any
    file system (such as /dev/shm, which containers keep small) and ends with the two processes.

    Raises:
        OSError: from every method: the process could not be started.
    """

    def __init__(self) -> None:
        self._memory = os.memfd_create("checkpoint")
        path = [str(Path(megatron_mm.__path__[0]).parent), *(entry for entry in sys.path if entry)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(path), str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._memory],
            start_new_session=True,  # what a terminal sends to the run is not for it
        )
        self._mapped: mmap.mmap | None = None
        self._reserving: threading.Thread | None = None
        self._unread = b""
        self._waiting = 0
        self._last: dict[str, Any] = {"error": None, "seconds": 0.0}
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def alive(self) -> bool:
        """Whether the other process can still be asked."""
        return self._process.poll() is None

    @property
    def held(self) -> int:
        """Bytes of memory that it has already."""
        return os.fstat(self._memory).st_size

    def reserve(self, size: int) -> None:
        """Takes memory for a file of so many bytes, in a thread: the first copy would otherwise wait for its pages.

        Where there is not enough, the first `write` says so.
        """
        self._reserving = threading.Thread(target=self._take, args=(size,), daemon=True, name="checkpoint memory")
        self._reserving.start()

    def _take(self, size: int) -> None:
        with contextlib.suppress(OSError):
            self._room(size)
            assert self._mapped is not None
            torch.frombuffer(self._mapped, dtype=torch.uint8)[:: mmap.PAGESIZE].zero_()

    def write(self, image: Image, folder: Path, number: int) -> dict[str, dict]:
        """Copies an image, then asks for its file and its index to be written into a folder.

        Returns:
            what the index says of each tensor.
        """
        if self._reserving is not None:
            self._reserving.join()
        self._room(image.size)
        assert self._mapped is not None
        image.copy_to(memoryview(self._mapped)[: image.size])
        path, index = own_paths(folder, number)
        tensors = image.tensors()
        self._ask({"do": "write", "path": str(path), "index": str(index), "bytes": image.size, "tensors": tensors})
        return tensors

    def finish(self, part: Path, facts: dict[str, Any], keep: int) -> None:
        """Asks for a written checkpoint to be named, and for old ones to be removed."""
        self._ask({"do": "finish", "part": str(part), "facts": facts, "keep": keep})

    def finish_local(self, part: Path, facts: dict[str, Any]) -> None:
        """Asks for a node's files of a save to be named."""
        self._ask({"do": "finish local", "part": str(part), "facts": facts})

    def keep_alone(self, folder: Path) -> None:
        """Asks for a node's files of other saves to be removed."""
        self._ask({"do": "keep alone", "folder": str(folder)})

    @property
    def memory(self) -> memoryview:
        """The file that was copied last, and what may lie behind it."""
        return memoryview(self._mapped) if self._mapped is not None else memoryview(b"")

    def answered(self) -> tuple[str | None, float] | None:
        """What became of what was asked last: (an error or None, seconds it took); None as long as it is at work."""
        assert self._process.stdout is not None
        while self._waiting:
            try:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return None
            self._unread += data
            if not data:
                self._waiting = 0
                return f"the process that writes it ended with status {self._process.wait()}", 0.0
            while b"\n" in self._unread:
                line, self._unread = self._unread.split(b"\n", 1)
                self._waiting -= 1
                self._last = json.loads(line)
        return self._last["error"], self._last["seconds"]

    def _room(self, size: int) -> None:
        """Maps at least so many bytes of the memory."""
        if self._mapped is not None and len(self._mapped) >= size:
            return
        os.posix_fallocate(self._memory, 0, size)  # an error here, instead of a signal when a page is written
        self._mapped = mmap.mmap(self._memory, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._mapped.madvise(mmap.MADV_HUGEPAGE)

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._waiting += 1
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answered` says how it ended

    def close(self) -> None:
        """Ends the other process; what it is writing is left unnamed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a request that the other process did not live to read
                    pipe.close()
        self._process.wait()
        if self._reserving is not None:
            self._reserving.join()
        if self._mapped is not None:
            with contextlib.suppress(BufferError):  # a thread is sending it still, and ends with this process
                self._mapped.close()
        os.close(self._memory)
