"""The promise that the layout never changes the result, as a measurement.

Each layout trains the same recipe for the same steps from the same seed in processes of its own; the loss of every step
and the gradient of every parameter at every step are compared with one process. A parameter's gradient is
gathered whole, by its checkpoint key, so that every layout's can be compared.

A layout is written as in `TP2·CP2·PP2+SP`: sizes joined by `x` or `·` (VPP as `PP4xVPP2`), then flags: SP, distopt
(distributed optimizer), full or selective (recomputation), a2a (context parallel by exchange of heads), reduce
(overlapped gradient reduction), gather (overlapped gather of weights, after distopt and reduce), no-p2p (interleaved
stages that do not send while they compute).
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_mm.config.performance import PerformanceConfig
from megatron_mm.config.schema import Config, ParallelConfig
from megatron_mm.platform import own_code

DEFAULT_LAYOUTS = (
    "TP2",
    "TP2+SP",
    "PP2",
    "PP4",
    "PP4xVPP2",
    "CP2",
    "DP2",
    "DP2+distopt",
    "TP2xCP2xPP2+SP",
    "TP2xPP2xDP2+SP+distopt+full+reduce+gather",
)
#: Bounds of DESIGN's promise in fp32: loss per step, gradient per parameter, and the floor of the latter.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, GRADIENT_FLOOR = 1e-5, 1e-4, 1e-6

_SIZES = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size", "CP": "context_parallel_size"}
_SIZES["VPP"] = "virtual_pipeline_model_parallel_size"
_FLAGS = {
    "SP": ("parallel", "sequence_parallel", True),
    "distopt": ("parallel", "use_distributed_optimizer", True),
    "full": ("parallel", "recompute_granularity", "full"),
    "selective": ("parallel", "recompute_granularity", "selective"),
    "a2a": ("parallel", "cp_comm_type", "a2a"),
    "reduce": ("performance", "overlap_grad_reduce", True),
    "gather": ("performance", "overlap_param_gather", True),
    "no-p2p": ("performance", "overlap_p2p_comm", False),
}


@dataclass(frozen=True)
class Layout:
    """One layout: fields of `parallel` and the number of data-parallel processes."""

    name: str
    parallel: dict
    data_parallel: int
    performance: dict = field(default_factory=dict)
    """Fields of `performance`."""

    @property
    def world_size(self) -> int:
        """Processes that it needs."""
        sizes = [self.parallel.get(_SIZES[key], 1) for key in ("TP", "PP", "CP")]
        return sizes[0] * sizes[1] * sizes[2] * self.data_parallel


def parse_layout(name: str) -> Layout:
    """Reads a layout.

    Raises:
        ValueError: a part that is no size or flag.
    """
    parallel: dict = {}
    data_parallel = 1
    sizes, *flags = re.split(r"\s*\+\s*", name.strip())
    for part in re.split(r"[x·×]", sizes) if sizes else []:
        match = re.fullmatch(r"(VPP|TP|PP|CP|DP)(\d+)", part.strip())
        if not match:
            raise ValueError(f"layout {name!r}: {part!r} is not TP2, PP2, VPP2, CP2 or DP2")
        kind, size = match[1], int(match[2])
        if kind == "DP":
            data_parallel = size
        else:
            parallel[_SIZES[kind]] = size
    performance: dict = {}
    for flag in flags:
        if flag not in _FLAGS:
            raise ValueError(f"layout {name!r}: {flag!r} is not one of {', '.join(_FLAGS)}")
        section, key, value = _FLAGS[flag]
        {"parallel": parallel, "performance": performance}[section][key] = value
    return Layout(name, parallel, data_parallel, performance)


def for_layout(
    config: Config, layout: Layout, iterations: int, pool: int, global_batch: int, backend: str = "local"
) -> Config:
    """The recipe in a layout, in fp32, with the same pool of samples in every microbatch.

    Args:
        pool: samples of a microbatch over all data-parallel processes; micro_batch_size is its share.
        backend: of the layers. Transformer Engine's attention to packed documents has no fp32 before 2.11.

    Raises:
        ValueError: the pool does not divide over the layout's data parallelism.
    """
    if pool % layout.data_parallel:
        raise ValueError(f"layout {layout.name}: a pool of {pool} samples does not divide by DP{layout.data_parallel}")
    # Of the recipe's own layout nothing is left but how keys of other processes are met.
    comm = config.parallel.cp_comm_type
    comm = "all_gather" if comm == "p2p" else comm  # which the local backend does not have
    parallel = {"cp_comm_type": comm, **layout.parallel}
    performance = dict(layout.performance)
    if performance.get("overlap_grad_reduce"):
        performance["ddp_bucket_size"] = 10_000  # several buckets in the smallest model
    # Whatever ever learns is compared.
    groups = [replace(group, frozen_iters=min(0, group.frozen_iters)) for group in config.optimizer.groups]
    return replace(
        config,
        parallel=ParallelConfig(**parallel),
        performance=PerformanceConfig(**performance),
        training=replace(
            config.training,
            precision="fp32",
            train_iters=iterations,
            micro_batch_size=pool // layout.data_parallel,
            global_batch_size=global_batch,
        ),
        model=replace(
            config.model, hidden_dropout=0.0, attention_dropout=0.0, backend=backend, attention_backend="auto"
        ),
        optimizer=replace(config.optimizer, lr_warmup_iters=0, lr_decay_iters=None, groups=groups),
    )


def measure(config: Config, output: Path) -> None:
    """Trains in this process's layout and leaves losses and gradients (rank 0) in `output`. Called under torchrun."""
    from megatron.core import parallel_state

    from megatron_mm.config.validate import check, parallel_sizes
    from megatron_mm.data.reading.generated import GeneratedRows
    from megatron_mm.data.reading.loader import MicrobatchLoader
    from megatron_mm.data.reading.order import TaskSchedule
    from megatron_mm.pipeline.schedule import run_batch
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.platform import setup
    from megatron_mm.training.optimizer import Optimizer

    sizes = parallel_sizes(config, setup.world_size())
    check(config, sizes)
    device = setup.initialize(sizes, config.training.seed)
    pipeline = Assembly.of(config, sizes, device.type).build(device, config.training.seed)
    optimizer = Optimizer(config, pipeline)
    training = config.training
    loader = MicrobatchLoader(
        GeneratedRows(config),
        0,
        training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        sizes.dp,
        training.global_batch_size,
        pipeline.fields(),
        tasks=TaskSchedule(config.model.inputs.tasks, training.seed),
    )
    losses, norms, gradients = [], [], {}
    for iteration in range(training.train_iters):
        microbatches = [next(loader) for _ in range(loader.num_microbatches)]
        optimizer.zero_grad()
        result = run_batch(pipeline, microbatches)
        norm = optimizer.gradient_norm()
        losses.append(result.total)
        norms.append(norm)
        for key, value in _whole_gradients(pipeline, config.parallel.use_distributed_optimizer).items():
            gradients[f"{iteration}/{key}"] = value
        optimizer.step(norm, training.global_batch_size)
    if setup.rank() == 0:
        torch.save({"losses": losses, "norms": norms, "gradients": gradients}, output)
    setup.shutdown()


