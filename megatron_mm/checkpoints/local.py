"""Copies of a run's checkpoints on its own nodes, for a quick start after a process or a node was lost.

    LOCAL_FOLDER/RUN-DIGEST/iter_0000120[.part]/   the files of the node's own ranks, and of those of the node before it
                            config.yaml, manifest.json: `iteration`, `processes`, `save` (the same on all nodes), files

What one node holds is a part of a set; all parts of one save together are a set if every file is on some node. The
digest is of the run's checkpoint folder, so other runs may have the same local folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.image import index_file, pieces_file
from megatron_mm.checkpoints.nodes import Nodes, meet
from megatron_mm.config.schema import Config
from megatron_mm.platform.collectives import exchanged

logger = logging.getLogger(__name__)

#: Sets that stand on a node at once: the last whole one, and the next while it is written.
SETS = 2
#: Of a file: node, save, number.
Copy = tuple[int, str, int]


@dataclass(frozen=True)
class LocalSet:
    """The files of one save, on the nodes of this run."""

    iteration: int
    save: str
    """Names the save; the same in the manifest of every node."""
    holders: tuple[tuple[int, ...], ...]
    """Of each file the nodes that have it, undamaged as far as is known."""
    facts: dict[str, Any] = field(compare=False)
    """What the manifests say besides."""
    copies: LocalCopies = field(compare=False)

    @property
    def folder(self) -> Path:
        """Where this process's node has its part."""
        return checkpoint_folder.folder_of(self.copies.root, self.iteration)

    def __str__(self) -> str:
        return f"local copies {self.folder}"


