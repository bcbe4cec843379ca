"""Checkpoint folders on disk: named by iteration, whole or not there, newest first, old ones removed.

A checkpoint is written as `iter_0000100.part`; `finish` records every file's size in `manifest.json`, with its checksum
unless it is a file of pieces, whose index has those, and renames the folder. So a folder without `.part` was whole when
it was written, and `verify` finds what was cut off or changed later. What is removed holds files of a checkpoint and
nothing else: a folder of that name with something of the user's in it stays. No torch here: conversion tools, the
trainer and its background writer share it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from megatron_mm.checkpoints.block_file import BLOCK, damaged_blocks
from megatron_mm.checkpoints.own_files import checksum_of, load_description, open_own
from megatron_mm.checkpoints.regions import Region, tile
from megatron_mm.data.tokens.tokenizer import tokenizer_kinds
from megatron_mm.platform.atomic_files import give_name, sync, sync_folder, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
#: What a manifest counts, where it says them.
_COUNTS = ("consumed_samples", "optimizer_step", "processes")
#: What is written into a checkpoint, at its top, besides the tokenizer.
_FILES = re.compile(
    r"pieces_\d+\.(safetensors|json)|config\.yaml|manifest\.json"
    r"|[^/]+\.distcp|\.metadata(\.tmp)?|common\.pt|metadata\.json"  # of torch's distributed checkpoints
)


def folder_of(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration stands."""
    return Path(root) / f"iter_{iteration:07d}"


def begin(root: str | Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into; a leftover of an interrupted write is removed.

    Raises:
        ValueError: what would be replaced, now or by `finish`, is not a checkpoint's.
    """
    folder, tracker = folder_of(root, iteration), Path(root, TRACKER)
    if tracker.is_file() and (named := tracker.read_text().strip()) and not named.isdigit():
        raise ValueError(f"{tracker} names no iteration, so it is another program's; choose another folder")
    part = folder.with_suffix(".part")
    for path in (folder, folder.with_suffix(".old")):
        _check_removable(path)
    remove(part)
    part.mkdir(parents=True)
    return part


def remove(folder: Path) -> None:
    """Removes a checkpoint, whole or not, if there is one.

    Raises:
        ValueError: there is something else; nothing was removed.
    """
    _check_removable(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _check_removable(folder: Path) -> None:
    """Raises ValueError unless a folder holds files of a checkpoint alone, or is not there."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a checkpoint, so it stays; move it away")
    listed = {kind.file_name for kind in tokenizer_kinds()}
    with suppress(OSError, ValueError, LookupError, TypeError):
        listed |= set(recorded(folder)["files"])
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir())
    other = next((name for name in names if name not in listed and not _FILES.fullmatch(name)), None)
    if other is not None:
        raise ValueError(f"{folder} holds {other}, which is no part of a checkpoint, so it stays; move it away")