def _whole_gradients(pipeline, distributed_optimizer: bool) -> dict[str, torch.Tensor]:
    """Whole gradient of every trainable parameter, by checkpoint key, on rank 0 (empty elsewhere). Collective."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    if distributed_optimizer:  # the reduced gradient is whole only over the shards of all data-parallel processes
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for chunk in pipeline.chunks:
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    shards = bucket.grad_data.chunk(group.size())
                    for rank, shard in enumerate(shards):
                        dist.broadcast(shard, src=dist.get_global_rank(group, rank), group=group)
    entries = {}
    for name, entry in pipeline.sharded_state_dict().items():
        parameter = getattr(entry, "data", None)
        if isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad:
            entries[name] = make_sharded_optimizer_tensor(entry, parameter.main_grad.clone(), "gradient")
    apply_factories(entries)
    pieces = [
        (piece.key, piece.global_shape, piece.global_offset, piece.data)
        for piece in nested_values(entries)
        if isinstance(piece, ShardedTensor) and not any(piece.replica_id)
    ]
    everyone: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, everyone)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for pieces in everyone or () for piece in pieces):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape))] = data
    return whole


@dataclass(frozen=True)
class Comparison:
    """A layout against one process."""

    layout: str
    processes: int
    loss: float
    """Largest relative difference of the loss of any step."""
    gradient: float
    """Largest ‖Δg‖ / max(‖g‖, floor · global norm) of any parameter, over all steps."""
    parameter: str
    """Whose gradient that is."""
    error: str | None = None
    notes: tuple[str, ...] = ()
    """What the layout does not divide in this model; it is repeated instead."""

    @property
    def passed(self) -> bool:
        """Both within DESIGN's bounds."""
        return self.error is None and self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def compare(layout: Layout, measured: dict, reference: dict) -> Comparison:
    """Measures differences; a parameter that only one side has counts as infinite.

    A parameter's gradients of all steps count as one vector: the gradient of a scalar, such as a gate, passes through
    zero between steps, and there a relative difference would measure rounding alone.
    """
    pairs = zip(measured["losses"], reference["losses"], strict=True)
    loss = max(abs(a - b) / abs(b) if math.isfinite(a) else float("inf") for a, b in pairs)
    squares: dict[str, list[float]] = {}
    for key in sorted(measured["gradients"].keys() | reference["gradients"].keys()):
        a, b = measured["gradients"].get(key), reference["gradients"].get(key)
        total = squares.setdefault(key.partition("/")[2], [0.0, 0.0])
        if a is None or b is None or a.shape != b.shape or not torch.isfinite(a).all():
            total[0] = float("inf")
        else:
            total[0] += float((a - b).double().square().sum())
            total[1] += float(b.double().square().sum())
    floor = GRADIENT_FLOOR**2 * sum(norm**2 for norm in reference["norms"])
    worst, where = 0.0, ""
    for name, (difference, size) in squares.items():
        relative = math.sqrt(difference / max(size, floor)) if math.isfinite(difference) else float("inf")
        if relative > worst:
            worst, where = relative, name.removeprefix("gradient.")
    return Comparison(layout.name, layout.world_size, loss, worst, where)


