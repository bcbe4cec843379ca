"""One step of a test's own graph in one process and in other layouts, through the pipeline that trains.

    one = step("tests.objectives.cases:pairs", "DP1", pool=8)
    found = steps_in_processes([("tests.objectives.cases:pairs", "DP4", 8)], tmp_path)

A case is a function of LayerSettings that returns (graph, microbatch), where `microbatch(numbers)` gives the rows of
global sample numbers. A step's figures are each loss, and every gradient whole, by checkpoint key.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from tests.support.programs import TORCHRUN

ROOT = Path(__file__).resolve().parents[2]
SEED = 7


def step(case: str, layout: str, pool: int, samples: int = 8, seed: int = SEED) -> dict:
    """Runs forward and backward once in this process's layout.

    Args:
        pool: samples of a microbatch over all data-parallel processes.
        samples: of the global batch.
    """
    from megatron.core import parallel_state

    from megatron_mm.checks.layouts import _whole_gradients, parse_layout
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.models.layers.settings import LayerSettings
    from megatron_mm.pipeline.design import PipelineDesign
    from megatron_mm.pipeline.partition import balance
    from megatron_mm.pipeline.schedule import build_pipeline, run_batch
    from megatron_mm.platform import setup

    parsed = parse_layout(layout)
    tp, pp, cp = (
        parsed.parallel.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context")
    )
    sequence_parallel = parsed.parallel.get("sequence_parallel", False)
    sizes = ParallelSizes(tp, pp, 1, cp, parsed.data_parallel, sequence_parallel)
    device = setup.initialize(sizes, seed=1)
    module, function = case.split(":")
    settings = LayerSettings(sizes, recompute=parsed.parallel.get("recompute_granularity", "none"))
    graph, microbatch = getattr(import_module(module), function)(settings)
    cuts = balance([1.0] * len(graph.nodes), sizes.chunks)
    pipeline = build_pipeline(PipelineDesign(graph, cuts, settings), device, seed)
    rows, rank = pool // sizes.dp, parallel_state.get_data_parallel_rank()
    first = [start + rank * rows for start in range(0, samples, pool)]
    result = run_batch(pipeline, [microbatch(list(range(at, at + rows))) for at in first])
    return {"losses": result.losses, "gradients": _whole_gradients(pipeline, distributed_optimizer=False)}


def steps_in_processes(runs: list[tuple[str, str, int]], folder: Path, processes: int = 4) -> list[dict]:
    """Each (case, layout, pool), one after the other, under one torchrun."""
    output = folder / "steps.pt"
    words = [*TORCHRUN, str(processes)]
    words += ["-m", "tests.support.graph_layouts", json.dumps(runs), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=True)


def largest_difference(found: dict, expected: dict) -> float:
    """Of losses and gradients, relative to the largest value of each."""
    assert found["losses"].keys() == expected["losses"].keys()
    assert found["gradients"].keys() == expected["gradients"].keys()
    differences = [abs(found["losses"][name] - value) / abs(value) for name, value in expected["losses"].items()]
    for name, value in expected["gradients"].items():
        scale = max(float(value.abs().max()), 1e-6)
        differences.append(float((found["gradients"][name] - value).abs().max()) / scale)
    return max(differences)


def _main() -> None:
    from megatron_mm.platform import setup

    results = [step(*run) for run in json.loads(sys.argv[1])]
    if setup.rank() == 0:
        torch.save(results, sys.argv[2])
    setup.shutdown()


if __name__ == "__main__":
    _main()
