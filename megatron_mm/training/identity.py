"""What must be the same on every process of a run: code, versions, settings, environment, data, where it resumes.

A cluster where one node has yesterday's checkout, another shard or an edited recipe trains without a word, and wrongly.
So before the layout's groups exist every process states facts, name by name, and rank 0 compares their digests; where
these differ, the facts, and what differs is named with rank, host and field. The commonest value counts as right; of
equally common ones, that of the lowest rank. On a CPU, reading and hashing took 0.03 s, and 0.6 ms a file of data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_mm
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.config.plugins import load_plugin, plugin_files
from megatron_mm.config.schema import Config
from megatron_mm.config.systems import system_of
from megatron_mm.data.store.remote import localize
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import open_file
from megatron_mm.models.node_names import ranges

#: Distributions whose releases decide what is computed.
_DISTRIBUTIONS = ("megatron-core", "transformer-engine", "flash-attn", "numpy", "sentencepiece", "simplejpeg", "av")
#: Variables that decide what is computed, or how the processes of a collective talk: NCCL hangs where they differ.
_VARIABLES = re.compile(r"(NCCL|NVTE|TORCH_NCCL|NVIDIA_TF32|CUBLAS|CUDA_DEVICE_MAX|PYTORCH_(CUDA_)?ALLOC)_")
#: Those that a node may well have for itself: its interfaces and adapters, and where it logs.
_OF_A_NODE = re.compile(r"_(IFNAME|HCA|TOPO_FILE|HOSTID|CONF_FILE|DEBUG\w*|TEMP_FILE)$")
#: Files of a dataset; a copy of one in an object store has its keeper's notes beside it.
_DATA = (".bin", ".idx", ".json", ".npy", ".crc")
#: Bytes read from each end of a data file. Its size and, of datasets made here, a manifest of checksums say the rest.
_ENDS = 1 << 16
#: Lines of an error before the rest is counted.
_MOST_LINES = 12
#: How long a file of another node may take to be seen: NFS keeps what it knows of a folder for up to 60 s.
_SEEN_WITHIN_SECONDS = 90.0


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    rank: int
    host: str
    local_rank: int

    @staticmethod
    def own() -> Place:
        """Of this process."""
        return Place(int(os.environ.get("RANK", "0")), socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")))


def located(places: Sequence[Place]) -> str:
    """Ranks with their hosts, as `rank 3 (node0, local rank 3)` or `ranks 8-15 (node1)`."""
    if len(places) == 1:
        return f"rank {places[0].rank} ({places[0].host}, local rank {places[0].local_rank})"
    hosts = list(dict.fromkeys(place.host for place in places))
    where = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else "")
    return f"ranks {ranges([place.rank for place in places])} ({where})"


def facts(config: Config) -> dict[str, str]:
    """What this process has, by name; what cannot be read is a fact too."""
    found = {f"code {name}": value for name, value in _code(config).items()}
    found |= {"version of python": platform.python_version(), "version of torch": torch.__version__}
    found |= {"version of CUDA": str(torch.version.cuda)}
    for name in _DISTRIBUTIONS:
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    for name, value in os.environ.items():
        if _VARIABLES.match(name) and not _OF_A_NODE.search(name):
            found[f"environment {name}"] = value
    found |= _flat("", dataclasses.asdict(config))
    if config.checkpoint.local_folder is not None:  # each node's own; all have one, or none has
        found["checkpoint.local_folder"] = "a folder"
    for entry in config.data.datasets:
        found |= {f"data {name}": value for name, value in _dataset(entry.path, config.data.cache_folder).items()}
    if config.data.tokenizer:
        found[f"data.tokenizer {config.data.tokenizer}"] = _file(Path(config.data.tokenizer))
    root = config.checkpoint.load or checkpoint_root(config)
    names = [folder.name for folder in checkpoint_folder.checkpoints(root)]
    found[f"checkpoints in {root}"] = ", ".join(names[-3:]) or "none"
    for source in config.checkpoint.init_from or ():
        found[f"checkpoint.init_from {source}"] = _listing(Path(source))
    return found


def checkpoint_root(config: Config) -> Path:
    """Folder of the checkpoints that a run writes."""
    return Path(config.checkpoint.save or Path(config.logging.output, "checkpoints"))


def _code(config: Config) -> dict[str, str]:
    package = Path(megatron_mm.__path__[0])
    files = {str(path.relative_to(package.parent)): path for path in sorted(package.rglob("*.py"))}
    builder = (config.data.builder or "").rpartition(":")[0]
    said = {}
    try:
        if builder:
            load_plugin(builder, Path(), "data.builder")
        system_of(config.model.system).load("graph")  # which a plugin may name only
    except Exception as error:  # whatever a user's file raises, on this process perhaps alone, is a fact
        said = {"plugins": f"{type(error).__name__}: {error}"}
    files |= plugin_files()
    return {name: _file(path) for name, path in files.items()} | said


def _flat(name: str, value: Any) -> dict[str, str]:
    """Fields of a tree by their paths."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{name}.{number}", item) for number, item in enumerate(value)]
    else:
        return {name: repr(value)}
    return {path: text for key, item in items for path, text in _flat(key, item).items()}