def finish(part: Path, facts: dict[str, Any], whole: bool = True) -> Path:
    """Records files, renames `iter_….part` to `iter_…` and points the tracker at it.

    Args:
        part: the written folder.
        facts: what its manifest says besides: `iteration`, and what a run needs to go on.
        whole: it holds whole tensors; otherwise some of a save's files (local.py), and no tracker names it.

    Raises:
        ValueError: its files are not of the right size, or its pieces do not make up whole tensors.
    """
    files = {str(path.relative_to(part)): path for path in sorted(part.rglob("*")) if path.is_file()}
    _check_pieces(part, files, whole)
    recorded = {name: _recorded(name, path) for name, path in files.items()}
    with open(part / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(_sealed({**facts, "files": recorded}), file, indent=1)
        sync(file)
    sync_folder(part)
    folder = part.with_suffix("")
    aside = folder.with_suffix(".old")
    if folder.exists():  # an abandoned branch's: set aside until the new one stands
        _check_removable(folder)
        remove(aside)
    is_aside = give_name(part, folder, aside)
    sync_folder(folder.parent)
    # From here on it is there, whatever else fails.
    try:
        if is_aside:
            remove(aside)
        if whole:
            write_whole(folder.parent / TRACKER, str(iteration_of(folder)))
    except (OSError, ValueError) as error:
        logger.warning("%s is whole; what follows it failed: %s", folder, error)
    return folder


def _recorded(name: str, path: Path) -> dict[str, int]:
    """What a manifest says of a file. Blocks of pieces have checksums of their own, in the index beside them."""
    size = {"bytes": path.stat().st_size}
    return size if name.endswith(".safetensors") else {**size, "checksum": checksum_of(path)}


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with a checksum of itself."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "checksum"}, sort_keys=True)
    return {**manifest, "checksum": xxhash.xxh3_64_intdigest(text.encode())}


def _check_pieces(part: Path, files: dict[str, Path], whole: bool) -> None:
    """Raises ValueError unless files of pieces are as long as their indices say, and whole ones make up tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    regions: dict[str, list[Region]] = {}
    for name in [name for name in files if name.endswith(".safetensors")]:
        index = json.loads((part / name).with_suffix(".json").read_text())
        if (size := files[name].stat().st_size) != index["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {index['bytes']}")
        for key, entry in index["tensors"].items():
            shape = tuple(entry["shape"])
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(f"{key} is {shape} in {name} and {shapes[key]} before")
            regions.setdefault(key, []).extend((tuple(at), tuple(size)) for at, size, _ in entry["pieces"])
    for key, pieces in regions.items() if whole else ():
        if not tile(pieces, shapes[key]):
            raise ValueError(f"{len(pieces)} pieces of {key} do not make up a tensor of {shapes[key]}")


def iteration_of(folder: Path) -> int:
    """Iteration of a checkpoint folder.

    Raises:
        ValueError: the folder is not named iter_NNNNNNN.
    """
    prefix, _, digits = folder.name.partition("_")
    if prefix != "iter" or not digits.isdecimal():
        raise ValueError(f"{folder} is not a checkpoint folder (iter_0000100)")
    return int(digits)


def recorded(folder: Path) -> dict[str, Any]:
    """What the manifest of a whole checkpoint says: `iteration` and, since pieces are written, how the run goes on."""
    found = load_description(folder / MANIFEST)
    if not isinstance(found, dict):
        raise ValueError(f"{folder / MANIFEST} holds no object")
    return found


def recorded_iteration(folder: Path) -> int:
    """Iteration that the manifest of a whole checkpoint records."""
    return recorded(folder)["iteration"]


def recorded_seconds(folder: Path) -> float | None:
    """How long it took to save a whole checkpoint, if its manifest says so."""
    return recorded(folder).get("seconds")


def checkpoints(root: str | Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [path for path in Path(root).glob("iter_*") if path.is_dir() and path.name.partition("_")[2].isdecimal()]
    return sorted(found, key=iteration_of)


def verify(folder: Path, everything: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None.

    Sizes of all files and the checksums of small ones are compared with the manifest. Blocks of pieces are checked when
    they are read, or here.

    Args:
        everything: read all blocks too.
    """
    return next((problem for _, problem in problems(folder, everything)), None)


def problems(
    folder: Path, everything: bool = False, read: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, str]]:
    """What is wrong with files of a checkpoint folder: (name, problem), MANIFEST's where no other can be looked at.

    Args:
        everything: as for `verify`; then every block that is wrong is told.
        read: told how many bytes of pieces have been read since it was called last.
    """
    try:
        manifest = recorded(folder)
        files, iteration = manifest["files"], manifest["iteration"]
        sealed = "checksum" in manifest or any(isinstance(said, dict) for said in files.values())
        if sealed and _sealed(manifest) != manifest:
            yield MANIFEST, f"{folder / MANIFEST} is damaged: its checksum differs"
        elif not files or type(iteration) is not int or iteration < 0:
            yield MANIFEST, f"{folder / MANIFEST} names no files or no iteration"
        elif any(type(manifest.get(name, 0)) is not int or manifest.get(name, 0) < 0 for name in _COUNTS):
            yield MANIFEST, f"{folder / MANIFEST} says of {', '.join(_COUNTS)} what are no numbers"
        else:
            unlisted = {"config.yaml", *(kind.file_name for kind in tokenizer_kinds())} - files.keys()
            for name in sorted(name for name in unlisted if (folder / name).is_symlink()):
                yield name, f"{folder / name} is a link, and a checkpoint has files of its own"
            for name, said in files.items():
                for problem in _wrong(folder, name, said, everything, read):
                    yield name, problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield MANIFEST, f"{folder} has no readable {MANIFEST}"


