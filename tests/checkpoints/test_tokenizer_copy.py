"""A checkpoint holds a copy of its tokenizer, under the name that the tokenizer's kind gives it."""

from pathlib import Path

import pytest

from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.save import save
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.conversion.convert import tokenizer_of
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training.optimizer import Optimizer
from tests.conversion.export_case import train_tokenizer
from tests.support.recipes import small_vlm


@pytest.fixture(scope="module")
def built():
    config, device = small_vlm(), setup.initialize(ParallelSizes(), seed=1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=1)
    return config, pipeline, Optimizer(config, pipeline)


def trained(path: Path) -> str:
    train_tokenizer(path)
    return "tokenizer.model"


def of_bytes(path: Path) -> str:
    path.write_text('{"kind": "bytes"}')
    return "byte_tokenizer.json"


def of_a_users_own_builder(path: Path) -> str:
    """Which alone reads it."""
    path.write_text("merges of my own")
    return "tokenizer.model"


@pytest.mark.slow
@pytest.mark.parametrize("make", [trained, of_bytes, of_a_users_own_builder])
def test_the_copy_is_found_by_its_kind(built, make, tmp_path):
    config, pipeline, optimizer = built
    name, config = make(tmp_path / "mine"), changed(config, {"data.tokenizer": str(tmp_path / "mine")})
    folder = save(config, tmp_path / "run", pipeline, optimizer, Position(1, 8))
    content = (tmp_path / "mine").read_bytes()
    (tmp_path / "mine").unlink()
    assert tokenizer_of(config, folder) == folder / name and (folder / name).read_bytes() == content
