"""One pass of a global batch through the pipeline: the chunks of this process under megatron-core's schedules.

`build_pipeline` cuts the graph and builds this process's chunks inside DDP. `run_batch` counts what normalises the
losses, sizes the payload, runs forward (and backward) over all microbatches, and returns each loss as every process
would report it. Losses over the whole global batch take a pass of their own before it (whole_batch.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import _fork_rng
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import Graph
from megatron_mm.objectives.measures import Measure
from megatron_mm.pipeline.design import PipelineDesign
from megatron_mm.pipeline.overlap import GradientReduction, WeightGathering
from megatron_mm.pipeline.payload import PAYLOAD_WIDTH, payload_layout, payload_rows
from megatron_mm.pipeline.stage import PipelineChunk, Step, Terms
from megatron_mm.pipeline.ties import Ties
from megatron_mm.pipeline.whole_batch import StreamCache, whole_batch_losses
from megatron_mm.platform import megatron_versions


@dataclass
class Pipeline:
    """The chunks of one process."""

    graph: Graph
    cuts: list[int]
    sizes: ParallelSizes
    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    device: torch.device
    ties: Ties
    dropout: bool
    """Whether forward passes draw random numbers."""
    gathering: WeightGathering | None
    """Brings updated weights to where the next forward pass needs them; None: the optimizer's step has."""

    @property
    def bare_chunks(self) -> list[PipelineChunk]:
        """The chunks without DDP."""
        return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.chunks]

    def fields(self) -> frozenset[str]:
        """Microbatch fields that this process reads."""
        return frozenset().union(*(self.graph.fields(chunk.start, chunk.stop) for chunk in self.bare_chunks))

    def weights_updated(self) -> None:
        """To be called after the optimizer's step: what follows from it for the weights of all processes."""
        if self.gathering is not None:
            self.gathering.begin()
            self.gathering.finish(self.ties.parameters())
        self.ties.copy_weights()

    def wait_for_weights(self) -> None:
        """To be called before anything but a forward pass reads weights. Collective over data parallelism."""
        if self.gathering is not None:
            self.gathering.finish()

    def sharded_state_dict(self) -> dict:
        """Checkpoint entries of this process's weights."""
        self.wait_for_weights()
        entries: dict = {}
        for chunk in self.bare_chunks:
            entries.update(chunk.sharded_state_dict())
        return entries


def pipeline_config(
    sizes: ParallelSizes, dtype: torch.dtype, batched_p2p: bool, overlap_p2p: bool = True
) -> TransformerConfig:
    """What megatron-core's schedules, DDP and optimizer ask of a model's configuration.

    Args:
        batched_p2p: send and receive in one NCCL batch; gloo takes messages one by one.
        overlap_p2p: in the interleaved schedule, where it takes the place of batches.
    """
    overlap_p2p = overlap_p2p and sizes.vpp > 1
    return TransformerConfig(
        num_layers=sizes.chunks,
        hidden_size=PAYLOAD_WIDTH,
        num_attention_heads=sizes.tp,  # the pipeline has no heads; megatron-core wants a multiple of TP
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        sequence_parallel=sizes.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        batch_p2p_comm=batched_p2p and not overlap_p2p,
        overlap_p2p_comm=overlap_p2p,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        perform_initialization=False,
        **megatron_versions.no_cuda_graphs(),
    )


def build_pipeline(design: PipelineDesign, device: torch.device, seed: int | None) -> Pipeline:
    """Builds this process's chunks, with initial weights, inside DDP.

    Args:
        seed: initial weights; None leaves them unset.
    """
    graph, cuts, settings = design.graph, design.cuts, design.settings
    sizes, performance = settings.sizes, settings.performance
    config = pipeline_config(sizes, settings.dtype, device.type == "cuda", performance.overlap_p2p_comm)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=design.distributed_optimizer,
        overlap_grad_reduce=performance.overlap_grad_reduce,
        overlap_param_gather=performance.overlap_param_gather,
        bucket_size=performance.ddp_bucket_size,
        average_in_collective=False,
    )
    numbers = [virtual * sizes.pp + stage for virtual in range(sizes.vpp)]
    chunks = []
    for number in numbers:
        chunk = PipelineChunk(config, design, number, seed)
        chunk = chunk.to(device) if device.type == "cuda" else chunk
        # Later chunks of the interleaved schedule end their backward pass before others do: one bucket each will do.
        chunks.append(DistributedDataParallel(config, ddp, chunk, disable_bucketing=number >= sizes.pp))
    ties = Ties(graph, cuts, [(n, chunk.module.node_modules) for n, chunk in zip(numbers, chunks)], sizes.pp)
    reduction = GradientReduction(chunks, ties.parameters()) if performance.overlap_grad_reduce else None
    gathering = WeightGathering(chunks) if performance.overlap_param_gather else None

    def finalize(*arguments, **options) -> None:
        ties.sum_gradients()  # whole gradients exist only now, so their reduction is not overlapped
        if reduction is not None:
            reduction.finish()
        finalize_model_grads(*arguments, **options)

    config.finalize_model_grads_func = finalize
    dropout = bool(settings.hidden_dropout or settings.attention_dropout)
    return Pipeline(graph, cuts, sizes, config, chunks, device, ties, dropout, gathering)


