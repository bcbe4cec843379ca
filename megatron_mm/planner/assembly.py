"""What a run is planned to be: settings, graph, fullest microbatch, times and cuts, made once of a recipe and a layout.

Training, layout verification, the dry run, `--check` and benchmarks take the same value, so that what is planned and
checked is what trains. Another layout, or another phase, is another value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_mm.config.inputs import Limits
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import ListedPlan, MicrobatchPlan
from megatron_mm.models.graph import Graph
from megatron_mm.models.layers import attention_kernels, user_buffers
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.phases import phase_graph
from megatron_mm.pipeline.design import PipelineDesign
from megatron_mm.pipeline.partition import NothingFits, balance, cuts_by_name
from megatron_mm.pipeline.schedule import Pipeline, build_pipeline
from megatron_mm.pipeline.stage import PipelineChunk
from megatron_mm.planner.costs import node_times
from megatron_mm.planner.memory import ChunkMemory
from megatron_mm.systems.graph import build_graph


@dataclass(frozen=True)
class Assembly:
    """A recipe in a layout, in one of its phases.

    Attributes:
        graph: its frozen nodes are those of the phase.
        plan: a microbatch with as much media as the recipe allows: costs are balanced and memory is planned by it.
    """

    config: Config
    sizes: ParallelSizes
    settings: LayerSettings
    graph: Graph
    plan: MicrobatchPlan

    @classmethod
    def of(cls, config: Config, sizes: ParallelSizes, device_type: str = "cpu", iteration: float = 0) -> Assembly:
        """The assembly of a recipe.

        Args:
            iteration: steps done, which decide what is frozen; `phases.LAST_PHASE`: all that ever learns does.
        """
        settings = layer_settings(config, sizes, device_type)
        graph = phase_graph(build_graph(config.model, settings), config.optimizer.groups, iteration)
        return cls(config, sizes, settings, graph, full_plan(config))

    @property
    def caches_streams(self) -> bool:
        """Whether a step has several microbatches, so that losses over the whole batch have a first pass."""
        training = self.config.training
        return training.global_batch_size > training.micro_batch_size * self.sizes.dp

    @cached_property
    def times(self) -> list[float]:
        """FLOPs of each node for one microbatch of this run: with its recomputation, and with the first pass of losses
        over the whole batch where a step has several microbatches."""
        return node_times(self.graph, self.plan, self.settings.recompute == "full", cached=self.caches_streams)

    @cached_property
    def cuts(self) -> list[int]:
        """Where chunks begin, and the end: the user's cut, or the balanced one.

        Raises:
            ValueError: the user's cut is wrong, there are fewer nodes than chunks, or no cut keeps the memory limit.
        """
        parallel, chunks = self.config.parallel, self.sizes.chunks
        if parallel.pipeline_cuts is not None:
            return cuts_by_name(self.graph, parallel.pipeline_cuts, chunks)
        fits = None
        if parallel.memory_limit_gb is not None:
            memory, limit = self.memory, parallel.memory_limit_gb * 2**30 / self.sizes.vpp

            def fits(chunk: int, start: int, stop: int) -> bool:
                return memory(chunk, start, stop) <= limit  # chunks of one process share it equally

        try:
            return balance(self.times, chunks, fits)
        except NothingFits:
            raise ValueError(
                f"parallel.memory_limit_gb is {parallel.memory_limit_gb}: no cut into {chunks} chunks keeps it; use "
                "more stages, more tensor parallelism or recomputation"
            ) from None

    @cached_property
    def memory(self) -> ChunkMemory:
        """What each possible chunk would hold."""
        return ChunkMemory(self.config, self.sizes, self.graph, self.plan, self.settings.dtype)

    @property
    def design(self) -> PipelineDesign:
        """What the pipeline is built from."""
        return PipelineDesign(self.graph, self.cuts, self.settings, self.config.parallel.use_distributed_optimizer)

    def build(self, device: torch.device, seed: int | None) -> Pipeline:
        """The chunks of this process; process groups must exist.

        Args:
            seed: initial weights; None leaves them unset.

        Raises:
            ValueError: as of `check`.
        """
        if self.settings.backend == "transformer_engine":
            attention_kernels.request(self.config.model.attention_backend)
        if self.config.performance.tp_comm_overlap and device.type == "cuda":
            user_buffers.start(self.config, self.sizes)
        pipeline = build_pipeline(self.design, device, seed)
        for chunk in pipeline.bare_chunks:
            self.check(chunk)
        return pipeline

    def check(self, chunk: PipelineChunk) -> None:
        """Compares what nodes say of themselves with what was built.

        Raises:
            ValueError: a node's cost or names are of other weights than its module has.
        """
        for node, module in zip(chunk.nodes, chunk.node_modules):
            node.check(module, self.plan, self.sizes.tp)


def layer_settings(config: Config, sizes: ParallelSizes, device_type: str) -> LayerSettings:
    """What every layer is told."""
    backend = config.model.backend
    if backend == "auto":
        backend = "transformer_engine" if device_type == "cuda" else "local"
    return LayerSettings(
        sizes=sizes,
        dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        backend=backend,
        cp_comm_type=config.parallel.cp_comm_type,
        recompute=config.parallel.recompute_granularity,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=config.model.attention_dropout,
        performance=config.performance,
    )


def full_plan(config: Config) -> MicrobatchPlan:
    """A microbatch with as much media as the recipe allows.

    Where a row is one document, each has a clip (an image where the system reads no clips) and a sound; of several
    tasks it learns the first.
    """
    inputs, rows = config.model.inputs, config.training.micro_batch_size
    limits = Limits.of(config.data, inputs)
    images, sounds = limits.max_images, limits.max_sounds
    clips = images if inputs.video == "clips" else 0
    own = sum(one.most for one in inputs.own_lists)
    return MicrobatchPlan(
        num_rows=rows,
        row_length=limits.seq_length,
        num_images=max(1, rows * (images - clips)),
        num_sounds=max(1, rows * sounds),
        image_slots=max(1, images),
        sound_slots=max(1, sounds),
        one_document_per_row=not inputs.packed,
        max_document_length=limits.seq_length,
        max_documents_per_row=max(1, images + sounds + own) if inputs.packed else 1,
        num_clips=rows * clips,
        clip_frames=limits.frames_per_video if inputs.video == "clips" else 0,
        task=inputs.tasks[0][0] if inputs.tasks else "",
        own_lists=tuple(ListedPlan(one, rows * one.most, one.most) for one in inputs.own_lists),
    )
