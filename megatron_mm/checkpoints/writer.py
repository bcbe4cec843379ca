"""The process that writes a rank's checkpoints while the rank trains. Its other end is background.py.

    rank ── shared memory: the file, whole ──▶ this ──▶ disk
         ── a request a line, JSON ──────────▶
         ◀─ an answer a line, JSON ───────────

It outlives no rank: where the pipe of requests is closed, what is being written is left as it is, unnamed. Signals are
its rank's to act on. No torch here.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.block_file import BLOCK, write_pieces


def main(memory: int) -> None:
    """Serves requests until there are no more.

    Args:
        memory: descriptor of the shared memory.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        began = time.monotonic()
        try:
            answer = _serve(json.loads(line), memory)
        except Exception as error:  # whatever storage does, the rank says it and trains on
            answer = {"error": checkpoint_folder.one_line(error)}
        try:
            print(json.dumps({"error": None, **answer, "seconds": time.monotonic() - began}), flush=True)
        except BrokenPipeError:  # the rank has ended
            os._exit(1)


def _serve(request: dict[str, Any], memory: int) -> dict[str, Any]:
    if request["do"] == "write":
        with mmap.mmap(memory, request["bytes"], prot=mmap.PROT_READ) as mapped, memoryview(mapped) as whole:
            write_pieces(Path(request["path"]), Path(request["index"]), _watched(whole), request["tensors"])
    elif request["do"] == "finish":
        part = Path(request["part"])
        checkpoint_folder.finish(part, request["facts"])
        checkpoint_folder.prune(part.parent, request["keep"], request["facts"]["iteration"])
    elif request["do"] == "finish local":
        checkpoint_folder.finish(Path(request["part"]), request["facts"], whole=False)
    else:
        checkpoint_folder.keep_alone(Path(request["folder"]))
    return {}


def _watched(whole: memoryview) -> Iterator[memoryview]:
    """Blocks of the file, as long as the rank lives."""
    requests = select.poll()
    requests.register(0, 0)  # a pipe that is closed is always told
    for begin in range(0, len(whole), BLOCK):
        if requests.poll(0):
            os._exit(1)
        with whole[begin : begin + BLOCK] as block:
            yield block
