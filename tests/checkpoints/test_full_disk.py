"""What happens if rank 0 alone cannot write one of the small files: an error everywhere, and the next save works.

A folder in the place of a file makes writing it fail as a full disk does. Under torchrun, each save must end by
itself; a process left waiting in a collective would run into its time-out, and fail.
"""

import subprocess
import sys

import pytest

from megatron_mm.checkpoints.save import _free_space, _lacks_space
from tests.support.programs import TORCHRUN

SMALL_FILES = ("pieces_00000.safetensors", "pieces_00000.json", "config.yaml", "manifest.json")


def save_with_obstacles(root: str) -> None:
    """Run by each process: a save fails for each small file, then one works."""
    from pathlib import Path

    from megatron_mm.checkpoints import checkpoint
    from megatron_mm.checkpoints import folder as checkpoint_folder
    from megatron_mm.checkpoints.save import SaveError, save
    from megatron_mm.platform import setup
    from tests.pipeline import toy

    setup.initialize(toy.sizes_of("PP2"), seed=1)
    pipeline, optimizer, config = toy.build(toy.Case("PP2"))
    begin = checkpoint_folder.begin
    # A file for each process: in one stream their lines, and gloo's own, run into each other.
    report = (Path(root) / f"rank_{setup.rank()}.txt").open("w", encoding="utf-8")

    def begin_with(name: str):
        def blocked(root, iteration):
            part = begin(root, iteration)
            (part / name).mkdir()
            return part

        return blocked

    for name in SMALL_FILES:
        checkpoint_folder.begin = begin_with(name)
        try:
            save(config, Path(root), pipeline, optimizer, checkpoint.Position(1, 16))
            print(f"saved in spite of {name}", file=report)
        except SaveError as error:
            print(f"{name}: {error}", file=report)
    checkpoint_folder.begin = begin
    folder = save(config, Path(root), pipeline, optimizer, checkpoint.Position(2, 32))
    print(f"wrote {folder.name}", file=report)
    report.close()
    setup.shutdown()


@pytest.mark.slow
def test_every_process_hears_of_it(tmp_path):
    words = [*TORCHRUN, "2"]
    words += ["-m", "tests.checkpoints.test_full_disk", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        *failures, last = (tmp_path / f"rank_{rank}.txt").read_text(encoding="utf-8").splitlines()
        for name, line in zip(SMALL_FILES, failures, strict=True):
            assert line.startswith(f"{name}: ") and "iter_0000001 was not written: " in line, line
            assert "irectory" in line or "File exists" in line, line
        assert last == "wrote iter_0000002"
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


def test_a_checkpoint_that_will_not_fit_is_not_begun(tmp_path):
    """A twentieth more than its bytes is to be free, for file systems take some themselves."""
    assert _lacks_space(tmp_path, 100 << 20, 105 << 20) is None
    said = f"{tmp_path} has 104 MiB free and the checkpoint needs 100 MiB"
    assert _lacks_space(tmp_path, 100 << 20, 104 << 20) == said
    assert _free_space(tmp_path) > 0 and _free_space(tmp_path / "none") == 0


if __name__ == "__main__":
    save_with_obstacles(sys.argv[1])
