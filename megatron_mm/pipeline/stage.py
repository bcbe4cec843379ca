"""One pipeline chunk: the modules of a contiguous range of nodes, as megatron-core's schedules and DDP expect a model.

A chunk unpacks the payload it receives, runs its nodes in order over named streams, and packs what later chunks need;
the last chunk ends with the losses. The number of payload rows and the counts that normalise the losses are those of a
step, so the schedule driver hands them over before each (`begin_step`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from megatron_mm.data.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Graph, ParallelSizes
from megatron_mm.models.initialization import initialize_module
from megatron_mm.pipeline import ties
from megatron_mm.pipeline.payload import PayloadLayout, new_anchor, pack, payload_layout, unpack


@dataclass(frozen=True)
class Terms:
    """What the last chunk returns: the loss to differentiate, and each term's sum for the log."""

    total: torch.Tensor
    sums: torch.Tensor
    """[number of losses], detached."""


class PipelineChunk(MegatronModule):
    """Nodes start … stop-1 of a graph.

    Args:
        config: megatron-core's configuration of the pipeline (sizes, dtype).
        chunk: number of the chunk in pipeline order, 0 … sizes.chunks-1.
        seed: initial weights; None leaves them uninitialised (meta device, or a checkpoint follows).
        recompute_layers: run recomputable nodes again in the backward pass instead of keeping activations.
    """

    def __init__(
        self,
        config: TransformerConfig,
        graph: Graph,
        cuts: list[int],
        chunk: int,
        sizes: ParallelSizes,
        seed: int | None,
        recompute_layers: bool,
    ) -> None:
        super().__init__(config=config)
        self.graph, self.sizes = graph, sizes
        self.start, self.stop = cuts[chunk], cuts[chunk + 1]
        self.nodes = graph.nodes[self.start : self.stop]
        self.recompute_layers = recompute_layers
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk // sizes.pp if sizes.vpp > 1 else None
        self.pre_process = chunk == 0
        self.post_process = chunk == sizes.chunks - 1
        self.share_embeddings_and_output_weights = False
        self.payload_rows = 0
        self.num_microbatches = 1
        self.loss_counts: torch.Tensor | None = None
        self.finite: list[torch.Tensor] = []
        """For each microbatch of the step so far: are this chunk's results finite?"""
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

    def begin_step(self, payload_rows: int, num_microbatches: int, loss_counts: torch.Tensor) -> None:
        """Takes what is constant over one step.

        Args:
            payload_rows: S of every payload of the step.
            loss_counts: [number of losses], global counts by which sums are divided.
        """
        self.payload_rows, self.num_microbatches, self.loss_counts = payload_rows, num_microbatches, loss_counts
        self.finite = []

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Called by the schedule with the payload of the previous chunk."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def shared_embedding_or_output_weight(self) -> None:
        """Asked by megatron-core; ties between chunks are the graph's."""
        return None

    def layout(self, cut: int, batch: Microbatch) -> PayloadLayout:
        """Where streams lie in the payload that crosses a cut."""
        return payload_layout(self.graph, cut, batch.plan, self.sizes, self.config.pipeline_dtype)

    def forward(self, batch: Microbatch) -> torch.Tensor | Terms:
        """The payload for the next chunk, or the loss terms on the last."""
        context = ForwardContext(batch)
        if self.pre_process:
            anchor, streams = new_anchor(batch.document_ids_RT.device), {}
        else:
            anchor, streams = unpack(self._received, self.layout(self.start, batch))
        for node, module in zip(self.nodes, self.node_modules):
            written = self._run(node, module, [streams[name] for name in node.reads], context)
            written = (written,) if isinstance(written, torch.Tensor) else written
            streams.update(zip((stream.name for stream in node.writes), written))
        if self.post_process:
            terms = self._terms(streams, context, anchor)
            self.finite.append(torch.isfinite(terms.sums).all())
            return terms
        leaving = [stream.name for stream in self.graph.live(self.stop)]
        self.finite.append(torch.stack([torch.isfinite(streams[name].detach()).all() for name in leaving]).all())
        return pack(anchor, self.layout(self.stop, batch), self.payload_rows, self.config.pipeline_dtype, streams)

    def _run(self, node, module, inputs, context):
        learns = any(tensor.requires_grad for tensor in inputs)
        with contextlib.nullcontext() if node.trainable or learns else torch.no_grad():
            if self.recompute_layers and node.recomputable and learns and torch.is_grad_enabled():
                return tensor_parallel.checkpoint(lambda *tensors: module(*tensors, context), False, *inputs)
            return module(*inputs, context)

    def _terms(self, streams, context, anchor) -> Terms:
        """Loss of this microbatch, scaled so that megatron-core's averaging yields the mean over global counts.

        The schedule multiplies by CP and divides by the microbatches, and DDP averages over DP × CP: a sum is
        multiplied by DP × microbatches and divided by its global count, and by CP too if it is not sharded.
        """
        total, sums = anchor.sum(), []
        for index, loss in enumerate(self.graph.losses):
            if not loss.applies(context.batch.plan):
                sums.append(anchor.detach().sum())
                continue
            value = loss.compute(*(streams[name] for name in loss.reads), context)
            scale = loss.weight * self.sizes.dp * self.num_microbatches / (1 if loss.sharded else self.sizes.cp)
            total = total + value * (scale / self.loss_counts[index])
            sums.append(value.detach())
        return Terms(total, torch.stack(sums))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries under `node name.parameter`, whatever the layout."""
        entries: dict = {}
        group = parallel_state.get_tensor_model_parallel_group()
        for node, module in zip(self.nodes, self.node_modules):
            name = f"{prefix}{node.name}."
            entries.update(sharded_state_dict_default(module, name, sharded_offsets, metadata, tp_group=group))
        return ties.as_stored(entries, self.tied_copies)