def _dataset(path: str, cache: str | None) -> dict[str, str]:
    try:
        local = Path(localize(path, cache))
    except DataError as error:
        return {path: str(error)}
    if local.is_dir():
        try:
            files = sorted(file for file in local.iterdir() if file.suffix in _DATA)
        except OSError as error:
            return {path: f"{error.strerror}"}
        return {f"{path}/{file.name}": _file(file) for file in files}
    return {f"{path}{end}": _file(Path(f"{local}{end}")) for end in (".bin", ".idx", ".json")}


def _file(path: Path) -> str:
    """Size and digest, of large files that of both ends."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(file.read(_ENDS), digest_size=6)
            file.seek(max(_ENDS, size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError as error:
        return f"{error.strerror}"
    except DataError as error:
        return str(error)
    return f"{size} bytes, digest {digest.hexdigest()}"


def _listing(folder: Path) -> str:
    """A digest of the names and sizes of what a folder holds."""
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file())
    return f"{len(files)} files, digest {hashlib.blake2b(repr(files).encode(), digest_size=6).hexdigest()}"


def differences(everyone: Sequence[dict[str, str]], places: Sequence[Place]) -> list[str]:
    """What is not the same everywhere, a line for each fact, with the ranks that differ from the commonest value.

    Args:
        everyone: facts of each process.
        places: where they run.
    """
    lines = []
    for name in dict.fromkeys(name for own in everyone for name in own):
        values = [own.get(name, "not there") for own in everyone]
        usual = Counter(values).most_common(1)[0][0]  # of equally common ones, the first that was met
        others: dict[str, list[Place]] = {}
        for value, place in zip(values, places):
            if value != usual:
                others.setdefault(value, []).append(place)
        for value, where in others.items():
            rest = len(everyone) - sum(map(len, others.values()))
            lines.append(f"{name}: {value} on {located(where)}; {usual} on {rest} of {len(everyone)}")
    return lines


def shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def gathered(value: Any) -> list:
    """A value of every process on rank 0, an empty list elsewhere. Collective."""
    everyone: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, everyone or None)
    return everyone


def told(value: Any) -> Any:
    """What rank 0 says, on every process. Collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def not_shared(folder: Path, seconds: float = _SEEN_WITHIN_SECONDS) -> list[str]:
    """Which processes do not see, or cannot write, the folder that rank 0 does: checkpoints need it. Collective.

    Args:
        folder: made if it is not there.
        seconds: how long a file of another process may take to appear.
    """
    trial = folder / f".preflight-{told(uuid.uuid4().hex[:12])}"
    problem = None
    if dist.get_rank() == 0:
        try:
            trial.mkdir(parents=True)
        except OSError as error:
            problem = f"{folder}: rank 0 ({socket.gethostname()}) cannot write it: {error.strerror}"
    problem = told(problem)
    if problem:
        return [problem]
    problem = _write(trial, seconds)
    everyone, places = gathered(problem), gathered(Place.own())
    lines = [f"{folder}: {text} {located([place])}" for text, place in zip(everyone, places) if text]
    if dist.get_rank() == 0:
        wanted = {str(place.rank): place for place, text in zip(places, everyone) if not text}
        if not _appears(lambda: wanted.keys() <= set(os.listdir(trial)), seconds):
            lost = [place for name, place in wanted.items() if not (trial / name).exists()]
            lines.append(f"{folder}: what {located(lost)} wrote there is not seen on rank 0; it must be shared storage")
        shutil.rmtree(trial, ignore_errors=True)  # a file of whoever is late may still come
    return told(shortened(lines))


def _write(trial: Path, seconds: float) -> str | None:
    """What keeps this process from leaving its file in rank 0's folder."""
    if not _appears(trial.is_dir, seconds):
        return "rank 0's folder is not seen (it must be shared storage) on"
    try:
        (trial / str(dist.get_rank())).touch()
    except OSError as error:
        return f"{error.strerror}, on"
    return None


def _appears(there, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def check(config: Config) -> list[str]:
    """What is wrong before the layout matters: facts that differ, a folder that is not shared or writable. Collective.

    Returns:
        The same lines on every process.
    """
    unshared = not_shared(checkpoint_root(config))  # first: NFS remembers for a while what it did not find
    own = facts(config)
    digests = gathered(hashlib.blake2b(repr(sorted(own.items())).encode(), digest_size=16).digest())
    if told(len(set(digests)) == 1):  # nearly always: then nobody sends or reads megabytes
        return unshared
    everyone, places = gathered(own), gathered(Place.own())
    return [*told(shortened(differences(everyone, places))), *unshared]
