"""A tensor-parallel group reads once: the others' datasets are never touched, and they get the same microbatches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import TORCHRUN

STEPS = 3


def read_shared(root: str) -> None:
    """Run by each of four processes (tensor parallel 2 × data parallel 2): what it received, written to a file."""
    from megatron.core import parallel_state

    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.data.reading.dataset import build_datasets
    from megatron_mm.data.reading.loader import MicrobatchLoader
    from megatron_mm.media.errors import DataError
    from megatron_mm.platform import setup
    from megatron_mm.training.shared_reading import SharedLoader
    from tests.support.corpus import corpus_config

    setup.initialize(ParallelSizes(tp=2, dp=2), seed=1)
    config = corpus_config(Path(root, "discs"), Path(root, "t.model"), Path(root))
    train, reads = build_datasets(config).train, []
    microbatch = train.microbatch

    def counted(index, *arguments):
        reads.append(list(index))
        if len(reads) > STEPS:
            raise DataError("record 7 of discs is damaged")
        return microbatch(index, *arguments)

    train.microbatch = counted
    place = (2, parallel_state.get_data_parallel_rank(), 2, 8)  # rows, rank, ranks, rows of a step
    wanted = MicrobatchLoader(build_datasets(config).train, 0, *place, config.model.inputs.fields)
    shared = SharedLoader(lambda: MicrobatchLoader(train, 0, *place, config.model.inputs.fields), 2)
    same = []
    for _ in range(STEPS):
        ours, theirs = next(shared), next(wanted)
        values = [(getattr(ours, name), value) for name, value in vars(theirs).items()]
        same.append(all(a.equal(b) if hasattr(b, "equal") else a == b for a, b in values))
    try:
        next(shared)
        error = ""
    except DataError as found:
        error = str(found)
    shared.close()
    rank = parallel_state.get_tensor_model_parallel_rank()
    told = {"tp": rank, "same": same, "reads": len(reads), "error": error}
    Path(root, f"told_{setup.rank()}.json").write_text(json.dumps(told))
    setup.shutdown()


@pytest.mark.slow
def test_the_first_process_reads_for_all(tmp_path):
    from tests.support.corpus import build_corpus

    build_corpus(tmp_path)
    words = [*TORCHRUN, "4"]
    words += ["-m", "tests.training.test_shared_reading", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(path.read_text()) for path in tmp_path.glob("told_*.json")]
    assert len(told) == 4 and all(one["same"] == [True] * STEPS for one in told)
    assert all("record 7 of discs is damaged" in one["error"] for one in told)
    assert sorted((one["tp"], one["reads"]) for one in told) == [(0, 4), (0, 4), (1, 0), (1, 0)]


if __name__ == "__main__":
    read_shared(sys.argv[1])
