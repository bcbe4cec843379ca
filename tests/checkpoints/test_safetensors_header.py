"""Heads of safetensors files. Truth: the safetensors package, which reads them with data behind."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from megatron_mm.checkpoints.safetensors_header import DTYPE_NAMES, header
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder


def test_the_package_reads_what_lies_behind_a_header():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b[1:2]": torch.tensor(7, dtype=torch.uint8), "c": torch.empty(0)}
    head = header({name: (DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()})
    assert len(head) % 64 == 0
    found = load(head + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_types_have_the_names_of_the_package(dtype):
    assert f'"dtype":"{DTYPE_NAMES[dtype]}"'.encode() in save({"a": torch.zeros(8, dtype=dtype)})


def test_weights_of_8_bits_are_not_imported_without_their_scales(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(8, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match="F8_E4M3"):
        SafetensorsFolder(tmp_path)
