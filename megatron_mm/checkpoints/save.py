"""Saving a run: every process writes what it holds, in the background where memory allows, and nothing is gathered.

    begin ─ each copies its pieces to the host ─ training goes on, each writes its file ─ all written: rank 0 names it

Training stands still for the copy alone. A checkpoint appears whole or not at all (folder.py), at a step at which every
process knows that all have written; an error is told at the step after it, and the checkpoint before stays. Local
copies (local.py) are saved alike, on each node; what is in memory goes to the next node meanwhile (neighbour.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch.distributed as dist

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.background import BackgroundWriter
from megatron_mm.checkpoints.checkpoint import Position, weights_of
from megatron_mm.checkpoints.held import shares
from megatron_mm.checkpoints.image import Image
from megatron_mm.checkpoints.local import LocalCopies
from megatron_mm.checkpoints.neighbour import NeighbourCopy
from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.data.tokens.tokenizer import stored_name
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.platform.collectives import all_agree, exchanged

if TYPE_CHECKING:
    from megatron_mm.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

#: Of the memory that is free on a host, what copies for background writing may take.
_SHARE_OF_FREE_MEMORY = 0.8
#: Between two looks at a save that is waited for.
_POLL_SECONDS = 0.02


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def image_of(pipeline: Pipeline, optimizer: Optimizer) -> Image:
    """The file of this process: its optimizer state, and its share of what others hold as well."""
    weights = weights_of(pipeline)
    alike = [(weight, weight.parameter, "") for weight in weights] + list(optimizer.held_alike(weights))
    return Image([*shares(alike), *optimizer.own_slots(weights)])


def save(config: Config, root: Path, pipeline: Pipeline, optimizer: Optimizer, position: Position) -> Path:
    """Writes the checkpoint of a position and returns when it is there. Collective.

    Raises:
        SaveError: the disk is too full or writing failed; no earlier checkpoint was touched.
    """
    folder = Saver(config, root, in_background=False).begin(pipeline, optimizer, position)
    assert folder is not None
    return folder


class Saver:
    """Writes the checkpoints of a run into a folder, and local copies, one at a time. Every method is collective.

    Args:
        in_background: training goes on while files are written, where the hosts have the memory.
        local: takes local copies.
        iteration: from which the run goes on.

    Raises:
        SaveError: from `begin`, `poll` and `wait`: a checkpoint was not written.
    """

    def __init__(
        self, config: Config, root: Path, in_background: bool, local: LocalCopies | None = None, iteration: int = 0
    ) -> None:
        self.config, self.root, self.in_background, self.local = config, root, in_background, local
        self.iteration: int | None = None
        """Of the checkpoint that was named last, by this object."""
        self.seconds = 0.0
        """How long that took, from the copy to its name."""
        self._writer: BackgroundWriter | None = None
        self._part: Path | None = None
        self._begun = iteration
        self._is_keeper = False
        """Whether this process makes and names the folder that is being written."""
        self._copy: NeighbourCopy | None = None
        self._then: list[Callable[[], None]] = []
        """What keepers ask of their writers once all files are there, one after the other."""
        self._facts: dict[str, Any] = {}
        self._began = 0.0

    def prepare(self, pipeline: Pipeline, optimizer: Optimizer) -> list[str]:
        """Starts the writing processes, so that the first save finds its memory; what is to be said about it.

        To be called once the optimizer has its state.

        Raises:
            ValueError: local copies are wanted, and a host lacks the memory for them.
        """
        if not self.in_background:
            return []
        size = image_of(pipeline, optimizer).size
        lacking = self._lacking_memory(size - (self._writer.held if self._writer is not None else 0))
        if lacking is None:
            lacking = _first_problem(self._start)
        if lacking:
            if self.local is not None:
                raise ValueError(
                    f"checkpoint.local_folder: local copies are written in the background, for which {lacking}; "
                    "free memory there, or set it to null"
                )
            self.in_background = False
            return [f"checkpoints are written while training waits: {lacking}"]
        assert self._writer is not None
        self._writer.reserve(size)
        return []

    def _start(self) -> None:
        if self._writer is None:
            self._writer = BackgroundWriter()

    def _lacking_memory(self, size: int) -> str | None:
        """Why a host has not the memory for copies of what its processes hold; the same on every process.

        Args:
            size: bytes that this process needs besides those it has taken.
        """
        if not hasattr(os, "memfd_create"):
            return "this system has no memory that processes share without a name"
        hosts = exchanged((socket.gethostname(), size, _free_memory()))
        wanted: dict[str, int] = {}
        for host, needed, _ in hosts:
            wanted[host] = wanted.get(host, 0) + max(0, needed)
        for host, _, free in hosts:
            if wanted[host] > _SHARE_OF_FREE_MEMORY * free:
                return (
                    f"a copy of what {host} holds needs {wanted[host] / 2**30:.1f} GiB, "
                    f"of {free / 2**30:.1f} GiB that are free there"
                )
        return None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._part is not None

    def local_is_due(self, iteration: int) -> bool:
        """Whether local copies are to be saved now: the last save began so many steps ago, and none is under way."""
        interval = self.config.checkpoint.local_interval
        return self.local is not None and not self.busy and iteration - self._begun >= interval

    def begin(
        self, pipeline: Pipeline, optimizer: Optimizer, position: Position, locally: bool = False
    ) -> Path | None:
        """Begins to write a checkpoint. None may be under way.

        Args:
            locally: as local copies.

        Returns:
            its folder, if it is there already: without background writing.
        """
        if self.in_background and not all_agree(self._writer is not None and self._writer.alive):
            if self._writer is not None and not self._writer.alive:
                self.close()
            for line in self.prepare(pipeline, optimizer):
                if dist.get_rank() == 0:
                    logger.warning("%s", line)
        self._began, self._begun = time.monotonic(), position.iteration
        local = self.local if locally else None
        root = self.root if local is None else local.root
        self._is_keeper = dist.get_rank() == 0 if local is None else local.nodes.is_keeper
        self._part = part = checkpoint_folder.folder_of(root, position.iteration).with_suffix(".part")
        self._facts = {
            "iteration": position.iteration,
            "consumed_samples": position.consumed_samples,
            "optimizer_step": optimizer.steps,
            "processes": dist.get_world_size(),
        }
        image = image_of(pipeline, optimizer)
        # One exchange before the copy and one after it: at each, the slowest process is waited for.
        problem = _problem_of(lambda: self._prepare_folder(root, position.iteration)) if self._is_keeper else None
        told = exchanged((problem, image.size, uuid.uuid4().hex, _free_space(root)))
        self._raise_first(problem for problem, *_ in told)
        sizes = [size for _, size, *_ in told]
        if local is not None:
            self._facts["save"] = told[0][2]
            self._begin_locally(local, image, part, sizes)
            return None
        self._raise_first([_lacks_space(root, sum(sizes), told[0][3])])
        if self._writer is not None and self.in_background:
            writer = self._writer
            self._together(lambda: writer.write(image, part, dist.get_rank()))
            self._then = [lambda: writer.finish(part, self._timed_facts(), self.config.checkpoint.keep_last)]
            return None
        self._together(lambda: image.write(part, dist.get_rank()))
        self._together(self._name, keepers_only=True)
        return self._done()

    def _begin_locally(self, local: LocalCopies, image: Image, part: Path, sizes: list[int]) -> None:
        """Begins to write the file of this process, and to send it to the next node."""
        writer = self._writer
        assert writer is not None  # `prepare` would have refused
        self._raise(local.lacks_space(sizes))
        tensors: dict[str, dict] = {}
        self._together(lambda: tensors.update(writer.write(image, part, dist.get_rank())))
        if len(local.nodes.members) > 1:
            memory = writer.memory[: image.size]
            self._copy = NeighbourCopy(local.nodes, local.group, memory, tensors, sizes, part)
        # The set before goes once this one has its name on every node.
        self._then = [
            lambda: writer.finish_local(part, self._timed_facts()),
            lambda: writer.keep_alone(part.with_suffix("")),
        ]

    def _prepare_folder(self, root: Path, iteration: int) -> None:
        """The folder and its small files."""
        config, part = self.config, checkpoint_folder.begin(root, iteration)
        dump_config(config, part / "config.yaml")
        if config.data.tokenizer:
            shutil.copyfile(config.data.tokenizer, part / stored_name(config.data.tokenizer))

    def _name(self) -> None:
        assert self._part is not None
        checkpoint_folder.finish(self._part, self._timed_facts())
        checkpoint_folder.prune(self.root, self.config.checkpoint.keep_last, self._facts["iteration"])

    def _timed_facts(self) -> dict[str, Any]:
        return {**self._facts, "seconds": round(time.monotonic() - self._began, 3)}

    def poll(self) -> Path | None:
        """To be called after each step: goes on with a checkpoint that is being written.

        Returns:
            its folder, once it is there.
        """
        if self._part is None or self._writer is None:
            return None
        answer = self._writer.answered()
        if not all_agree(answer is not None and (self._copy is None or self._copy.ended)):
            return None
        assert answer is not None
        copy, self._copy = self._copy, None
        self._raise(answer[0] or (copy and copy.problem))
        if self._then:
            ask = self._then.pop(0)
            if self._is_keeper:
                ask()
            return None
        return self._done()

    def wait(self) -> Path | None:
        """Returns when nothing is being written; the folder of what was."""
        folder = None
        while self.busy:
            folder = self.poll()
            if self.busy:
                time.sleep(_POLL_SECONDS)
        return folder

    def _done(self) -> Path:
        assert self._part is not None
        folder, self._part = self._part.with_suffix(""), None
        self.iteration, self.seconds = self._facts["iteration"], time.monotonic() - self._began
        return folder

    def close(self) -> None:
        """Ends the writing process; what it is writing is left without a name. Not collective."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _together(self, write: Callable[[], object], keepers_only: bool = False) -> None:
        """Does something, and raises SaveError on every process if that fails on any."""
        self._raise(_problem_of(write) if self._is_keeper or not keepers_only else None)

    def _raise(self, problem: str | None) -> None:
        """Raises SaveError on every process if any has a problem."""
        self._raise_first(exchanged(problem))

    def _raise_first(self, problems: Iterable[str | None]) -> None:
        """Raises SaveError for the first problem of those that every process knows."""
        found = next(filter(None, problems), None)
        if found:
            assert self._part is not None
            part, self._part = self._part, None
            if self._is_keeper:
                with contextlib.suppress(ValueError):  # which is what was found, or is found by the next save
                    checkpoint_folder.remove(part)
            raise SaveError(f"checkpoint {part.with_suffix('')} was not written: {found}")


def _problem_of(write: Callable[[], object]) -> str | None:
    try:
        write()
    except Exception as error:  # whatever storage does, the run goes on and says so
        return checkpoint_folder.one_line(error)
    return None


def _first_problem(act: Callable[[], object]) -> str | None:
    """What went wrong on any process; the same on every one."""
    return next(filter(None, exchanged(_problem_of(act))), None)


def _free_memory() -> int:
    """Bytes of memory that are free on this host, or in this container."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    return free


def _free_space(root: Path) -> int:
    """Bytes that are free where checkpoints are stored; 0 where the folder is not there, which its maker says."""
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return 0


def _lacks_space(root: Path, needed: int, free: int) -> str | None:
    """Why the storage of checkpoints, with so many bytes free, will not hold the next one."""
    if needed * 1.05 > free:
        return f"{root} has {free / 2**20:.0f} MiB free and the checkpoint needs {needed / 2**20:.0f} MiB"
    return None
