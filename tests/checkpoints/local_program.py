"""What each process of test_local.py does: saves local copies of the toy system, loses some, and loads what is left."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.checkpoints import checkpoint, save
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.block_file import BLOCK
from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.image import Image, pieces_file
from megatron_mm.checkpoints.local import LocalCopies, LocalSet
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.save import SaveError, Saver
from megatron_mm.checkpoints.scattered import ScatteredSource
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.config.section import changed
from megatron_mm.platform import setup
from tests.pipeline import toy


def flip(path: Path, byte: int) -> None:
    """Changes a bit of a file."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 4]))


class Node:
    """This process, alone on its node, with a toy system that has been trained for a step."""

    def __init__(self, root: Path, local: Path, layout: str) -> None:
        setup.initialize(toy.sizes_of(layout), seed=5)
        self.case = toy.Case(layout, pool=4, global_batch=8)
        self.pipeline, self.optimizer, config = toy.build(self.case)
        settings = {"local_folder": str(local), "save": str(root), "local_interval": 2}
        self.config = changed(config, {f"checkpoint.{name}": value for name, value in settings.items()})
        self.rank, self.root = dist.get_rank(), root
        self.copies = self.meet()

    def meet(self) -> LocalCopies:
        """As a new start does."""
        copies = LocalCopies.of(self.config, self.root)
        assert copies is not None
        return copies

    def step(self, number: int) -> None:
        """Trains, so that optimizer state and weights are others."""
        self.optimizer.zero_grad()
        toy.run_batch(self.pipeline, toy.microbatches_of(self.case, number, toy.sizes_of(self.case.layout)))
        self.optimizer.step(self.optimizer.gradient_norm(), self.case.global_batch)

    def saver(self) -> Saver:
        """One whose writer runs."""
        saver = Saver(self.config, self.root, True, self.copies)
        assert not saver.prepare(self.pipeline, self.optimizer)
        return saver

    def state(self) -> dict[tuple, torch.Tensor]:
        """All that a checkpoint holds of this process, by key and place: moments come in no certain order."""
        self.pipeline.wait_for_weights()
        weights = checkpoint.weights_of(self.pipeline)
        slots = [*(slot for weight in weights for slot in weight.slots()), *self.optimizer.slots(weights)]
        return {(slot.key, slot.offsets): slot.tensor.detach().clone() for slot in slots}

    def loaded(self, found: Path | LocalSet | None) -> dict[tuple, torch.Tensor]:
        """State of a newly built system after loading."""
        assert found is not None
        self.pipeline, self.optimizer, _ = toy.build(self.case)
        checkpoint.load(found, self.pipeline, self.optimizer)
        return self.state()


