"""The head of a safetensors file, written before its data.

The safetensors package writes a whole dictionary of tensors from memory; checkpoints and exports write files whose
tensors come one after another. The format is eight bytes of length, JSON of names, types, shapes and offsets, raw data.
"""

from __future__ import annotations

import json
import struct

import torch

#: Types by their names in the format.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """The head of a safetensors file.

    Args:
        tensors: name → (type as safetensors calls it, shape, bytes), in the order of the data.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text
