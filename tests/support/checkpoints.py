"""What checkpoints hold."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.image import Image
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.regions import rectangles, slices
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.config.load import dump_config
from tests.support.recipes import small_config


def plain_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by key."""
    reader = CheckpointReader(folder)
    return {key: reader.read(key) for key in reader.tensors}


def sample_tensors() -> dict[str, torch.Tensor]:
    """Weights and optimizer state of every type and of 0 to 4 dimensions, some longer than a block."""
    dice = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice)

    return {
        "text.embedding.weight": normal(700, 3000),  # 8.4 MB
        "layers.0.bias": normal(7).to(torch.bfloat16),
        "layers.0.weight": normal(3, 5, 2, 4).to(torch.float64),
        "layers.0.scale": normal(1).reshape(()),
        "layers.0.none": normal(0, 3),
        "layers.0.half": normal(11, 3).to(torch.float16),
        "layers.0.eight": normal(9, 6).to(torch.float8_e4m3fn),
        "layers.0.other_eight": normal(5).to(torch.float8_e5m2),
        "layers.0.mask": normal(13, 3) > 0,
        "layers.0.bytes": torch.arange(250, dtype=torch.uint8),
        "layers.0.signed": torch.arange(-9, 9, dtype=torch.int8).reshape(2, 9),
        "layers.0.short": torch.arange(5_000_000, dtype=torch.int32).to(torch.int16).reshape(1000, 5000),  # 10 MB
        "optimizer.step.layers.0.weight": torch.arange(120, dtype=torch.int64).reshape(3, 5, 2, 4) - 7,
        "optimizer.exp_avg.layers.0.weight": torch.arange(120, dtype=torch.int32).reshape(3, 5, 2, 4),
    }


def split(tensors: dict[str, torch.Tensor], processes: int, seed: int = 0) -> list[list[Slot]]:
    """Tensors cut at random elements, so that each process holds a stretch of the flattened values of each."""
    dice = random.Random(seed)
    held: list[list[Slot]] = [[] for _ in range(processes)]
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            held[dice.randrange(processes)].append(Slot(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor))
            continue
        cuts = [0, *sorted(dice.randint(0, tensor.numel()) for _ in range(processes - 1)), tensor.numel()]
        for own, begin, end in zip(held, cuts, cuts[1:]):
            for region in rectangles(tuple(tensor.shape), begin, end):
                part = tensor[slices(region, ((0,) * tensor.dim(), tuple(tensor.shape)))]
                own.append(Slot(key, tuple(tensor.shape), region[0], part))
    return held


def write_sample(
    root: Path, iteration: int = 1, processes: int = 3, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """A checkpoint as so many processes write it."""
    part = checkpoint_folder.begin(root, iteration)
    held = split(sample_tensors() if tensors is None else tensors, processes, seed=iteration)
    for number, slots in enumerate(held):
        Image(slots).write(part, number)
    dump_config(small_config(), part / "config.yaml")
    (part / "byte_tokenizer.json").write_text('{"kind": "bytes"}\n')
    facts = {"iteration": iteration, "consumed_samples": 8 * iteration, "optimizer_step": iteration, "seconds": 0.5}
    return checkpoint_folder.finish(part, {**facts, "processes": processes})


def by_safetensors_alone(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by what docs/checkpoints.md says of the format."""
    whole: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("pieces_*.safetensors")):
        index = json.loads(file.with_suffix(".json").read_text())
        for name, piece in load_file(file).items():
            key, _, region = name.removesuffix("]").rpartition("[")
            place = tuple(slice(*map(int, part.split(":"))) for part in region.split(",") if part)
            shape = index["tensors"][key]["shape"]
            whole.setdefault(key, torch.empty(shape, dtype=piece.dtype))[place] = piece
    return whole