@dataclass(frozen=True)
class BatchResult:
    """What a global batch gave, the same on every process."""

    losses: dict[str, float]
    """Each loss, averaged over its global count; a loss that nothing in the batch counts for is left out."""
    total: float
    """The weighted sum that was differentiated."""
    counts: dict[str, float]


def run_batch(
    pipeline: Pipeline,
    microbatches: Sequence[Microbatch],
    forward_only: bool = False,
    measures: Mapping[str, Measure] | None = None,
) -> BatchResult:
    """Runs this process's microbatches of one global batch.

    Gradients are left in `main_grad`, reduced over data parallel and ready for the optimizer.

    Args:
        measures: by loss; take each microbatch that the loss applies to, on the last stage. For a forward pass alone.
    """
    graph, sizes, device = pipeline.graph, pipeline.sizes, pipeline.device
    counts = _counts(graph, microbatches, device)
    shared = whole_batch_losses(graph.losses, microbatches)
    cache = StreamCache(shared) if shared else None
    if shared and not forward_only:
        # With dropout every node must run, to draw what it will draw again.
        part = Graph(graph.nodes, shared) if pipeline.dropout else graph.leading_to(shared)
        with torch.no_grad(), _fork_rng():
            _pass(pipeline, part, microbatches, torch.ones(len(shared), device=device), cache, forward_only=True)
        _compute(pipeline, cache, microbatches, learn=True)
    divisors = counts.clamp(min=1).float()
    done = _pass(pipeline, graph, microbatches, divisors, cache, forward_only, measures)
    if shared and forward_only:
        _compute(pipeline, cache, microbatches, learn=False)
    sums = torch.zeros(len(graph.losses), dtype=torch.float64, device=device)
    if done:
        sums += torch.stack(done).double().sum(dim=0)
        for index, loss in enumerate(graph.losses):
            if loss in shared:
                sums[index] = cache.sums[loss.name].double()
            sums[index] *= 1.0 if loss.sharded else 1.0 / sizes.cp
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if sizes.pp > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    means = dict(zip((loss.name for loss in graph.losses), (sums / counts.clamp(min=1)).tolist()))
    counted = dict(zip(means, counts.tolist()))
    return BatchResult(
        losses={name: mean for name, mean in means.items() if counted[name] or mean},  # a NaN is never left out
        total=sum(loss.weight * means[loss.name] for loss in graph.losses),
        counts=counted,
    )


def _pass(
    pipeline: Pipeline,
    graph: Graph,
    microbatches: Sequence[Microbatch],
    divisors: torch.Tensor,
    cache: StreamCache | None,
    forward_only: bool,
    measures: Mapping[str, Measure] | None = None,
) -> list[torch.Tensor]:
    """All microbatches through the pipeline; on the last stage, each one's `Terms.sums`."""
    sizes, config = pipeline.sizes, pipeline.config
    layouts = [
        payload_layout(graph, cut, batch.plan, sizes, config.pipeline_dtype)
        for cut in pipeline.cuts[1:-1]
        for batch in microbatches
    ]
    rows = payload_rows(layouts)
    for chunk in pipeline.bare_chunks:
        chunk.begin_step(Step(graph, rows, len(microbatches), divisors, cache, measures or {}))

    def forward_step(iterator, chunk):
        return chunk(next(iterator).to(pipeline.device)), _loss_and_sums

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in pipeline.chunks],
        model=pipeline.chunks,
        num_microbatches=len(microbatches),
        seq_length=rows * sizes.cp * (sizes.tp if sizes.sequence_parallel else 1),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _compute(pipeline: Pipeline, cache: StreamCache, microbatches: Sequence[Microbatch], learn: bool) -> None:
    if pipeline.bare_chunks[-1].post_process:
        cache.compute(microbatches, pipeline.device, learn)


def _counts(graph: Graph, microbatches: Sequence[Microbatch], device: torch.device) -> torch.Tensor:
    """Global count of each loss, [number of losses] float64: a microbatch counts for the losses of its task."""
    own = torch.zeros(len(graph.losses), dtype=torch.float64)
    for index, loss in enumerate(graph.losses):
        own[index] = sum(loss.counted(batch) for batch in microbatches if loss.applies(batch.plan))
    own = own.to(device)
    dist.all_reduce(own, group=parallel_state.get_data_parallel_group())
    return own


def _loss_and_sums(terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    return terms.total, terms.sums
