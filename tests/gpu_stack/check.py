"""Models of all systems with Transformer Engine's layers against those of the local backend, entry by entry.

    python -m tests.gpu_stack.check [--systems synapse-70b …]

Each full recipe is built, as its script launches it, on the meta device for the first, the middle and the last rank of
its layout, once with each backend. Names, shapes, types, tensor- and sequence-parallel flags of all parameters, and
the sharded checkpoint entries, must be equal; Transformer Engine's `_extra_state` apart. Exit status 1 if one is not.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace

from tests.gpu_stack import stand_in

stand_in.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import tyro  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_mm.config.schema import Config  # noqa: E402
from megatron_mm.config.sizes import ParallelSizes  # noqa: E402
from megatron_mm.models.phases import LAST_PHASE  # noqa: E402
from megatron_mm.pipeline.schedule import pipeline_config  # noqa: E402
from megatron_mm.pipeline.stage import PipelineChunk  # noqa: E402
from megatron_mm.planner.assembly import Assembly  # noqa: E402
from megatron_mm.platform import cpu, setup  # noqa: E402
from tests.support.full_recipes import FULL, launched  # noqa: E402

#: What megatron-core reads of a parameter, and takes it for where it is not said.
_FLAGS = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "sequence_parallel": False,
    "allreduce": True,
    "shared": False,
}
_ENTRY = ("dtype", "local_shape", "global_shape", "global_offset", "axis_fragmentations", "replica_id")


@dataclass
class Arguments:
    """What to compare."""

    systems: tuple[str, ...] = FULL
    """Full recipes."""


def ranks(sizes: ParallelSizes) -> list[int]:
    """First, middle and last."""
    return sorted({0, sizes.world // 2, sizes.world - 1})


def entries(config: Config, sizes: ParallelSizes, rank: int, backend: str) -> dict[str, dict]:
    """What a rank's model holds, by checkpoint key: the entry, and the parameter's flags."""
    config = replace(config, model=replace(config.model, backend=backend))
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
    setup.initialize_groups(sizes, gloo=False)
    setup.seed_dropout(config.training.seed)
    design = Assembly.of(config, sizes, iteration=LAST_PHASE).design
    pipeline = pipeline_config(sizes, design.settings.dtype, batched_p2p=False)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found: dict[str, dict] = {}
    for virtual in range(sizes.vpp):
        with torch.device("meta"), stand_in.cuda_available():
            chunk = PipelineChunk(pipeline, design, virtual * sizes.pp + stage, seed=None)
        parameters = {
            f"{node.name}.{name}": parameter
            for node, module in zip(chunk.nodes, chunk.node_modules)
            for name, parameter in module.named_parameters()
        }
        for name, entry in chunk.sharded_state_dict().items():
            if name.endswith("_extra_state"):
                continue
            pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]  # SwiGLU's two halves
            parts = [part for part in nested_values(pieces) if isinstance(part, ShardedTensor)]
            for number, part in enumerate(parts):
                parameter = parameters.get(name)
                flags = {flag: getattr(parameter, flag, usual) for flag, usual in _FLAGS.items()}
                flags |= {
                    "trains": getattr(parameter, "requires_grad", None),
                    "shape": getattr(parameter, "shape", None),
                }
                key = f"{part.key} #{number} at {part.global_offset}"
                found[key] = {**{field: getattr(part, field) for field in _ENTRY}, **flags}
    setup.shutdown()
    return found


def compare(name: str, config: Config, sizes: ParallelSizes, rank: int) -> tuple[int, list[str]]:
    """Entries that were compared on a rank, and what differs."""
    local, fused = (entries(config, sizes, rank, backend) for backend in ("local", "transformer_engine"))
    where = f"{name}, rank {rank}"
    problems = [f"{where}: {key} is only in the local backend" for key in local.keys() - fused.keys()]
    problems += [f"{where}: {key} is only in Transformer Engine's" for key in fused.keys() - local.keys()]
    for key in local.keys() & fused.keys():
        for field in local[key].keys() | fused[key].keys():
            ours, theirs = local[key].get(field), fused[key].get(field)
            if ours != theirs:
                problems.append(f"{where}: {key}: {field} is {ours} locally, {theirs} with Transformer Engine")
    return len(local.keys() & fused.keys()), sorted(problems)


def main() -> int:
    """Compares and prints counts."""
    arguments = tyro.cli(Arguments, description=__doc__)
    failed, total = False, 0
    for name in arguments.systems:
        config, sizes = launched(name)
        cpu.set_device("meta")
        for rank in ranks(sizes):
            count, problems = compare(name, config, sizes, rank)
            total += count
            failed |= bool(problems) or not count
            print(
                f"{name:22} rank {rank:4} of {sizes.world}: {count:5} entries, {len(problems)} differences", flush=True
            )
            for problem in problems[:20]:
                print(f"    {problem}", flush=True)
            gc.collect()
        cpu.set_device("cpu")
    print(f"{total} entries compared: {'DIFFERENCES' if failed else 'all equal'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
