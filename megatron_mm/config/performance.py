"""Switches that make a step faster or smaller, and what each needs: none changes what is computed but for rounding.

What divides the model or the state over processes is in `parallel`. Names are Megatron's. A switch that cannot act is
refused, never ignored: `problems` says what contradicts the rest of the configuration, `device_problems` what the
device of a real run lacks. A dry run plans for GPUs, so it asks the first alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_mm.config.section import divides, megatron, section


@section
class PerformanceConfig:
    """Overlap of communication with computation, fused kernels, FP8 and offload."""

    overlap_grad_reduce: Annotated[bool, megatron("overlap-grad-reduce")] = False
    """Reduce gradients over data parallelism bucket by bucket, while the last microbatch's backward pass goes on."""
    overlap_param_gather: Annotated[bool, megatron("overlap-param-gather")] = False
    """Gather the weights that the distributed optimizer updated while the next forward pass goes on."""
    ddp_bucket_size: Annotated[int | None, megatron("ddp-bucket-size")] = None
    """Parameters of one bucket of gradients; null: megatron-core's, 40 million or a million a data-parallel process."""
    overlap_p2p_comm: Annotated[bool, megatron("overlap-p2p-communication")] = True
    """Send and receive between pipeline stages while chunks compute; the interleaved schedule alone can."""
    tp_comm_overlap: Annotated[bool, megatron("tp-comm-overlap")] = False
    """Cut the matrix products of the decoder's layers into pieces, and gather or scatter sequences beside them."""
    cross_entropy_loss_fusion: Annotated[bool, megatron("cross-entropy-loss-fusion")] = False
    """Token losses in few kernels and one reduction over the vocabulary's shards instead of two."""
    cross_entropy_fusion_impl: Annotated[Literal["native", "te"], megatron("cross-entropy-fusion-impl")] = "native"
    """Whose: megatron-core's compiled functions, or Transformer Engine's kernel, which keeps no fp32 logits."""
    gradient_accumulation_fusion: Annotated[bool, megatron("gradient-accumulation-fusion")] = False
    """Matrix products add weight gradients to the fp32 gradient themselves (Transformer Engine's linear layers)."""
    fp8_format: Annotated[Literal["none", "e4m3", "hybrid"], megatron("fp8-format")] = "none"
    """FP8 matrix products in the decoder's self-attention and MLP layers; hybrid: gradients are e5m2."""
    fp8_recipe: Annotated[Literal["tensorwise", "blockwise", "mxfp8", "delayed"], megatron("fp8-recipe")] = "tensorwise"
    """How FP8 tensors are scaled: by their own maximum, by blocks of 128, by blocks of 32."""
    cuda_graph_impl: Annotated[Literal["none", "local", "transformer_engine"], megatron("cuda-graph-impl")] = "none"
    """CUDA graphs. Only none is possible here: microbatches differ in shape."""
    cpu_offloading_num_layers: Annotated[int, megatron("cpu-offloading-num-layers")] = 0
    """Layers of each pipeline chunk, the first ones, whose activations wait for the backward pass in host memory."""

    @property
    def cross_entropy(self) -> Literal["plain", "native", "te"]:
        """Which cross-entropy token losses take (objectives/cross_entropy.py)."""
        return self.cross_entropy_fusion_impl if self.cross_entropy_loss_fusion else "plain"


#: Compute capability of the first GPUs that have the arithmetic of an FP8 recipe.
FP8_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
#: Multiples that sizes of FP8 matrix products must be.
_FP8_MULTIPLE = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class Device:
    """What a real run computes on."""

    name: str
    """As a user calls it."""
    capability: tuple[int, int] | None
    """CUDA's compute capability; None on a CPU."""


def problems(config, sizes) -> Iterator[str]:
    """What contradicts the rest of the configuration or the layout."""
    yield from _overlap(config, sizes)
    yield from _fused(config)
    yield from _fp8(config, sizes)
    yield from _memory(config)


