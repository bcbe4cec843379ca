"""Datasets in object stores: s3://, gs://, hf:// and whatever else fsspec knows, copied once into a local folder.

A shard is memory-mapped, so it has to be a local file; nothing but the first start of a machine waits for the copy.
fsspec's own cache of whole files keeps the copies and asks the store whether a file is still what it was. The processes
of a machine share them: the first copies, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil

from tqdm import tqdm

from megatron_mm.data.store.layout import SUFFIXES
from megatron_mm.media.errors import DataError

#: Of the files of a dataset. Others are not copied: by some names fsspec keeps notes of its own, which it unpickles.
_ENDINGS = (".bin", ".idx", ".crc", ".npy", ".json", ".jsonl")
#: Folder of the copies, unless `data.cache_folder` names another.
DEFAULT_CACHE = os.path.join("~", ".cache", "megatron_mm", "datasets")


def localize(path: str, cache: str | None = None) -> str:
    """The path of a dataset on this machine: of a copy, if it is a URL.

    Args:
        path: a folder, or the prefix of a text shard; local or a URL.
        cache: folder of the copies; None: `DEFAULT_CACHE`.

    Raises:
        DataError: the URL is a chain of several, the store cannot be reached, nothing is at the URL, or the disk is
            full; the URL is named.
    """
    if "://" not in path:
        return path
    if "::" in path:  # one of fsspec's kinds that read others runs templates that a file of the store holds
        raise DataError(f"{path}: a chain of stores (::); name the store itself, such as s3://bucket/folder")
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
            files = [file for file in store.ls(there, detail=False) if file.endswith(_ENDINGS) and store.isfile(file)]
        else:
            files = [there + suffix for suffix in SUFFIXES if store.exists(there + suffix)]
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


def _copy(store, files: list[str], folder: str, url: str) -> None:
    """Copies what is missing or was changed."""
    from fsspec.implementations.cached import WholeFileCacheFileSystem

    cache = WholeFileCacheFileSystem(
        fs=store, cache_storage=folder, check_files=True, same_names=True, expiry_time=0, skip_instance_cache=True
    )
    sizes = {file: store.size(file) for file in files}
    wanted = 0
    for file, size in sizes.items():
        copy = os.path.join(folder, os.path.basename(file))
        if not os.path.exists(copy) or os.path.getsize(copy) != size:  # never made, cut off, or changed in the store
            with contextlib.suppress(FileNotFoundError):
                os.remove(copy)
            wanted += size
    if wanted > (room := shutil.disk_usage(folder).free):
        raise DataError(f"{url}: {wanted:,} bytes, but {folder} has room for {room:,}; set data.cache_folder")
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=f"copying {url}", disable=not wanted) as bar:
        for file, size in sizes.items():
            cache.open(file).close()  # copies it, unless it is here and the same
            bar.update(size)
