"""Reading the pickles of torch's checkpoints without running anything that they name.

A pickle is a program that calls what it names. Here a name stands for a record, which keeps what it was called with and
does nothing; only tuples, dictionaries and types of numbers are what they say. Opcodes that could call or change more,
or take memory by a number alone, are refused. torch's own reader for weights calls about a hundred functions.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

#: What the records of a checkpoint of tensors are of.
_NAMED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.metadata", "ShardMetadata"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.storage", "UntypedStorage"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
#: Types of storages, which name those of their numbers.
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
#: Opcodes of what else calls, or takes memory by a number in the file alone.
_REFUSED = [
    code[0]
    for code in (
        pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.BYTEARRAY8,
        pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    )
]  # fmt: skip


class Record:
    """What a pickle says of an object: the name of its class or maker, what that was called with, and its state."""

    name = ""
    arguments: tuple
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        """Takes what `__new__` has kept."""

    def __repr__(self) -> str:
        return f"a record of {self.name}"


class _Records(pickle._Unpickler):  # the one written in Python: that in C takes memory by a number in the file
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) in _NAMED or (module == "torch" and name in STORAGES):
            return self._classes.setdefault(name, type(name, (Record,), {"name": name}))
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype | torch.memory_format):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors does")

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as torch names it: ("storage", record's class, key, device, how many numbers)."""
        return pid

    def _set_state(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-1]).__name__}, which is no record")
        self.stack[-1].state = state

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has an instruction that no checkpoint of tensors needs")

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _set_state, **dict.fromkeys(_REFUSED, _refuse)}


def load_records(content: bytes) -> Any:
    """The value of a pickle, with a `Record` in the place of each object.

    Raises:
        Exception: of any kind, where it is damaged or names what no checkpoint of tensors does.
    """
    return _Records(content).load()
