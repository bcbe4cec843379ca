"""A run at any world size without the machines: every distinct pipeline stage, built and run once on the meta device.

Under a fake process group, as a rank of each stage in turn, the same chunks that would train are built on meta tensors
and take one microbatch forward and backward. What they hold and do is counted: parameters, what autograd keeps, FLOPs
(torch's counter), and the bytes of every collective (seen by a dispatch mode). Nothing reads a value, so nothing but
speed and numerics is left out.
"""

from __future__ import annotations

import gc
import resource
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.config.validate import check, parallel_sizes
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan, field_shapes
from megatron_mm.models.work import Attention, Collective, MatrixProduct, Moved, merged
from megatron_mm.pipeline.partition import bottleneck
from megatron_mm.planner.costs import chunk_work, node_times
from megatron_mm.planner.memory import checkpoint_bytes, microbatches_in_flight, optimizer_bytes
from megatron_mm.platform import cpu, setup
from megatron_mm.platform.atomic_files import write_figures

if TYPE_CHECKING:
    from megatron_mm.planner.assembly import Assembly


@dataclass(frozen=True)
class StageReport:
    """What one process of a pipeline stage holds and does; bytes and FLOPs are per process."""

    stage: int
    first_node: str
    last_node: str
    parameters: int
    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Kept for the backward pass, over the microbatches in flight under 1F1B, with received payloads."""
    host_bytes: int
    """Activations that wait in host memory instead (performance.cpu_offloading_num_layers)."""
    flops: float
    """One microbatch, forward and backward, with recomputation."""
    communicated: dict[str, int]
    """Bytes that one microbatch sends through each kind of collective, and gradients once a step."""
    seconds: float
    """Time the dry run took for this stage."""
    work: dict[str, list]
    """What its nodes and losses say that one microbatch gives a process, forward and backward, with recomputation and
    the first pass of losses over the whole batch: records by kind (models/work.py), and names of those that say
    nothing (`not_stated`). Unlike the other figures, it was not counted while running."""

    @property
    def memory_bytes(self) -> int:
        """Everything a process must hold."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class DryRun:
    """All stages of a layout."""

    sizes: ParallelSizes
    stages: list[StageReport]
    total_parameters: int
    slowest_over_mean: float
    """Of executed FLOPs, and of the first pass of losses over the whole batch."""
    bottleneck: str

    def to_json(self) -> dict:
        """The same figures as plain values."""
        stages = [{**asdict(stage), "memory_bytes": stage.memory_bytes} for stage in self.stages]
        return {**asdict(self), "stages": stages}


def dry_run(config: Config, world_size: int, report=lambda stage: None) -> DryRun:
    """Builds and runs every distinct stage of a recipe's layout.

    Args:
        world_size: processes of the run that is planned.
        report: called with each StageReport as it is done.

    Raises:
        ValueError: the configuration contradicts itself or does not fit the world size.
    """
    sizes = parallel_sizes(config, world_size)
    check(config, sizes)
    cpu.apply()
    cpu.set_device("meta")
    try:
        return _dry_run(config, sizes, report)
    finally:
        cpu.set_device("cpu")


def _dry_run(config: Config, sizes: ParallelSizes, report) -> DryRun:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mm.models.phases import LAST_PHASE
    from megatron_mm.planner.assembly import Assembly

    assembly = Assembly.of(config, sizes, iteration=LAST_PHASE)
    stages = []
    for stage in range(sizes.pp):
        if dist.is_initialized():
            dist.destroy_process_group()
        rank = stage * sizes.world // sizes.pp  # tensor, context and data parallel rank 0
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
        setup.initialize_groups(sizes, gloo=False)
        setup.seed_dropout(config.training.seed)
        stages.append(_run_stage(assembly, stage))
        report(stages[-1])
        gc.collect()
    setup.shutdown()
    graph, cuts, times = assembly.graph, assembly.cuts, assembly.times
    once = node_times(graph, assembly.plan, assembly.settings.recompute == "full")
    flops = [stage.flops for stage in stages]
    for chunk, (low, high) in enumerate(pairwise(cuts)):  # one microbatch did not run the whole batch's first pass
        flops[chunk % sizes.pp] += (sum(times[low:high]) - sum(once[low:high])) / (sizes.tp * sizes.cp)
    return DryRun(
        sizes=sizes,
        stages=stages,
        total_parameters=sum(node.cost(assembly.plan).parameters for node in graph.nodes),
        slowest_over_mean=max(flops) * len(flops) / sum(flops),
        bottleneck=bottleneck([node.name for node in graph.nodes], times, cuts),
    )