def notes(config: Config, layout: Layout) -> tuple[str, ...]:
    """What a layout does not divide in a recipe's model.

    Args:
        config: from `for_layout`.
    """
    from megatron_mm.config.validate import parallel_sizes

    return tuple(config.model.notes(parallel_sizes(config, layout.world_size)))


def launch(config: Config, layout: Layout, threads: int = 1, environment: dict[str, str] | None = None) -> dict:
    """Runs `measure` for a layout under torchrun and returns what it left.

    Args:
        environment: more variables.

    Raises:
        ValueError: the run failed; the end of its output is quoted.
    """
    from megatron_mm.config.load import dump_config

    with tempfile.TemporaryDirectory() as folder:
        recipe, output = Path(folder, "config.yaml"), Path(folder, "measured.pt")
        dump_config(config, recipe)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(layout.world_size)]
        command += ["--standalone", "--no-python", sys.executable, "-m", "megatron_mm.checks.layouts"]
        variables = own_code.environment(OMP_NUM_THREADS=str(threads), TORCH_CPP_LOG_LEVEL="ERROR")
        variables |= environment or {}
        done = subprocess.run(
            [*command, str(recipe), str(output)], capture_output=True, encoding="utf-8", env=variables, check=False
        )
        if done.returncode or not output.exists():
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()][:5]
            raise ValueError(f"layout {layout.name} did not run: " + " | ".join(lines or done.stderr.splitlines()[-5:]))
        return torch.load(output, weights_only=True)


def to_json(comparisons: list[Comparison]) -> list[dict]:
    """The table, for a file of figures."""
    return [{**comparison.__dict__, "passed": comparison.passed} for comparison in comparisons]


def _main() -> None:
    from megatron_mm.config.load import load_config
    from megatron_mm.platform import setup

    setup.apply_platform()
    with setup.reporting_errors():
        measure(load_config(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    _main()