def device_problems(config, device: Device) -> Iterator[str]:
    """What the device cannot do."""
    performance, kernels = config.performance, _needs_transformer_engine(config.performance)
    if device.capability is None:
        for name, value in kernels.items():
            yield f"performance.{name} is {value}, which needs a GPU; this run is on {device.name}: {_off(name)}"
        return
    if performance.tp_comm_overlap and device.capability < (9, 0) and os.environ.get("UB_SKIPMC") != "1":
        yield (
            f"performance.tp_comm_overlap: {device.name} has no CUDA multicast; set UB_SKIPMC=1 in the environment, by "
            "which Transformer Engine's buffers do without it"
        )
    if performance.fp8_format != "none" and performance.fp8_recipe in FP8_CAPABILITY:
        needed = FP8_CAPABILITY[performance.fp8_recipe]
        if device.capability < needed:
            yield (
                f"performance.fp8_format is {performance.fp8_format}: FP8 with fp8_recipe {performance.fp8_recipe} "
                f"needs compute capability {needed[0]}.{needed[1]}, and {device.name} has "
                f"{device.capability[0]}.{device.capability[1]}; leave fp8_format none and train in bf16"
            )


def _needs_transformer_engine(performance: PerformanceConfig) -> dict[str, object]:
    """Switches that are on and live in Transformer Engine's kernels, with their values."""
    switches: dict[str, object] = {}
    if performance.tp_comm_overlap:
        switches["tp_comm_overlap"] = True
    if performance.gradient_accumulation_fusion:
        switches["gradient_accumulation_fusion"] = True
    if performance.cross_entropy == "te":
        switches["cross_entropy_fusion_impl"] = "te"
    if performance.fp8_format != "none":
        switches["fp8_format"] = performance.fp8_format
    return switches


def _off(name: str) -> str:
    """How to turn a switch off on the command line."""
    option = name.replace("_", "-")
    values = {"cross_entropy_fusion_impl": "native", "fp8_format": "none"}
    return f"add --{option} {values[name]}" if name in values else f"add --no-{option}"


def _overlap(config, sizes) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    if performance.overlap_param_gather:
        if not parallel.use_distributed_optimizer:
            yield (
                "performance.overlap_param_gather gathers what the distributed optimizer updates: it needs "
                "parallel.use_distributed_optimizer"
            )
        if not performance.overlap_grad_reduce:
            yield "performance.overlap_param_gather needs performance.overlap_grad_reduce, which cuts the buckets"
    if performance.ddp_bucket_size is not None:
        if performance.ddp_bucket_size < 1:
            yield f"performance.ddp_bucket_size is {performance.ddp_bucket_size}; it must be at least 1"
        elif not performance.overlap_grad_reduce:
            yield (
                "performance.ddp_bucket_size needs performance.overlap_grad_reduce: without overlap all gradients are "
                "one bucket"
            )
    if performance.tp_comm_overlap:
        if not sizes.sequence_parallel:
            yield (
                "performance.tp_comm_overlap hides the gathers of sequence parallelism: it needs "
                f"parallel.sequence_parallel and tensor_model_parallel_size above 1 (it is {sizes.tp})"
            )
        if config.training.precision != "bf16":
            yield f"performance.tp_comm_overlap has bf16 buffers, and training.precision is {config.training.precision}"
        if absent := _no_decoder(config.model):
            yield (
                f"performance.tp_comm_overlap acts in a decoder's layers, and {absent} has none: towers are not "
                "sequence-parallel, and their lengths vary, while Transformer Engine's buffers are of one size"
            )


def _fused(config) -> Iterator[str]:
    performance = config.performance
    if config.model.backend == "local":
        for name, value in _needs_transformer_engine(performance).items():
            yield (
                f"performance.{name} is {value}, which needs model.backend transformer_engine (or auto on GPUs); it is "
                f"local: {_off(name)}"
            )
    if performance.cross_entropy == "native" and config.training.precision != "bf16":
        yield (
            "performance.cross_entropy_loss_fusion: megatron-core's fused cross-entropy rounds its gradient to bf16, "
            f"and training.precision is {config.training.precision}; add --no-cross-entropy-loss-fusion"
        )
    if performance.cross_entropy_fusion_impl != "native" and not performance.cross_entropy_loss_fusion:
        yield (
            f"performance.cross_entropy_fusion_impl is {performance.cross_entropy_fusion_impl}, which needs "
            "performance.cross_entropy_loss_fusion"
        )


