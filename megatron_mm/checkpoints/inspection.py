"""What a checkpoint holds and whether it is whole, told without running or trusting anything of it.

Settings are read as plain YAML, names are printed without control characters, and every file is the folder's own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints import torch_dist
from megatron_mm.checkpoints.folder import MANIFEST
from megatron_mm.checkpoints.own_files import DamagedError, open_own
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.config.documents import load_yaml
from megatron_mm.data.tokens.tokenizer import tokenizer_kinds

_SIZES = {
    "TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size", "CP": "context_parallel_size",
}  # fmt: skip


def printable(text: object, longest: int = 200) -> str:
    """A name or setting from a file, without control characters, which a terminal would obey."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def find(path: Path) -> list[Path]:
    """Checkpoints at a path: itself, those of a folder of them, or those of a run's output folder; oldest first.

    Raises:
        ValueError: there is none.
    """
    if _is_checkpoint(path):
        return [path]
    found = checkpoint_folder.checkpoints(path) or checkpoint_folder.checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(
            f"{path} holds no checkpoint; give one (…/checkpoints/iter_0000100), a folder of them, or the output "
            "folder of a run"
        )
    return found


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, torch_dist.METADATA))


def unfinished(path: Path) -> list[Path]:
    """Folders of checkpoints whose writing did not come to its end, beside those of `find`."""
    if _is_checkpoint(path):
        return []
    return [part for root in (path, path / "checkpoints") for part in sorted(root.glob("iter_*.part")) if part.is_dir()]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    files: tuple[str, ...]
    """That holds each of its pieces."""

    @property
    def state(self) -> str | None:
        """Of an optimizer's entry what it is ("exp_avg"); None: a weight."""
        prefix, _, rest = self.key.partition(".")
        return rest.partition(".")[0] if prefix == "optimizer" else None

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        pieces = dict(sorted(Counter(self.files).items()))
        return {
            "key": self.key, "shape": list(self.shape), "dtype": self.dtype, "bytes": self.bytes, "pieces": pieces,
        }  # fmt: skip


class Inspection:
    """A checkpoint.

    Args:
        folder: of one.

    Raises:
        ValueError: it cannot be read; names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest, self.of_before = {}, torch_dist.is_one(folder)
        if (folder / MANIFEST).exists():
            manifest = checkpoint_folder.recorded(folder)
        reader = CheckpointReader(folder)
        self.said = {**reader.common, **manifest}
        self.settings = _settings(folder)
        self.tensors = [
            Tensor(
                key, stored.shape, str(stored.dtype).removeprefix("torch."),
                math.prod(stored.shape) * stored.dtype.itemsize, tuple(reader.files_of(key)),
            )
            for key, stored in sorted(reader.tensors.items())
        ]  # fmt: skip

    @property
    def files(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        found = (path for path in sorted(self.folder.iterdir()) if path.is_file() and not path.is_symlink())
        return {path.name: path.stat().st_size for path in found}

    def tokenizer(self) -> dict[str, str] | None:
        """Name and kind of the tokenizer's file."""
        for kind in tokenizer_kinds():
            if kind.file_name in self.files:
                return {"file": kind.file_name, "kind": kind.kind}
        return None

    def layout(self) -> dict[str, int | bool]:
        """Sizes of parallelism that its settings say, and processes that wrote it, where its manifest says them."""
        parallel = self.settings.get("parallel", {})
        sizes = {name: parallel.get(field) or 1 for name, field in _SIZES.items()}
        sizes = {name: size if type(size) is int and size > 0 else 1 for name, size in sizes.items()}
        found: dict[str, int | bool] = dict(sizes)
        own = sizes["TP"] * sizes["PP"] * sizes["CP"]
        processes = self.said.get("processes")
        if type(processes) is int:
            found["processes"] = processes
            if processes % own == 0:
                found["DP"] = processes // own
        found["distributed_optimizer"] = parallel.get("use_distributed_optimizer") is True
        return found

    def recipe(self) -> dict[str, Any]:
        """System, precision and parameters."""
        weights = [tensor for tensor in self.tensors if tensor.state is None]
        return {
            "system": _said(self.settings, "model", "system"),
            "precision": _said(self.settings, "training", "precision"),
            "parameters": sum(math.prod(tensor.shape) for tensor in weights),
        }

    def states(self) -> dict[str, list[Tensor]]:
        """Optimizer state, by what it is."""
        found: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            if tensor.state is not None:
                found.setdefault(tensor.state, []).append(tensor)
        return found

    def figures(self, optimizer: bool, pattern: str | None) -> dict[str, Any]:
        """For JSON.

        Args:
            optimizer: list its entries too.
            pattern: of the keys that are listed; None: all.
        """
        counts = {
            name: self.said.get(name) for name in ("iteration", "consumed_samples", "optimizer_step", "seconds")
        }  # fmt: skip
        return {
            "path": str(self.folder),
            "format": "torch_dist" if self.of_before else "pieces",
            **{name: count if type(count) in (int, float) else None for name, count in counts.items()},
            "recipe": self.recipe(),
            "tokenizer": self.tokenizer(),
            "layout": self.layout(),
            "files": self.files,
            "bytes": sum(self.files.values()),
            "weights": [tensor.figures() for tensor in self.listed(None, pattern)],
            "optimizer": {
                state: {
                    "entries": len(tensors),
                    "values": sum(math.prod(tensor.shape) for tensor in tensors),
                    "bytes": sum(tensor.bytes for tensor in tensors),
                    **({"listed": [t.figures() for t in self.listed(state, pattern)]} if optimizer else {}),
                }
                for state, tensors in self.states().items()
            },
        }

    def listed(self, state: str | None, pattern: str | None) -> list[Tensor]:
        """Weights (None) or entries of a state whose keys match."""
        return [t for t in self.tensors if t.state == state and (pattern is None or fnmatchcase(t.key, pattern))]


def _settings(folder: Path) -> dict[str, dict]:
    """Sections of config.yaml, as plain YAML; none where it cannot be read, which `damage` says."""
    path = folder / "config.yaml"
    try:
        open_own(path).close()
        tree = load_yaml(path)
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in tree.items() if isinstance(v, dict)} if isinstance(tree, dict) else {}


def _said(settings: dict[str, dict], section: str, field: str) -> str | None:
    value = settings.get(section, {}).get(field)
    return printable(value) if isinstance(value, str) else None


def bytes_of_pieces(folder: Path) -> int:
    """How many bytes `damage` reads."""
    found = [path for pattern in ("pieces_*.safetensors", "*.distcp") for path in folder.glob(pattern)]
    return sum(path.stat().st_size for path in found if path.is_file())


def damage(folder: Path, everything: bool, read: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """Everything that is wrong with a checkpoint, a sentence each.

    Args:
        everything: read all of it, not sizes, indices and small files alone.
        read: told how many bytes of pieces have been read since it was called last.
    """
    found = False
    for _, problem in checkpoint_folder.problems(folder, everything, read):
        found = True
        yield problem
    try:
        reader = CheckpointReader(folder)
    except (OSError, ValueError) as error:
        if not found:  # which is what was told, otherwise
            yield str(error)
        return
    if everything and torch_dist.is_one(folder):
        yield from _damage_of_before(reader, read)


def _damage_of_before(reader: CheckpointReader, read: Callable[[int], object]) -> Iterator[str]:
    wheres = [where for stored in reader.tensors.values() for _, where in stored.pieces]
    for where in sorted(wheres, key=lambda where: where[1:3]):
        try:
            torch_dist.read_piece(where)
        except DamagedError as error:
            yield str(error)
        read(where[3])
