"""One pipeline chunk: the modules of a contiguous range of nodes, as megatron-core's schedules and DDP expect a model.

A chunk unpacks the payload it receives, runs its nodes in order over named streams, and packs what later chunks need;
the last chunk ends with the losses. What is the same for all microbatches of a step, such as the number of payload rows
and the counts that normalise the losses, the schedule driver hands over before it (`begin_step`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Graph
from megatron_mm.models.initialization import initialize_module
from megatron_mm.objectives.measures import Measure
from megatron_mm.pipeline import ties
from megatron_mm.pipeline.design import PipelineDesign
from megatron_mm.pipeline.offload import Offload
from megatron_mm.pipeline.overlap import mark
from megatron_mm.pipeline.payload import PayloadLayout, new_anchor, pack, payload_layout, unpack
from megatron_mm.pipeline.whole_batch import StreamCache


@dataclass(frozen=True)
class Step:
    """What is constant over one pass of a global batch."""

    graph: Graph
    """The model's, or its part that a pass needs (`Graph.leading_to`)."""
    payload_rows: int
    """S of every payload."""
    num_microbatches: int
    loss_counts: torch.Tensor
    """[number of losses], global counts by which sums are divided."""
    cache: StreamCache | None = None
    """Takes the place of the losses that it names."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """By loss: what else is counted of it."""


@dataclass(frozen=True)
class Terms:
    """What the last chunk returns: the loss to differentiate, and each term's sum for the log."""

    total: torch.Tensor
    sums: torch.Tensor
    """[number of losses], detached; zero where the cache has it."""