def _no_decoder(model) -> str:
    """What keeps a decoder's switches from acting, as the one who has no decoder; empty where there is one."""
    if not hasattr(model, "decoder"):
        return model.system
    return "model.phase mae" if getattr(model, "phase", "joint") == "mae" else ""


def _fp8(config, sizes) -> Iterator[str]:
    performance, training = config.performance, config.training
    if performance.fp8_format == "none":
        if performance.fp8_recipe != "tensorwise":
            yield f"performance.fp8_recipe is {performance.fp8_recipe}, and fp8_format is none; set e4m3 or hybrid"
        return
    where = f"performance.fp8_format is {performance.fp8_format}"
    if training.precision != "bf16":
        yield f"{where}, which needs training.precision bf16; it is {training.precision}"
    if performance.fp8_recipe == "delayed":
        yield (
            "performance.fp8_recipe is delayed: its maxima are a history over microbatches and processes, which layers "
            "that run, and run again, by themselves would disturb; use tensorwise, blockwise or mxfp8"
        )
        return
    if absent := _no_decoder(config.model):
        yield (
            f"{where}: it acts in a decoder's layers, and {absent} has none (towers have lengths that FP8 matrix "
            "products do not take)"
        )
        return
    multiple, decoder = _FP8_MULTIPLE[performance.fp8_recipe], config.model.decoder
    tokens = config.data.seq_length * training.micro_batch_size // sizes.cp
    tokens //= sizes.tp if sizes.sequence_parallel else 1
    yield from divides(f"{where}; tokens of a microbatch on one process", tokens, "what FP8 needs", multiple)
    yield from divides(f"{where}; model.decoder.hidden_size", decoder.hidden_size, "TP x what FP8 needs",
                       multiple * sizes.tp)  # fmt: skip
    yield from divides(f"{where}; model.decoder.ffn_hidden_size", decoder.ffn_hidden_size, "TP x what FP8 needs",
                       multiple * sizes.tp)  # fmt: skip
    keys = decoder.num_query_groups * (decoder.hidden_size // max(1, decoder.num_attention_heads))
    yield from divides(f"{where}; the width of model.decoder's queries, keys and values",
                       decoder.hidden_size + 2 * keys, "TP x what FP8 needs", multiple * sizes.tp)  # fmt: skip


def _memory(config) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    if performance.cuda_graph_impl != "none":
        yield (
            f"performance.cuda_graph_impl is {performance.cuda_graph_impl}: a CUDA graph replays the shapes it was "
            "captured with, and microbatches differ in documents, media and task; leave it none"
        )
    if performance.cpu_offloading_num_layers < 0:
        yield f"performance.cpu_offloading_num_layers is {performance.cpu_offloading_num_layers}; it must be 0 or more"
    granularity = parallel.recompute_granularity
    if parallel.recompute_method == "block":
        yield (
            "parallel.recompute_method is block: nodes differ, so a number of them says little; name uniform, and give "
            "memory that is left to fewer stages or performance.cpu_offloading_num_layers"
        )
    if parallel.recompute_method is not None and granularity != "full":
        yield f"parallel.recompute_method needs recompute_granularity full; it is {granularity}"
    if parallel.recompute_num_layers is not None and (granularity != "full" or parallel.recompute_num_layers != 1):
        yield (
            f"parallel.recompute_num_layers is {parallel.recompute_num_layers}: full recomputation keeps the input of "
            f"every layer, which is 1, and recompute_granularity is {granularity}"
        )
    if parallel.recompute_modules != ["core_attn"]:
        yield (
            f"parallel.recompute_modules is {' '.join(parallel.recompute_modules)}: selective recomputation is that of "
            "core_attn in every tower and decoder; for more use recompute_granularity full"
        )
