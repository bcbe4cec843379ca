"""Local copies of checkpoints on several nodes: what is lost and what is not, down to a bit.

Each process is a node with a folder of its own. Truth is the state that was saved, or the shared checkpoint of it.
"""

import shutil
from pathlib import Path

import pytest

from megatron_mm.checkpoints import save
from megatron_mm.checkpoints.local import LocalCopies
from megatron_mm.checkpoints.nodes import Nodes
from megatron_mm.checkpoints.save import Saver
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.config.validate import check
from megatron_mm.planner import dry_run
from megatron_mm.planner.assembly import Assembly
from megatron_mm.planner.memory import checkpoint_bytes
from megatron_mm.platform import setup
from megatron_mm.training import identity
from tests.support.nodes import run_on_nodes
from tests.support.recipes import small_config


def test_each_file_is_kept_on_its_node_and_on_the_next_also_where_nodes_differ_in_size():
    members = ((0, 1), (2, 3, 4), (5,))
    nodes = [Nodes(members, rank) for rank in range(6)]
    assert [nodes[0].receiver(rank) for rank in range(6)] == [2, 3, 5, 5, 5, 0]
    assert [node.senders() for node in nodes] == [[5], [], [0], [1], [], [2, 3, 4]]
    assert [nodes[0].kept(number) for number in range(3)] == [[0, 1, 5], [2, 3, 4, 0, 1], [5, 2, 3, 4]]
    assert [node.is_keeper for node in nodes] == [True, False, True, False, False, True]
    assert Nodes(((0, 1),), 1).receiver(1) is None and not Nodes(((0, 1),), 1).senders()


def test_the_folder_is_a_nodes_own_matter_and_whether_there_is_one_is_not():
    config = small_config()
    one, other = (changed(config, {"checkpoint.local_folder": name}) for name in ("/one", "/other"))
    assert identity.facts(one) == identity.facts(other) != identity.facts(config)


def test_without_background_writing_it_is_refused(tmp_path, monkeypatch):
    from tests.pipeline import toy

    config = changed(small_config(), {"checkpoint.local_folder": str(tmp_path), "checkpoint.async_save": False})
    with pytest.raises(ValueError, match=r"checkpoint\.local_folder needs checkpoint\.async_save"):
        check(config, ParallelSizes())
    setup.initialize(ParallelSizes(), seed=1)
    pipeline, optimizer, config = toy.build(toy.Case())
    copies = LocalCopies.of(changed(config, {"checkpoint.local_folder": str(tmp_path)}), tmp_path / "run")
    assert "it is one node, and a lost node loses them" in copies.describe()
    assert copies.newest() is None and not list(copies.root.iterdir()), "nothing is left of the meeting"
    ((line, enough),) = copies.room(2**30)
    assert enough and line.startswith("local copies: node 0 needs 2.00 GiB for 2 sets in ")
    assert not copies.room(2**60)[0][1]
    monkeypatch.setattr(save, "_SHARE_OF_FREE_MEMORY", 0.0)
    with pytest.raises(ValueError, match=r"checkpoint\.local_folder: local copies are written in the background, for"):
        Saver(config, tmp_path, True, copies).prepare(pipeline, optimizer)


def test_a_dry_run_says_what_a_process_needs():
    """Two files, of two sets each: of a checkpoint that four processes write, as much as the whole of it."""
    config = small_config()
    assembly = Assembly.of(config, ParallelSizes())
    whole = checkpoint_bytes(assembly.graph, assembly.plan, assembly.settings.dtype)
    assert dry_run._local_copies(config, 4).startswith(f"local copies: {whole / 2**30:,.2f} GiB for each process")


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    setup.initialize(ParallelSizes(), seed=1)
    (tmp_path / "file").touch()
    config = changed(small_config(), {"checkpoint.local_folder": str(tmp_path / "file")})
    with pytest.raises(ValueError, match=r"checkpoint\.local_folder .*file/run-\w+: rank 0 cannot use it: Not a dir"):
        LocalCopies.of(config, tmp_path / "run" / "checkpoints")


def act(name: str, root: Path, nodes: list[int]) -> list[str]:
    """Runs a function of the program on nodes; what each said on standard error."""
    words = ["-m", "tests.checkpoints.local_program", name, str(root / "shared"), "{local}"]
    ended = run_on_nodes(words, [root / f"node{number}" for number in nodes], OMP_NUM_THREADS="1")
    assert all(process.returncode == 0 for process in ended), "\n".join(process.stderr[-3000:] for process in ended)
    return [process.stderr for process in ended]


@pytest.mark.slow
def test_a_lost_node_and_a_flipped_bit_cost_nothing_and_two_flipped_bits_the_set(tmp_path):
    said = act("save_and_lose", tmp_path, [0, 1, 2])
    assert "local copies of iteration 4 are not used: no node has the file of rank 2" in said[0]


@pytest.mark.slow
def test_a_set_of_three_nodes_is_read_by_two_in_another_layout(tmp_path):
    act("save_for_others", tmp_path, [0, 1, 2])
    shutil.rmtree(tmp_path / "node1")
    act("load_elsewhere", tmp_path, [2, 0])


@pytest.mark.slow
def test_only_the_blocks_that_a_process_needs_and_does_not_see_are_sent(tmp_path):
    act("large_files", tmp_path, [0, 1, 2])
