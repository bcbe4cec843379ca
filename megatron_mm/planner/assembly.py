"""From a Config to the model of one process: settings, graph, cut, chunks.

Shared by training, layout verification, the dry run and benchmarks, so that what is planned and checked is what trains.
"""

from __future__ import annotations

import torch

from megatron_mm.config.inputs import Limits
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph
from megatron_mm.models.layers import attention_kernels, user_buffers
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.phases import phase_graph
from megatron_mm.pipeline.partition import NothingFits, balance, cuts_by_name
from megatron_mm.pipeline.schedule import Pipeline, build_pipeline
from megatron_mm.planner.costs import node_times
from megatron_mm.planner.memory import memory_limit
from megatron_mm.systems import build_graph


def layer_dtype(config: Config) -> torch.dtype:
    """Precision of weights and activations in the layers."""
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def layer_settings(config: Config, sizes: ParallelSizes, device_type: str) -> LayerSettings:
    """What every layer is told."""
    backend = config.model.backend
    if backend == "auto":
        backend = "transformer_engine" if device_type == "cuda" else "local"
    return LayerSettings(
        sizes=sizes,
        dtype=layer_dtype(config),
        backend=backend,
        cp_comm_type=config.parallel.cp_comm_type,
        recompute=config.parallel.recompute_granularity,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=config.model.attention_dropout,
        performance=config.performance,
    )


def full_plan(config: Config) -> MicrobatchPlan:
    """A microbatch with as much media as the recipe allows: costs are balanced and memory is planned by it.

    Where a row is one document, each has a clip (an image where the system reads no clips) and a sound; of several
    tasks it learns the first.
    """
    inputs, rows = config.model.inputs, config.training.micro_batch_size
    limits = Limits.of(config.data, inputs)
    images, sounds = limits.max_images, limits.max_sounds
    clips = images if inputs.video == "clips" else 0
    return MicrobatchPlan(
        num_rows=rows,
        row_length=limits.seq_length,
        num_images=max(1, rows * (images - clips)),
        num_sounds=max(1, rows * sounds),
        image_slots=max(1, images),
        sound_slots=max(1, sounds),
        one_document_per_row=not inputs.packed,
        max_document_length=limits.seq_length,
        max_documents_per_row=max(1, images + sounds) if inputs.packed else 1,
        num_clips=rows * clips,
        clip_frames=limits.frames_per_video if inputs.video == "clips" else 0,
        task=inputs.tasks[0][0] if inputs.tasks else "",
    )


def model_graph(config: Config, sizes: ParallelSizes, device_type: str, iteration: float) -> Graph:
    """The graph of the phase that follows `iteration` steps (node_groups.LAST_PHASE: all that ever learns does)."""
    graph = build_graph(config.model, layer_settings(config, sizes, device_type))
    return phase_graph(graph, config.optimizer.groups, iteration)


def training_times(config: Config, graph: Graph, sizes: ParallelSizes) -> list[float]:
    """FLOPs of each node for one microbatch of this run: with its recomputation, and with the first pass of losses over
    the whole batch where a step has several microbatches."""
    several = config.training.global_batch_size > config.training.micro_batch_size * sizes.dp
    return node_times(graph, full_plan(config), config.parallel.recompute_granularity == "full", cached=several)


def choose_cuts(config: Config, graph: Graph, sizes: ParallelSizes) -> list[int]:
    """The user's cut, or the balanced one.

    Raises:
        ValueError: the user's cut is wrong, there are fewer nodes than chunks, or no cut keeps the memory limit.
    """
    if config.parallel.pipeline_cuts is not None:
        return cuts_by_name(graph, config.parallel.pipeline_cuts, sizes.chunks)
    fits = memory_limit(config, graph, full_plan(config), sizes, layer_dtype(config))
    try:
        return balance(training_times(config, graph, sizes), sizes.chunks, fits)
    except NothingFits:
        raise ValueError(
            f"parallel.memory_limit_gb is {config.parallel.memory_limit_gb}: no cut into {sizes.chunks} chunks keeps "
            "it; use more stages, more tensor parallelism or recomputation"
        ) from None


def build_model(
    config: Config, sizes: ParallelSizes, device: torch.device, seed: int | None, iteration: float = 0
) -> Pipeline:
    """Graph, cut and chunks of this process; process groups must exist.

    Args:
        seed: initial weights; None leaves them unset.
        iteration: steps done, which decide what is frozen.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    if layer_settings(config, sizes, kind).backend == "transformer_engine":
        attention_kernels.request(config.model.attention_backend)
    graph = model_graph(config, sizes, kind, iteration)
    if config.performance.tp_comm_overlap and kind == "cuda":
        user_buffers.start(config, sizes)
    return build_pipeline(
        graph,
        choose_cuts(config, graph, sizes),
        sizes,
        dtype=layer_dtype(config),
        device=device,
        seed=seed,
        recompute_layers=config.parallel.recompute_granularity == "full",
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        dropout=bool(config.model.hidden_dropout or config.model.attention_dropout),
        performance=config.performance,
    )
