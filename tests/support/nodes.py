"""Processes of several nodes on this machine: each node has a local folder of its own, all share the rest."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from tests.support.programs import PYTHON, TORCHRUN
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
    common = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % processes)}
        started.append(_start([PYTHON, *words], folders[rank // processes], own))
    return _ended(started)


def run_agents(
    words: Sequence[str], folders: Sequence[Path], processes: int, **variables: str
) -> list[subprocess.CompletedProcess]:
    """As `run_on_nodes`, with a torchrun for each node, of which the result tells."""
    port, started = free_ports(1), []
    launcher = [*TORCHRUN[:3], "--nnodes", str(len(folders)), "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    for number, folder in enumerate(folders):
        started.append(_start([*launcher, "--node-rank", str(number), *words], folder, variables))
    return _ended(started)


def _start(command: Sequence[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    named = [word.format(local=folder) for word in command]
    return subprocess.Popen(named, env={**os.environ, **variables}, encoding="utf-8", **pipes)


def _ended(started: Sequence[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """What all have said; pipes are read meanwhile, so that nobody waits for room in one."""
    with ThreadPoolExecutor(len(started)) as readers:
        reading = [readers.submit(process.communicate) for process in started]
        until = time.monotonic() + HANG_SECONDS
        while not all(one.done() for one in reading):
            if any(process.returncode for process in started) or time.monotonic() > until:
                wait(reading, timeout=5.0)  # others may have to say why
                for process in started:
                    process.terminate()
                wait(reading, timeout=60.0)
                for process in started:
                    process.kill()
                break
            time.sleep(0.05)
        texts = [one.result() for one in reading]
    return [subprocess.CompletedProcess(each.args, each.returncode, *text) for each, text in zip(started, texts)]
