"""Datasets in object stores: s3://, gs://, hf:// and whatever else fsspec knows, copied once into a local folder.

A shard is memory-mapped, so it has to be a local file; nothing but the first start of a machine waits for the copy.
A copy is used again while the store says that the file is what it was (`AbstractFileSystem.ukey`). The processes of a
machine share one copy: the first makes it, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil

from tqdm import tqdm

from megatron_mm.data.build_text import SUFFIXES
from megatron_mm.data.errors import DataError

#: Folder of the copies, unless `data.cache_folder` names another.
DEFAULT_CACHE = os.path.join("~", ".cache", "megatron_mm", "datasets")
_CHUNK = 1 << 22


def localize(path: str, cache: str | None = None) -> str:
    """The path of a dataset on this machine: of a copy, if it is a URL.

    Args:
        path: a folder, or the prefix of a text shard; local or a URL.
        cache: folder of the copies; None: `DEFAULT_CACHE`.

    Raises:
        DataError: the store cannot be reached, nothing is at the URL, or the disk is full; the URL is named.
    """
    if "://" not in path:
        return path
    import fsspec

    url = path
    root = os.path.abspath(os.path.expanduser(cache or DEFAULT_CACHE))
    try:
        store, there = fsspec.core.url_to_fs(url)
        there = there.rstrip("/")
        name = os.path.basename(there)
        folder = os.path.join(root, f"{name}-{hashlib.blake2b(url.encode(), digest_size=6).hexdigest()}")
        is_folder = store.isdir(there)
        if is_folder:
            files = {os.path.basename(file): file for file in store.ls(there, detail=False) if store.isfile(file)}
        else:
            found = (there + suffix for suffix in SUFFIXES)
            files = {os.path.basename(file): file for file in found if store.exists(file)}
        if not files:
            raise DataError(f"{url}: neither a dataset folder nor the prefix of a text shard")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "copying.lock"), "a", encoding="utf-8") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            _copy(store, files, folder, url)
    except DataError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise DataError(f"{url}: cannot be copied to {root}: {type(error).__name__}: {error}") from error
    return folder if is_folder else os.path.join(folder, name)


def _copy(store, files: dict[str, str], folder: str, url: str) -> None:
    """Copies what is missing or was changed; a file gets its name when it is whole."""
    record = os.path.join(folder, "copied.json")
    try:
        with open(record, encoding="utf-8") as stream:
            copied = json.load(stream)
    except (OSError, ValueError):
        copied = {}
    keys = {name: [store.ukey(file), store.size(file)] for name, file in files.items()}
    wanted = [
        name for name, key in keys.items() if copied.get(name) != key or _size(os.path.join(folder, name)) != key[1]
    ]
    room, needed = shutil.disk_usage(folder).free, sum(keys[name][1] for name in wanted)
    if needed > room:
        raise DataError(f"{url}: {needed:,} bytes, but {folder} has room for {room:,}; set data.cache_folder")
    with tqdm(total=needed, unit="B", unit_scale=True, desc=f"copying {url}", disable=not wanted) as bar:
        for name in wanted:
            part = os.path.join(folder, f"{name}.part")
            with store.open(files[name], "rb") as source, open(part, "wb") as target:
                while data := source.read(_CHUNK):
                    target.write(data)
                    bar.update(len(data))
            if _size(part) != keys[name][1]:
                raise DataError(f"{url}: {name} came with {_size(part)} bytes of {keys[name][1]}")
            os.replace(part, os.path.join(folder, name))
            copied[name] = keys[name]
            with open(f"{record}.new", "w", encoding="utf-8") as stream:
                json.dump(copied, stream)
            os.replace(f"{record}.new", record)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1
