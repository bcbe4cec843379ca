"""Whatever befalls a file of a checkpoint is found before its weights are used, and the checkpoint before is taken.

Truth: the weights that were in the model when each checkpoint was written.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.save import save
from megatron_mm.config.section import changed
from megatron_mm.platform import setup
from tests.fixtures import archive
from tests.pipeline import toy
from tests.support.checkpoints import plain_tensors


class Saved:
    """Two checkpoints of one process, and a model to load them into."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "t.json").write_text('{"kind": "bytes"}\n')
        self.case = toy.Case()
        setup.initialize(toy.sizes_of("DP1"), seed=5)
        self.pipeline, self.optimizer, config = toy.build(self.case)
        self.config = changed(config, {"data.tokenizer": str(root / "t.json")})
        self.weights: dict[int, list[torch.Tensor]] = {}
        for iteration in (1, 2):
            self.step(iteration)
            position = checkpoint.Position(iteration, 16 * iteration)
            save(self.config, root, self.pipeline, self.optimizer, position)
            self.weights[iteration] = self.now()
        self.whole = root.with_name("whole")
        shutil.copytree(root, self.whole)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        toy.run_batch(self.pipeline, toy.microbatches_of(self.case, number, toy.sizes_of("DP1")))
        self.optimizer.step(self.optimizer.gradient_norm(), 16)

    def now(self) -> list[torch.Tensor]:
        return [weight.parameter.detach().clone() for weight in checkpoint.weights_of(self.pipeline)]

    @property
    def last(self) -> Path:
        return self.root / "iter_0000002"

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.whole, self.root)

    def resumed(self) -> tuple[int, str]:
        """Which iteration a run goes on from, and what it says of the other."""
        with torch.no_grad():
            for weight in checkpoint.weights_of(self.pipeline):
                weight.parameter.fill_(7.0)
        passed_over: dict[Path, str] = {}
        while True:  # as the loop does
            folder = checkpoint.find(self.root, passed_over)
            assert folder is not None
            try:
                position = checkpoint.load(folder, self.pipeline, self.optimizer)
                break
            except DamagedError as error:
                passed_over[folder] = str(error)
        for found, wanted in zip(self.now(), self.weights[position.iteration], strict=True):
            assert torch.equal(found, wanted)
        assert position.consumed_samples == 16 * position.iteration
        return position.iteration, "; ".join(passed_over.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Iterator[Saved]:
    root = tmp_path_factory.mktemp("saved") / "root"
    root.mkdir()
    yield Saved(root)
    setup.shutdown()


FILES = ("manifest.json", "pieces_00000.json", "pieces_00000.safetensors", "config.yaml", "byte_tokenizer.json")


def taken_instead(saved: Saved, caplog, *named: str) -> None:
    """The damage in the last checkpoint is found, its file named, and the one before is loaded."""
    caplog.clear()
    iteration, problem = saved.resumed()
    said = problem + caplog.text
    assert iteration == 1, said
    assert all(name in said for name in named) and "\n\n" not in problem, said
    assert "Traceback" not in said


def test_all_files_are_known(saved, caplog):
    assert sorted(path.name for path in saved.last.iterdir()) == sorted(FILES)
    assert saved.resumed()[0] == 2 and not caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(name, saved, caplog):
    dice = random.Random(name)
    content = (saved.last / name).read_bytes()
    places = [0, len(content) - 1, *(dice.randrange(len(content)) for _ in range(14))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        (saved.last / name).write_bytes(damaged)
        taken_instead(saved, caplog, name)
    (saved.last / name).write_bytes(content)
    assert saved.resumed()[0] == 2


def test_a_flipped_bit_in_the_name_of_the_seal_is_found(saved, caplog):
    """Without its checksum a manifest would be one of those of before, which had none."""
    path = saved.last / "manifest.json"
    content = path.read_bytes()
    at = content.rindex(b'"checksum"')
    path.write_bytes(content[: at + 1] + b"b" + content[at + 2 :])
    taken_instead(saved, caplog, "manifest.json")
    path.write_bytes(content)


def _cut(path: Path, before: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path, before: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _zeros(path: Path, before: Path) -> None:
    content = bytearray(path.read_bytes())
    begin = len(content) // 2 // 4096 * 4096
    count = len(content[begin : begin + 4096])
    content[begin : begin + 4096] = bytes(count)
    path.write_bytes(content)


def _swapped(path: Path, before: Path) -> None:
    shutil.copyfile(before, path)


def _missing(path: Path, before: Path) -> None:
    path.unlink()


def _empty(path: Path, before: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _longer, _zeros, _swapped, _missing, _empty], ids=lambda act: act.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_what_was_written_is_found(name, damage, saved, caplog):
    before = saved.root / "iter_0000001" / name
    path = saved.last / name
    same = damage is _swapped and before.read_bytes() == path.read_bytes()
    damage(path, before)
    try:
        if same:
            assert saved.resumed()[0] == 2, "settings and tokenizer of both are the same"
        elif damage is _missing and name == "manifest.json":
            taken_instead(saved, caplog, "manifest.json")
        elif damage is _swapped and name == "manifest.json":
            taken_instead(saved, caplog, "pieces_00000")
        else:
            taken_instead(saved, caplog, name)
    finally:
        saved.restore()


def test_files_that_nobody_wrote_are_not_read(saved, caplog, tmp_path):
    """Another process's, in a checkpoint of one; a list of the format of before; notes of the user's."""
    for name in ("pieces_00000.safetensors", "pieces_00000.json"):
        shutil.copyfile(saved.last / name, saved.last / name.replace("00000", "00001"))
    for name in (".metadata", "common.pt", "notes.txt", "metadata.json"):
        (saved.last / name).write_bytes(b"something else")
    assert saved.resumed()[0] == 2 and not caplog.text
    saved.restore()


MANIFESTS = {
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"3",
    "nothing": b"null",
    "deep": b"[" * 200_000,
    "a huge number": b'{"iteration": ' + b"9" * 5000 + b', "files": {"a": 1}}',
    "not text": bytes(range(256)),
    "files as a list": b'{"iteration": 2, "files": ["pieces_00000.safetensors"]}',
    "files as a number": b'{"iteration": 2, "files": 3}',
    "sizes as text": b'{"iteration": 2, "files": {"config.yaml": "3"}}',
    "a negative size": b'{"iteration": 2, "files": {"config.yaml": -1}}',
    "iteration as text": b'{"iteration": "2", "files": {"config.yaml": 3}}',
    "a negative iteration": b'{"iteration": -2, "files": {"config.yaml": 3}}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_what_is_no_manifest_is_passed_over(content, saved, caplog):
    (saved.last / "manifest.json").write_bytes(content)
    taken_instead(saved, caplog, "iter_0000002")
    saved.restore()


def test_nothing_whole_is_an_error_that_names_all(saved):
    for number in (1, 2):
        (saved.root / f"iter_000000{number}" / "config.yaml").write_text("x")
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*iter_0000002/config\.yaml.*iter_0000001/config"):
        saved.resumed()
    saved.restore()


# ------------------------------------------------------------------------------------------------ the format of before


@pytest.fixture(scope="module")
def of_before(tmp_path_factory) -> Path:
    folder = archive.unpack(archive.BEFORE / "vlm-tiny.tar.gz", tmp_path_factory.mktemp("before"))
    return folder / "checkpoint" / "iter_0000002"


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as raised:
        read()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_damage_in_the_small_files_of_before_is_one_line(name, of_before, tmp_path):
    """They had no checksums: a flip is found where it makes a difference to what the file says, or its archive."""
    folder = shutil.copytree(of_before, tmp_path / "iter_0000002")
    content = (folder / name).read_bytes()
    whole = plain_tensors(folder) if name == ".metadata" else CheckpointReader(folder).common
    dice = random.Random(1)
    found = 0
    for number in range(60):
        damaged = bytearray(content)
        place = (0, len(content) - 1)[number] if number < 2 else dice.randrange(len(content))
        damaged[place] ^= 1 << dice.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            now = plain_tensors(folder) if name == ".metadata" else CheckpointReader(folder).common
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            found += 1
        else:
            assert all(np.array_equal(now[key], whole[key]) for key in now.keys() & whole.keys()), "a value has changed"
    assert found > 20
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:cut])
        assert name in refused(lambda: plain_tensors(folder))
        assert name in (checkpoint_folder.verify(folder) or "")


@pytest.mark.slow
def test_damage_in_the_pieces_of_before_is_found_by_the_archives(of_before, tmp_path):
    folder = shutil.copytree(of_before, tmp_path / "iter_0000002")
    whole = plain_tensors(folder)
    dice = random.Random(2)
    for path in sorted(folder.glob("*.distcp")):
        content, found = path.read_bytes(), 0
        for _ in range(12):
            damaged = bytearray(content)
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            try:
                now = plain_tensors(folder)
            except ValueError as error:
                assert path.name in str(error) and "\n" not in str(error)
                found += 1
            else:
                assert all(torch.equal(now[key], whole[key]) for key in whole), "a weight has changed"
        assert found
        path.write_bytes(content)


def test_a_missing_file_of_before_is_named(of_before, tmp_path):
    folder = shutil.copytree(of_before, tmp_path / "iter_0000002")
    (folder / "__0_1.distcp").unlink()
    assert "__0_1.distcp is missing" in refused(lambda: plain_tensors(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "checksum" not in manifest and "__0_1.distcp is missing" in (checkpoint_folder.verify(folder) or "")