class PipelineChunk(MegatronModule):
    """Nodes start … stop-1 of a graph.

    Args:
        config: megatron-core's configuration of the pipeline (sizes, dtype).
        chunk: number of the chunk in pipeline order, 0 … sizes.chunks-1.
        seed: initial weights; None leaves them uninitialised (meta device, or a checkpoint follows).

    With full recomputation (`settings.recompute`), recomputable nodes run again in the backward pass instead of keeping
    activations. Of the first `performance.cpu_offloading_num_layers` recomputable nodes, activations wait on the host.
    """

    def __init__(
        self,
        config: TransformerConfig,
        design: PipelineDesign,
        chunk: int,
        seed: int | None,
    ) -> None:
        super().__init__(config=config)
        graph, settings, sizes = design.graph, design.settings, design.settings.sizes
        self.graph, self.sizes = graph, sizes
        self.start, self.stop = design.cuts[chunk], design.cuts[chunk + 1]
        self.nodes = graph.nodes[self.start : self.stop]
        self.recompute_layers = settings.recompute == "full"
        offloaded = settings.performance.cpu_offloading_num_layers
        self.offloaded = set([node.name for node in self.nodes if node.recomputable][:offloaded])
        self.bytes_on_host = self.bytes_too_small = 0
        """Of the last microbatch's offloaded nodes: what went to the host, and what was too small to."""
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk // sizes.pp if sizes.vpp > 1 else None
        self.pre_process = chunk == 0
        self.post_process = chunk == sizes.chunks - 1
        self.share_embeddings_and_output_weights = False
        self.step: Step | None = None
        self.finite: list[torch.Tensor] = []
        """For each microbatch of the step so far: are this chunk's results finite?"""
        self.done_from: Callable[[int], None] | None = None
        """Called in the last microbatch's backward pass when it has done the nodes from a number on."""
        self.before_node: Callable[[nn.Module], None] | None = None
        """Called with a node's module before it runs."""
        self._received: torch.Tensor | None = None
        self.node_modules = nn.ModuleList()
        for node in self.nodes:
            module = node.build()
            if seed is not None:
                rank = parallel_state.get_tensor_model_parallel_rank()
                initialize_module(module, node.name, seed, rank, sizes.tp)
            if not node.trainable:
                module.requires_grad_(False)
            self.node_modules.append(module)
        self.tied_copies = ties.share(graph, self.start, self.node_modules)
        self.train()

    def train(self, mode: bool = True) -> PipelineChunk:
        """Training mode for trainable nodes; frozen ones stay in evaluation mode."""
        super().train(mode)
        for node, module in zip(self.nodes, self.node_modules):
            if not node.trainable:
                module.eval()
        return self

    def begin_step(self, step: Step) -> None:
        """Takes what is constant over one pass."""
        self.step, self.finite = step, []

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Called by the schedule with the payload of the previous chunk."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def shared_embedding_or_output_weight(self) -> None:
        """Asked by megatron-core; ties between chunks are the graph's."""
        return None

    def layout(self, cut: int, batch: Microbatch) -> PayloadLayout:
        """Where streams lie in the payload that crosses a cut."""
        return payload_layout(self.step.graph, cut, batch.plan, self.sizes, self.config.pipeline_dtype)

    def forward(self, batch: Microbatch) -> torch.Tensor | Terms:
        """The payload for the next chunk, or the loss terms on the last."""
        graph, context = self.step.graph, ForwardContext(batch)
        if self.pre_process:
            anchor, streams = new_anchor(batch.document_ids_RT.device), {}
        else:
            anchor, streams = unpack(self._received, self.layout(self.start, batch))
        self.bytes_on_host = self.bytes_too_small = 0
        last = len(self.finite) == self.step.num_microbatches - 1 and torch.is_grad_enabled()
        for number, (node, module) in enumerate(zip(graph.nodes[self.start : self.stop], self.node_modules)):
            if last and self.done_from is not None:
                anchor = mark(anchor, partial(self.done_from, number))
            if node.writes:
                written = self._run(node, module, [streams[name] for name in node.reads], context)
                written = (written,) if isinstance(written, torch.Tensor) else written
                streams.update(zip((stream.name for stream in node.writes), written))
        if self.post_process:
            self._measure(streams, context)
            terms = self._terms(streams, context, anchor)
            cached = self.step.cache.losses.values() if self.step.cache else ()  # one bad sample spoils the whole batch
            self._note_finite([terms.sums, *(streams[name] for loss in cached for name in loss.reads)])
            return terms
        self._note_finite([streams[stream.name] for stream in graph.live(self.stop)])
        return pack(anchor, self.layout(self.stop, batch), self.step.payload_rows, self.config.pipeline_dtype, streams)

    def _measure(self, streams, context) -> None:
        """Before the losses, which may spoil the streams that they read."""
        for loss in self.step.graph.losses:
            measure = self.step.measures.get(loss.name)
            if measure is not None and loss.applies(context.batch.plan):
                seen = context.reading(f"the measure of {loss.reader}", loss.fields | measure.fields)
                measure.add({name: streams[name] for name in loss.reads}, seen)

    def _note_finite(self, results: list[torch.Tensor]) -> None:
        flags = [torch.isfinite(result.detach()).all() for result in results]
        self.finite.append(torch.stack(flags).all() if flags else torch.tensor(True))

    def _run(self, node, module, inputs, context):
        if self.before_node is not None:
            self.before_node(module)
        learns = any(tensor.requires_grad for tensor in inputs)
        with contextlib.nullcontext() if node.trainable or learns else torch.no_grad():
            if node.name not in self.offloaded:
                return self._apply(node, module, inputs, context, learns)
            with Offload(module) as offload:
                written = self._apply(node, module, inputs, context, learns)
            self.bytes_on_host += offload.moved
            self.bytes_too_small += offload.stayed
            return written

    def _apply(self, node, module, inputs, context, learns):
        context = context.reading(node.reader, node.fields)
        if self.recompute_layers and node.recomputable and learns and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(lambda *tensors: module(*tensors, context), False, *inputs)
        return module(*inputs, context)

    def _terms(self, streams, context, anchor) -> Terms:
        """Loss of this microbatch, scaled so that megatron-core's averaging yields the mean over global counts.

        The schedule multiplies by CP and divides by the microbatches, and DDP averages over DP × CP: a sum is
        multiplied by DP × microbatches and divided by its global count, and by CP too if it is not sharded.
        """
        step, total = self.step, anchor.sum()
        sums = torch.zeros(len(step.graph.losses), device=anchor.device)
        for index, loss in enumerate(step.graph.losses):
            if not loss.applies(context.batch.plan):
                continue
            values = [streams[name] for name in loss.reads]
            if step.cache is not None and loss.name in step.cache.losses:
                value = step.cache.term(loss.name, values)
            else:
                arguments = [*values, context.reading(loss.reader, loss.fields)]
                value = loss.compute(*([[item] for item in arguments] if loss.whole_batch else arguments))
                sums[index] = value.detach()
            scale = loss.weight * self.sizes.dp * step.num_microbatches / (1 if loss.sharded else self.sizes.cp)
            total = total + value * (scale / step.loss_counts[index])
        return Terms(total, sums)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries under `node name.parameter`, whatever the layout."""
        entries: dict = {}
        group = parallel_state.get_tensor_model_parallel_group()
        for node, module in zip(self.nodes, self.node_modules):
            name = f"{prefix}{node.name}."
            entries.update(sharded_state_dict_default(module, name, sharded_offsets, metadata, tp_group=group))
        return ties.as_stored(entries, self.tied_copies)