def _wrong(folder: Path, name: str, said: Any, everything: bool, read: Callable[[int], object]) -> Iterator[str]:
    """What is wrong with a file of a checkpoint."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"{folder / MANIFEST} names {name}, which is not in its folder"
        return
    size, checksum = (said, None) if isinstance(said, int) else (said["bytes"], said.get("checksum"))
    try:
        if any(above.is_symlink() for above in path.parents if above != folder and above.is_relative_to(folder)):
            yield f"{path} lies behind a link, and a checkpoint has files of its own"
            return
        with open_own(path) as file:
            actual = os.fstat(file.fileno()).st_size
        if actual != size:
            yield f"{path} has {actual} bytes instead of {size}"
        elif checksum is not None and checksum_of(path) != checksum:
            yield f"{path} is damaged: its checksum differs"
        elif everything and name.endswith(".safetensors"):
            yield from _wrong_blocks(path, size, read)
    except FileNotFoundError:
        yield f"{path} is missing"
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        yield str(error)


def _wrong_blocks(path: Path, size: int, read: Callable[[int], object]) -> Iterator[str]:
    index = path.with_suffix(".json")
    try:
        stated: Any = load_description(index)
        sums = stated["checksums"]
        if stated["bytes"] != size or len(sums) != -(-size // BLOCK):
            raise ValueError(f"it is of a file of {stated['bytes']} bytes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be checked: {index.name}: {error}"
        return
    for found in damaged_blocks(path, size, sums):
        if isinstance(found, str):
            yield found
        read(found if isinstance(found, int) else BLOCK)


def newest_whole(root: str | Path, passed_over: Collection[Path] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones; those passed over are not looked at."""
    problems = []
    for folder in reversed(checkpoints(root)):
        if folder in passed_over:
            continue
        problem = verify(folder)
        if problem is None:
            return folder, problems
        problems.append(problem)
    return None, problems


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from itself or from the folder that holds checkpoints.

    Raises:
        ValueError: nothing there, or nothing whole.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        problem = verify(path)
        if problem:
            raise ValueError(problem)
        return path
    folder, problems = newest_whole(path)
    if folder is None:
        raise ValueError("; ".join(problems) or f"{path} holds no checkpoint (iter_NNNNNNN)")
    return folder


def one_line(error: BaseException) -> str:
    """An error in one line, as is said of a checkpoint that was not written."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def prune(root: str | Path, keep: int, newest: int) -> None:
    """Removes all but the newest `keep` whole checkpoints up to an iteration, the one just written (0 keeps all).

    Later ones (of a branch that was left by loading an earlier checkpoint), damaged ones and those of another iteration
    than their name says are not counted or touched; those that hold something of the user's stay.
    """
    if keep > 0:
        upto = [folder for folder in checkpoints(root) if iteration_of(folder) <= newest]
        whole = [path for path in upto if verify(path) is None and recorded_iteration(path) == iteration_of(path)]
        for folder in whole[:-keep]:
            try:
                remove(folder)
            except ValueError as error:
                logger.warning("an old checkpoint is not removed: %s", error)


def keep_alone(folder: Path) -> None:
    """Removes all other sets of files beside one, whole, unfinished or set aside; those with a user's files stay."""
    for path in sorted(folder.parent.glob("iter_*")):
        if path != folder and re.fullmatch(r"iter_\d+(\.part|\.old|\.abandoned)?", path.name):
            try:
                remove(path)
            except ValueError as error:
                logger.warning("an old set of local copies is not removed: %s", error)


def set_aside_later(root: str | Path, iteration: int) -> list[Path]:
    """Renames checkpoints after an iteration to `iter_….abandoned`: a run goes on from that iteration instead.

    Raises:
        ValueError: something that is no checkpoint has such a name.
    """
    moved = []
    for folder in checkpoints(root):
        if iteration_of(folder) > iteration:
            target = folder.with_suffix(".abandoned")
            remove(target)
            folder.rename(target)
            moved.append(target)
    return moved
