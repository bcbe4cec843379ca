"""Processes of several nodes on this machine: each node has a local folder of its own, all share the rest."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.programs import PYTHON
from tests.support.waiting import HANG_SECONDS, free_ports


def run_on_nodes(
    words: Sequence[str], folders: Sequence[Path], processes: int = 1, **variables: str
) -> list[subprocess.CompletedProcess]:
    """Runs a program on nodes until all have ended; where one fails, the others are killed, as torchrun does.

    Args:
        words: after `python`; `{local}` is replaced by the node's folder.
        folders: a node's each.
        processes: of a node.
        variables: of the environment.

    Returns:
        by rank.
    """
    world, port = len(folders) * processes, free_ports(1)
    common = {**os.environ, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % processes)}
        command = [PYTHON, *(word.format(local=folders[rank // processes]) for word in words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env={**common, **own}, encoding="utf-8", **pipes))
    until = time.monotonic() + HANG_SECONDS
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started) or time.monotonic() > until:
            time.sleep(1.0)  # for what the others have to say
            for process in started:
                process.kill()
            break
        time.sleep(0.05)
    ended = []
    for process in started:
        said, errors = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, said, errors))
    return ended
