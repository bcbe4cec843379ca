"""A graph over several tensor-parallel processes against the same graph in one: loss, streams and gradients.

    differences("tests.models.vit_case:tensor_parallel_case", tmp_path)

starts torchrun on this file and runs the case here too. A case is a function of LayerSettings that returns (graph with
losses, microbatch). Gradients of sharded weights are put together from the processes; those of replicated weights must
be whole on every process, so each process's own is compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.platform import setup
from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, torch.Tensor]


def run_case(name: str, sizes: ParallelSizes) -> tuple[Figures, dict[str, tuple[int, int]]]:
    """Loss, streams and gradients on this process, and (dimension, stacked parts) of each sharded gradient."""
    from megatron.core import parallel_state

    from megatron_mm.models.graph import ForwardContext
    from megatron_mm.models.initialization import initialize_module

    setup.initialize(sizes, seed=1)
    rank = parallel_state.get_tensor_model_parallel_rank()
    module, function = name.split(":")
    graph, batch = getattr(import_module(module), function)(LayerSettings(sizes=sizes))
    context, streams, parameters = ForwardContext(batch), {}, {}
    for node in graph.nodes:
        built = node.build()
        initialize_module(built, node.name, 7, rank, sizes.tp)
        written = built(*[streams[stream] for stream in node.reads], context)
        written = written if isinstance(written, tuple) else (written,)
        streams |= {stream.name: value for stream, value in zip(node.writes, written, strict=True)}
        parameters |= {f"{node.name}.{key}": parameter for key, parameter in built.named_parameters()}
    loss = sum(term.compute(*[streams[stream] for stream in term.reads], context) for term in graph.losses)
    loss.backward()
    figures = {"loss": loss.detach()} | {f"stream {key}": value.detach() for key, value in streams.items()}
    figures |= {key: parameter.grad for key, parameter in parameters.items()}
    sharded = {
        key: (parameter.partition_dim, parameter.partition_stride)
        for key, parameter in parameters.items()
        if parameter.tensor_model_parallel
    }
    return figures, sharded


def differences(name: str, folder: Path, tp: int = 2) -> dict[str, float]:
    """For loss, every stream and every gradient: the largest difference, relative to the largest value."""
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"]
    command += ["-m", "tests.models.tensor_parallel", name, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(tp)]
    expected, _ = run_case(name, ParallelSizes())
    found: dict[str, float] = {}
    for key, value in expected.items():
        slices = [figures[key] for figures, _ in ranks]
        if key in ranks[0][1]:
            dim, parts = ranks[0][1][key]
            pieces = [piece.chunk(parts, dim=dim) for piece in slices]
            slices = [torch.cat([piece[part] for part in range(parts) for piece in pieces], dim=dim)]
        scale = max(float(value.abs().max()), 1e-3)
        found[key] = max(float((piece - value).abs().max()) for piece in slices) / scale
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = run_case(sys.argv[1], ParallelSizes(tp=int(os.environ["WORLD_SIZE"])))
    torch.save(results, Path(sys.argv[2]) / f"{os.environ['RANK']}.pt")