def meta_microbatch(config: Config, plan: MicrobatchPlan) -> Microbatch:
    """A microbatch of a plan on the meta device: shapes without values, every field of the system's format."""
    shapes = field_shapes(config.model.inputs, plan)
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    return Microbatch.of(plan, tensors)


def _stage_work(assembly: Assembly, stage: int) -> dict[str, list]:
    graph, sizes, cuts = assembly.graph, assembly.sizes, assembly.cuts
    records, silent = [], []
    for chunk in range(stage, sizes.chunks, sizes.pp):
        of_chunk, without = chunk_work(
            graph, *cuts[chunk : chunk + 2], assembly.plan, sizes, assembly.settings.recompute == "full",
            assembly.caches_streams,
        )  # fmt: skip
        records += of_chunk
        silent += without
    kinds = {"matrix_products": MatrixProduct, "attention": Attention, "moved": Moved, "collectives": Collective}
    whole = merged(records)
    work = {name: [asdict(one) for one in whole if isinstance(one, kind)] for name, kind in kinds.items()}
    for collective in work["collectives"]:
        del collective["runs"]  # it has become part of the count
    return {**work, "not_stated": silent}


def _run_stage(assembly: Assembly, stage: int) -> StageReport:
    from megatron_mm.pipeline.payload import PAYLOAD_WIDTH, payload_layout, payload_rows
    from megatron_mm.pipeline.schedule import pipeline_config
    from megatron_mm.pipeline.stage import PipelineChunk, Step, Terms

    began = time.perf_counter()
    config, sizes, plan, design = assembly.config, assembly.sizes, assembly.plan, assembly.design
    graph, cuts, dtype = design.graph, design.cuts, design.settings.dtype
    pipeline = pipeline_config(sizes, dtype, batched_p2p=False)
    layouts = [payload_layout(graph, cut, plan, sizes, dtype) for cut in cuts[1:-1]]
    rows = payload_rows(layouts) if layouts else 0
    batch = meta_microbatch(config, plan)
    parameters: dict[int, torch.nn.Parameter] = {}
    kept, on_host, executed = 0, 0, _Executed()
    in_flight = microbatches_in_flight(config, sizes, stage)
    for virtual in range(sizes.vpp):
        with torch.device("meta"):
            chunk = PipelineChunk(pipeline, design, virtual * sizes.pp + stage, seed=None)
        assembly.check(chunk)
        parameters.update({id(parameter): parameter for parameter in chunk.parameters()})
        chunk.begin_step(Step(graph, rows, 1, torch.ones(len(graph.losses), device="meta")))
        saved = _Saved({parameter.untyped_storage()._cdata for parameter in chunk.parameters()})
        with executed:
            if not chunk.pre_process:
                received = torch.empty(rows, 1, PAYLOAD_WIDTH, dtype=dtype, device="meta", requires_grad=True)
                chunk.set_input_tensor(received)
                saved.pack(received)
            with saved:
                output = chunk(batch)
                waiting = saved.held
                if isinstance(output, Terms):
                    output.total.backward()
                else:
                    output.backward(torch.empty_like(output))
        kept += waiting * (in_flight - 1) + saved.peak + chunk.bytes_too_small * in_flight  # hooks hide these
        on_host += chunk.bytes_on_host * in_flight
    payload = rows * PAYLOAD_WIDTH * dtype.itemsize
    if sizes.pp > 1:
        executed.communicated["send/receive (pipeline)"] += payload * 2 * sizes.vpp
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    if trainable and sizes.dp * sizes.cp > 1:
        executed.communicated["gradients, once a step (data parallel)"] += trainable * 4
    shards = sizes.dp * sizes.cp if config.parallel.use_distributed_optimizer else 1
    return StageReport(
        stage=stage,
        first_node=graph.nodes[cuts[stage]].name,
        last_node=graph.nodes[cuts[stage + (sizes.vpp - 1) * sizes.pp + 1] - 1].name,
        parameters=total,
        trainable_parameters=trainable,
        weight_bytes=total * dtype.itemsize,
        gradient_bytes=trainable * 4,
        optimizer_bytes=trainable * optimizer_bytes(dtype) // shards,
        activation_bytes=kept,
        host_bytes=on_host,
        flops=executed.flops,
        communicated=dict(executed.communicated),
        seconds=time.perf_counter() - began,
        work=_stage_work(assembly, stage),
    )


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd holds, weights aside: now (`held`) and at most (`peak`, with what recomputation holds)."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.held, self.peak = weights, 0, 0
        self._uses: dict[int, list] = {}
        super().__init__(self.pack, self._unpack)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a saved tensor once per storage, until its last use."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            use = self._uses.setdefault(storage._cdata, [0, storage])  # kept alive: its address must not be used again
            if not use[0]:
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
            use[0] += 1
        return tensor

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        use = self._uses.get(tensor.untyped_storage()._cdata)
        if use and use[0]:
            use[0] -= 1
            if not use[0]:
                self.held -= use[1].nbytes()
        return tensor


