"""Local copies of checkpoints on several nodes: what is lost and what is not, down to a bit.

Each process is a node with a folder of its own. Truth is the state that was saved, or the shared checkpoint of it.
"""

import shutil
from pathlib import Path

import pytest

from tests.support.nodes import run_on_nodes

pytestmark = pytest.mark.slow


def act(name: str, root: Path, nodes: list[int]) -> list[str]:
    """Runs a function of the program on nodes; what each said on standard error."""
    words = ["-m", "tests.checkpoints.local_program", name, str(root / "shared"), "{local}"]
    ended = run_on_nodes(words, [root / f"node{number}" for number in nodes], OMP_NUM_THREADS="1")
    assert all(process.returncode == 0 for process in ended), "\n".join(process.stderr[-3000:] for process in ended)
    return [process.stderr for process in ended]


def test_a_lost_node_and_a_flipped_bit_cost_nothing_and_two_flipped_bits_the_set(tmp_path):
    said = act("save_and_lose", tmp_path, [0, 1, 2])
    assert "local copies of iteration 4 are not used: no node has the file of rank 2" in said[0]


def test_a_set_of_three_nodes_is_read_by_two_in_another_layout(tmp_path):
    act("save_for_others", tmp_path, [0, 1, 2])
    shutil.rmtree(tmp_path / "node1")
    act("load_elsewhere", tmp_path, [2, 0])


def test_only_the_blocks_that_a_process_needs_and_does_not_see_are_sent(tmp_path):
    act("large_files", tmp_path, [0, 1, 2])