def same(one: dict[tuple, torch.Tensor], other: dict[tuple, torch.Tensor]) -> bool:
    """Whether all are the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save_and_lose(root: Path, local: Path) -> None:
    """Three nodes: each loss in turn, from a whole set to one that cannot be used."""
    node = Node(root, local, "PP3")
    copies, rank = node.copies, node.rank
    assert copies.nodes.members == ((0,), (1,), (2,)) and copies.nodes.senders() == [(rank - 1) % 3]
    node.step(0)
    saver = node.saver()
    assert not saver.local_is_due(1) and saver.local_is_due(2)
    saver.begin(node.pipeline, node.optimizer, Position(2, 16), locally=True)
    assert not saver.local_is_due(9), "one is under way"
    assert saver.wait() == copies.root / "iter_0000002"
    node.step(1)
    kept = node.state()
    saver.begin(node.pipeline, node.optimizer, Position(4, 32), locally=True)
    folder = saver.wait()
    assert [path.name for path in copies.root.iterdir()] == ["iter_0000004"], "the set before is removed"
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {pieces_file(rank), pieces_file((rank - 1) % 3)}
    saver.close()

    found = copies.newest()
    assert found.iteration == 4 and found.holders == ((0, 1), (1, 2), (0, 2))
    assert same(node.loaded(found), kept)
    dist.barrier()
    if rank == 0:  # a lost node
        shutil.rmtree(local)
    dist.barrier()
    copies = node.copies = node.meet()
    found = copies.newest()
    assert found.holders == ((1,), (1, 2), (2,))
    assert same(node.loaded(found), kept), "what node 0 lost is sent to it"
    dist.barrier()
    if rank == 1:  # a flipped bit where there is another copy
        flip(folder / pieces_file(1), (folder / pieces_file(1)).stat().st_size - 5)
    dist.barrier()
    try:
        node.loaded(copies.newest())
        raise AssertionError("the flipped bit was not seen")
    except DamagedError as error:
        assert pieces_file(1) in str(error) and "damaged between bytes" in str(error), error
    found = copies.newest()
    assert found.holders == ((1,), (2,), (2,))
    assert same(node.loaded(found), kept), "the neighbour's copy is used"
    dist.barrier()
    if rank == 2:  # and where there is none
        flip(folder / pieces_file(2), 100)
    dist.barrier()
    try:
        node.loaded(found)
        raise AssertionError("the flipped bit was not seen")
    except DamagedError:
        pass
    assert copies.newest() is None
    assert [line.endswith("iter_0000004.abandoned: the run goes on from iteration 3")
            for line in copies.set_aside_later(3)] == ([True, True] if rank == 0 else [])  # fmt: skip


def save_for_others(root: Path, local: Path) -> None:
    """Three nodes leave a set, and a shared checkpoint of the same iteration and state."""
    node = Node(root, local, "PP3")
    node.step(0)
    saver = node.saver()
    saver.begin(node.pipeline, node.optimizer, Position(4, 32))
    assert saver.wait() == root / "iter_0000004"
    saver.begin(node.pipeline, node.optimizer, Position(4, 32), locally=True)
    assert saver.wait()
    # A disk that is full for one node's copies alone: everyone hears of it, and the set before stays.
    if node.rank == 1:
        node.copies.lacks_space = lambda sizes: "no room"
    try:
        saver.begin(node.pipeline, node.optimizer, Position(6, 48), locally=True)
        raise AssertionError("there was no room")
    except SaveError as error:
        assert "iter_0000006 was not written: no room" in str(error)
    assert [path.name for path in node.copies.root.iterdir()] == ["iter_0000004"]
    saver.close()


def load_elsewhere(root: Path, local: Path) -> None:
    """Two nodes in another layout: the set of three is what the shared checkpoint of the same state is."""
    node = Node(root, local, "DP2+distopt")
    found, shared = node.copies.newest(), root / "iter_0000004"
    assert found.iteration == 4 and found.holders == ((1,), (0,), (0, 1))
    assert same(node.loaded(found), node.loaded(shared))
    assert checkpoint.find(root, {}, found) == shared, "of the same iteration, the shared one"
    assert checkpoint.find(root / "nothing", {}, found) is found


def large_files(root: Path, local: Path) -> None:
    """Files of several messages and blocks; a node without files takes only what it needs from both others."""
    node = Node(root, local, "PP3")
    shape = (3, 5 * BLOCK // 4 + 7)
    row = torch.arange(shape[1], dtype=torch.float32)[None] + node.rank
    image = Image([Slot("w", shape, (node.rank, 0), row)])
    saver = node.saver()
    # As Saver.begin, with another image.
    save.image_of = lambda pipeline, optimizer: image
    begin = checkpoint_folder.begin
    if node.rank == 1:  # what it receives cannot be written; the sender is not left waiting
        checkpoint_folder.begin = lambda *words: _with_obstacle(begin(*words), pieces_file(0))
    saver.begin(node.pipeline, node.optimizer, Position(1, 0), locally=True)
    try:
        saver.wait()
        raise AssertionError("nothing was in the way")
    except SaveError as error:
        assert "iter_0000001 was not written: FileExistsError" in str(error), error
    checkpoint_folder.begin = begin
    saver.begin(node.pipeline, node.optimizer, Position(2, 0), locally=True)
    saver.wait()
    saver.close()
    dist.barrier()
    if node.rank == 0:
        shutil.rmtree(local)
    dist.barrier()
    node.copies = node.meet()
    found = node.copies.newest()
    reader = CheckpointReader(ScatteredSource(found))
    sent = [0]
    receive = dist.recv
    dist.recv = lambda *words: (sent.__setitem__(0, sent[0] + 1), receive(*words))[1]
    # Rank 0 sees no file, wants all rows' last quarter; rank 1 all of its own; rank 2 everything.
    wanted = {0: ((0, 4 * BLOCK // 4 + 100), (3, 40)), 1: ((1, 0), (1, shape[1])), 2: ((0, 0), shape)}[node.rank]
    target = torch.zeros(wanted[1])
    reader.read_into([Slot("w", shape, wanted[0], target)])
    columns = torch.arange(wanted[0][1], wanted[0][1] + wanted[1][1], dtype=torch.float32)
    rows = torch.arange(wanted[0][0], wanted[0][0] + wanted[1][0], dtype=torch.float32)
    assert torch.equal(target, columns[None] + rows[:, None])
    assert sent[0] == {0: 3, 1: 0, 2: 6}[node.rank], sent


def _with_obstacle(part: Path, name: str) -> Path:
    (part / name).mkdir()
    return part


if __name__ == "__main__":
    act = globals()[sys.argv[1]]
    act(Path(sys.argv[2]), Path(sys.argv[3]))
    dist.barrier()
    setup.shutdown()