class LocalCopies:
    """The local folder of this process, and those of the others. Every method is collective.

    Args:
        folder: a node's own.
        root: of the run's checkpoints; that of rank 0 counts.
        timeout: how long a message may take.

    Raises:
        ValueError: a process cannot use its folder.
    """

    def __init__(self, folder: str, root: Path, timeout: timedelta) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        whole = exchanged(os.path.realpath(root) if dist.get_rank() == 0 else None, self.group)[0]
        run = Path(whole).parent.name if Path(whole).name == "checkpoints" else Path(whole).name
        digest = hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
        self.root = Path(folder, f"{run}-{digest}").absolute()
        self.nodes: Nodes = meet(self.root, self.group)
        self.damaged: set[Copy] = set()
        """Copies that this process found to be damaged."""

    @staticmethod
    def of(config: Config, root: Path) -> LocalCopies | None:
        """Those of a run, if its settings ask for any."""
        if config.checkpoint.local_folder is None:
            return None
        minutes = config.parallel.distributed_timeout_minutes
        return LocalCopies(config.checkpoint.local_folder, root, timedelta(minutes=minutes * 2))

    def describe(self) -> str:
        """What is kept, and what is lost with a node."""
        count = len(self.nodes.members)
        if count == 1:
            return (
                f"local copies of checkpoints: in {self.root}; all processes see this folder, so it is one node, and a "
                "lost node loses them"
            )
        return f"local copies of checkpoints: {count} nodes, each keeps its own files and those of the node before it"

    def newest(self, passed_over: Collection[object] = ()) -> LocalSet | None:
        """The newest set of which every file is on some node, and which is not passed over."""
        offers, problems = _offers(self.root) if self.nodes.is_keeper else ([], [])
        everyone = exchanged((offers, problems, self.damaged), self.group)
        damaged = {copy for _, _, found in everyone for copy in found}
        files: dict[tuple[int, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        facts: dict[tuple[int, str], dict] = {}
        for number, ranks in enumerate(self.nodes.members):
            for manifest, numbers in everyone[ranks[0]][0]:
                key = manifest["iteration"], manifest["save"]
                facts.setdefault(key, manifest)
                for file in numbers:
                    if (number, manifest["save"], file) not in damaged:
                        files[key][file].append(number)
        lines = [f"a local copy is not used: {line}" for _, found, _ in everyone for line in found]
        chosen = None
        for key in sorted(facts, reverse=True):
            lost = [file for file in range(facts[key]["processes"]) if not files[key][file]]
            if lost:
                lines.append(f"local copies of iteration {key[0]} are not used: no node has the file of rank {lost[0]}")
                continue
            holders = tuple(tuple(files[key][file]) for file in range(facts[key]["processes"]))
            found = LocalSet(*key, holders, facts[key], self)
            if found not in passed_over:
                chosen = found
                break
        for line in lines if dist.get_rank() == 0 else ():
            logger.warning("%s", line)
        return chosen

    def set_aside_later(self, iteration: int) -> list[str]:
        """Renames parts of sets after an iteration, from which the run goes on; the next whole set replaces them.

        Returns:
            on rank 0, what is to be said.

        Raises:
            ValueError: something that is no part of a set has such a name.
        """
        lines, problem = [], None
        try:
            if self.nodes.is_keeper:
                for aside in checkpoint_folder.set_aside_later(self.root, iteration):
                    lines.append(f"set aside {aside}: the run goes on from iteration {iteration}")
        except (ValueError, OSError) as error:
            problem = str(error)
        everyone = exchanged((lines, problem), self.group)
        if found := next((text for _, text in everyone if text), None):
            raise ValueError(found)
        return [line for own, _ in everyone for line in own] if dist.get_rank() == 0 else []

    def lacks_space(self, sizes: Sequence[int]) -> str | None:
        """Why this node's disk will not hold the next set. Not collective.

        Args:
            sizes: bytes of the file of every process.
        """
        needed = sum(sizes[rank] for rank in self.nodes.kept(self.nodes.number))
        free = shutil.disk_usage(self.root).free
        if needed * 1.05 > free:
            return f"{self.root} has {free / 2**20:.0f} MiB free and its local copies need {needed / 2**20:.0f} MiB"
        return None

    def room(self, checkpoint_bytes: int) -> list[tuple[str, bool]]:
        """For each node a line about what its local copies need, and whether its folder has the room.

        Args:
            checkpoint_bytes: of a whole checkpoint, of which every process is taken to write the same share.
        """
        own = 0, 0
        if self.nodes.is_keeper:
            files = (path for path in self.root.rglob("*") if path.is_file())
            own = shutil.disk_usage(self.root).free, sum(path.stat().st_size for path in files)
        everyone = exchanged((str(self.root), *own), self.group)
        found = []
        for number, ranks in enumerate(self.nodes.members):
            where, free, taken = everyone[ranks[0]]
            share = len(self.nodes.kept(number)) / dist.get_world_size()
            needed = SETS * share * checkpoint_bytes
            line = f"local copies: node {number} needs {needed / 2**30:,.2f} GiB for {SETS} sets in {where}, of "
            line += f"{(free + taken) / 2**30:,.2f} that are free or theirs"
            found.append((line, needed <= free + taken))
        return found


def _offers(root: Path) -> tuple[list[tuple[dict[str, Any], list[int]]], list[str]]:
    """Of each part of a set that a node has (its manifest without the files, numbers of whole files); what is wrong."""
    offers, problems = [], []
    for folder in checkpoint_folder.checkpoints(root):
        wrong = dict(checkpoint_folder.problems(folder))
        problems += wrong.values()
        if checkpoint_folder.MANIFEST in wrong:
            continue
        manifest = checkpoint_folder.recorded(folder)
        if not (isinstance(manifest.get("save"), str) and isinstance(manifest.get("processes"), int)):
            problems.append(f"{folder} is no set of local copies: its manifest names no save")
            continue
        there = manifest.pop("files").keys() - wrong.keys()
        numbers = [n for n in range(manifest["processes"]) if {pieces_file(n), index_file(n)} <= there]
        offers.append((manifest, numbers))
    return offers, problems
