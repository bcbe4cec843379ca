"""Pieces that processes write, and regions that are read of them.

Truth: the tensors themselves, and safetensors' own reader of a file.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.block_file import BLOCK
from megatron_mm.checkpoints.image import Image
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.safetensors_header import DTYPES
from megatron_mm.checkpoints.slots import Slot
from tests.support.checkpoints import by_safetensors_alone, plain_tensors, sample_tensors, split, write_sample

TENSORS = sample_tensors()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: torch compares no tensors of eight-bit floating point."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same tensors, written by one to five processes."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [write_sample(root, processes, processes, TENSORS) for processes in (1, 2, 3, 5)]


def test_the_sample_has_every_type_and_is_longer_than_blocks(folders):
    assert {tensor.dtype for tensor in TENSORS.values()} == set(DTYPES.values())
    assert (folders[0] / "pieces_00000.safetensors").stat().st_size > 4 * BLOCK


def test_whole_tensors_are_what_was_written(folders):
    for folder in folders:
        assert checkpoint_folder.verify(folder, everything=True) is None
        found = plain_tensors(folder)
        assert found.keys() == TENSORS.keys()
        assert all(same(found[key], tensor) for key, tensor in TENSORS.items())


def test_random_regions_are_what_was_written(folders):
    dice = random.Random(5)
    for folder in folders:
        reader = CheckpointReader(folder)
        slots, wanted = [], []
        for key, tensor in TENSORS.items():
            for _ in range(4):
                at = [dice.randint(0, size) for size in tensor.shape]
                sizes = [dice.randint(0, size - begin) for size, begin in zip(tensor.shape, at)]
                part = tensor[tuple(slice(a, a + s) for a, s in zip(at, sizes))]
                wanted.append(part)
                slots.append(Slot(key, tuple(tensor.shape), tuple(at), torch.empty(part.shape, dtype=part.dtype)))
        order = list(range(len(slots)))
        dice.shuffle(order)
        reader.read_into(slots[number] for number in order)
        for slot, part in zip(slots, wanted):
            assert same(slot.tensor, part), slot.region


def test_what_is_read_is_converted_and_may_be_a_view(folders):
    """Of another type than is stored, in memory that is not in one piece."""
    tensor = TENSORS["text.embedding.weight"]
    memory = torch.zeros(3000, 800, dtype=torch.bfloat16)
    view = memory.t()[50:750]
    CheckpointReader(folders[2]).read_into([Slot("text.embedding.weight", tuple(tensor.shape), (0, 0), view)])
    assert torch.equal(memory[:, 50:750], tensor.t().to(torch.bfloat16))
    assert not memory[:, :50].any() and not memory[:, 750:].any()


def test_a_stranger_reads_a_file_by_safetensors_alone(folders):
    found = by_safetensors_alone(folders[2])
    assert found.keys() == TENSORS.keys()
    assert all(same(found[key], tensor) for key, tensor in TENSORS.items())


def test_what_a_checkpoint_lacks_is_named(folders):
    reader = CheckpointReader(folders[0])
    with pytest.raises(ValueError, match=r"holds no layers\.7\.bias"):
        reader.read("layers.7.bias")
    with pytest.raises(ValueError, match=r"layers\.0\.bias is \(7,\), where \(8,\) is needed"):
        reader.read_into([Slot("layers.0.bias", (8,), (0,), torch.empty(8))])


def test_pieces_that_are_not_whole_get_no_name(tmp_path):
    for number, (held, said) in enumerate(
        [
            (split({"a": torch.ones(4, 4)}, 2)[:1], "do not make up a tensor"),
            ([[Slot("a", (2,), (0,), torch.ones(2))], [Slot("a", (3,), (2,), torch.ones(1))]], "before"),
            ([[Slot("a", (2,), (0,), torch.ones(2))], [Slot("a", (2,), (1,), torch.ones(1))]], "do not make up"),
        ]
    ):
        part = checkpoint_folder.begin(tmp_path, number)
        for process, slots in enumerate(held):
            Image(slots).write(part, process)
        with pytest.raises(ValueError, match=said):
            checkpoint_folder.finish(part, {"iteration": number})
    assert not checkpoint_folder.checkpoints(tmp_path)


def test_a_file_of_another_process_is_damage(tmp_path):
    folder = write_sample(tmp_path, tensors={"a": torch.arange(300.0)})
    first, second = folder / "pieces_00000.safetensors", folder / "pieces_00001.safetensors"
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedError, match=r"pieces_00000\.safetensors"):
        plain_tensors(folder)


def test_an_image_in_memory_is_the_file(tmp_path):
    for number, slots in enumerate(split(TENSORS, 3)):
        image = Image(slots)
        memory = memoryview(bytearray(image.size))
        image.copy_to(memory)
        image.write(tmp_path, number)
        assert memory == (tmp_path / f"pieces_{number:05d}.safetensors").read_bytes()
        index = json.loads((tmp_path / f"pieces_{number:05d}.json").read_text())
        assert index["bytes"] == image.size and len(index["checksums"]) == -(-image.size // BLOCK)