class _Executed(TorchDispatchMode):
    """FLOPs of the operators that run, by torch's formulas, and bytes that enter collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.communicated: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, name = function.name().partition("::")
        if namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            groups = [dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg)]
            if all(group.size() > 1 for group in groups):
                self.communicated[name.strip("_")] += max(sizes, default=0)
            return _communicate(function, args, kwargs)
        elif function.overloadpacket not in flop_registry:
            with self:
                decomposed = function.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        result = function(*args, **kwargs)
        if function.overloadpacket in flop_registry:
            self.flops += flop_registry[function.overloadpacket](*args, **kwargs, out_val=result)
        return result


def _communicate(function, args, kwargs):
    """Calls a collective with nothing in its tensors; the fake group sends nothing anyway.

    torch before 2.12 has no collectives for meta tensors, and those of torch return their results in their arguments.
    """

    def emptied(leaf):
        return torch.empty(0, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return function(*tree_map(emptied, args), **tree_map(emptied, kwargs))


def _is_group(value) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def table(result: DryRun) -> str:
    """The stages as lines, with totals."""
    gib = 2**30
    lines = [
        f"{'stage':>5} {'parameters':>14} {'weights':>8} {'grads':>7} {'optim':>7} {'activ.':>7} {'memory':>7} "
        f"{'TFLOP':>8}  nodes (GiB and TFLOP a microbatch, per process)"
    ]
    for s in result.stages:
        sizes = (s.weight_bytes, s.gradient_bytes, s.optimizer_bytes, s.activation_bytes, s.memory_bytes)
        weights, grads, optim, activ, memory = (f"{size / gib:7.2f}" for size in sizes)
        lines.append(
            f"{s.stage:5} {s.parameters:14,} {weights:>8} {grads} {optim} {activ} {memory} {s.flops / 1e12:8.2f}  "
            f"{s.first_node} … {s.last_node}"
        )
        sent = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in s.communicated.items())
        lines.append(f"      communicated a microbatch: {sent or 'nothing'}")
        if s.host_bytes:
            lines.append(f"      activations in host memory: {s.host_bytes / gib:,.2f} GiB")
    lines.append(f"{result.total_parameters / 1e9:.1f}B parameters in all ({result.total_parameters:,})")
    lines.append(f"slowest stage over the mean: {result.slowest_over_mean:.3f}; {result.bottleneck}")
    return "\n".join(lines)


def _local_copies(config: Config, world_size: int) -> str:
    """What local copies of checkpoints take, however many processes a node has."""
    from megatron_mm.models.phases import LAST_PHASE
    from megatron_mm.planner.assembly import Assembly

    assembly = Assembly.of(config, ParallelSizes(), iteration=LAST_PHASE)
    share = checkpoint_bytes(assembly.graph, assembly.plan, assembly.settings.dtype) / world_size
    return (
        f"local copies: {4 * share / 2**30:,.2f} GiB for each process of a node in checkpoint.local_folder (its file "
        "and a neighbour's, of the last set and the next)"
    )


def run_from_command_line(config: Config, output: str | None) -> None:
    """`pretrain_multimodal.py --dry-run`: prints the table, and writes its figures to `output`, if there is one.

    Layers are always the local backend's, because Transformer Engine's kernels cannot run on meta tensors.
    """
    if config.model.backend == "transformer_engine":
        config = changed(config, {"model.backend": "auto"})  # local here; contradicts no switch of Transformer Engine's
    began = time.perf_counter()
    world_size = config.parallel.world_size or setup.world_size()
    print(f"dry run of {config.parallel.pipeline_model_parallel_size} pipeline stages of {world_size} processes")
    result = dry_run(config, world_size, lambda stage: print(f"stage {stage.stage}: {stage.seconds:.1f} s", flush=True))
    print(table(result))
    if config.checkpoint.local_folder is not None:
        print(_local_copies(config, world_size))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"took {time.perf_counter() - began:.0f} s and {resident:.2f} GiB")
    write_figures(output, result.to_json())
