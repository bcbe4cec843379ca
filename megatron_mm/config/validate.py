"""Refuses contradictions by name before anything is built: layout against world size, heads against tensor parallel, …

Each check names the fields, their values and what would be right. All problems are reported at once.
"""

from __future__ import annotations

from megatron_mm.config import performance
from megatron_mm.config.proportions import parse_split
from megatron_mm.config.schema import Config
from megatron_mm.config.section import divides
from megatron_mm.config.sizes import ParallelSizes


def parallel_sizes(config: Config, world_size: int) -> ParallelSizes:
    """The layout for a number of processes.

    Raises:
        ValueError: the layout does not divide the processes.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, vpp = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    for name, size in (("tensor", tp), ("pipeline", pp), ("context", cp), ("virtual pipeline", vpp)):
        if size < 1:
            raise ValueError(f"the {name} parallel size is {size}; it must be at least 1")
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"{world_size} processes do not divide by tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp}; "
            f"start a multiple of {tp * pp * cp}, or change parallel.*_parallel_size"
        )
    if vpp > 1 and pp == 1:
        raise ValueError("parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size above 1")
    return ParallelSizes(tp, pp, vpp, cp, world_size // (tp * pp * cp), parallel.sequence_parallel and tp > 1)


def check(config: Config, sizes: ParallelSizes) -> None:
    """Raises ValueError with every contradiction found."""
    layout = (*_batch(config, sizes), *_attention(config, sizes))
    problems = [*layout, *config.model.problems(config, sizes), *_values(config), *_training(config)]
    problems += _checkpoints(config)
    problems += performance.problems(config, sizes)
    problems += _data(config) if not problems else ()  # a system that contradicts itself cannot say what it reads
    if problems:
        raise ValueError("\n  ".join(["the configuration contradicts itself:", *problems]))


def check_data(config: Config) -> None:
    """Raises ValueError with every reason for which no rows could be read, whatever the data."""
    problems = list(_data(config))
    if problems:
        raise ValueError("\n  ".join(["the configuration contradicts itself:", *problems]))


def check_device(config: Config, device: performance.Device) -> None:
    """Raises ValueError with every switch that the device of this run cannot serve."""
    problems = list(performance.device_problems(config, device))
    if problems:
        raise ValueError("\n  ".join(["the configuration does not fit this device:", *problems]))


def _batch(config: Config, sizes: ParallelSizes):
    training = config.training
    if min(training.micro_batch_size, training.global_batch_size) < 1:
        yield "training.micro_batch_size and training.global_batch_size must be at least 1"
        return
    step = training.micro_batch_size * sizes.dp
    if training.global_batch_size % step:
        yield (
            f"training.global_batch_size is {training.global_batch_size}, not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data parallel {sizes.dp} = {step}"
        )
    elif sizes.vpp > 1:
        microbatches = training.global_batch_size // step
        if microbatches % sizes.pp:
            yield (
                f"the interleaved schedule needs microbatches in multiples of pipeline_model_parallel_size {sizes.pp}; "
                f"global_batch_size {training.global_batch_size} makes {microbatches}"
            )
    length = config.data.seq_length
    if sizes.cp > 1:
        yield from divides("data.seq_length", length, "2 x parallel.context_parallel_size", 2 * sizes.cp)
    if sizes.sequence_parallel:
        tokens = length * training.micro_batch_size // sizes.cp
        yield from divides("tokens of a microbatch on one process", tokens, "tensor_model_parallel_size", sizes.tp)


def _attention(config: Config, sizes: ParallelSizes):
    model, comm = config.model, config.parallel.cp_comm_type
    kernels = f"model.attention_backend is {model.attention_backend}"
    if model.attention_backend == "local" and model.backend != "local":
        yield f"{kernels}, torch's attention, which model.backend local has; it is {model.backend}"
    if model.attention_backend in ("flash", "fused", "unfused") and model.backend == "local":
        yield f"{kernels}, a choice of Transformer Engine's, and model.backend is local; take auto or local"
    if sizes.cp == 1:
        return
    if comm == "p2p" and model.backend == "local":
        yield "parallel.cp_comm_type is p2p, which is Transformer Engine's, and model.backend is local; take all_gather"
    if comm == "p2p" and model.inputs.packed:
        yield (
            f"parallel.cp_comm_type is p2p, which takes one document a row, and {model.system} packs documents; take "
            "all_gather or a2a"
        )
    groups = getattr(getattr(model, "decoder", None), "num_query_groups", None)
    if comm == "a2a" and groups is not None:
        by = "tensor x context parallel size, which parallel.cp_comm_type a2a asks for"
        yield from divides("model.decoder.num_query_groups", groups, by, sizes.tp * sizes.cp)


def _values(config: Config):
    optimizer, training = config.optimizer, config.training
    last = optimizer.lr_decay_iters or training.train_iters
    if optimizer.lr_warmup_iters >= last:
        yield f"optimizer.lr_warmup_iters is {optimizer.lr_warmup_iters}, not below the last step of the decay {last}"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}"
    for number, group in enumerate(optimizer.groups):
        name = f"optimizer.groups.{number}"
        if group.lr_scale <= 0:
            yield f"{name}.lr_scale is {group.lr_scale}; it must be positive (frozen_iters: -1 freezes nodes for good)"
        if group.frozen_iters < -1:
            yield f"{name}.frozen_iters is {group.frozen_iters}; it must be a number of steps, or -1 for always"
    if training.train_iters < 1:
        yield f"training.train_iters is {training.train_iters}; it must be at least 1"


def _data(config: Config):
    data, inputs, system = config.data, config.model.inputs, config.model.system
    if inputs.video != "none" and data.frames_per_video < 1:
        yield f"data.frames_per_video is {data.frames_per_video}; it must be at least 1, as {system} reads videos"
    if inputs.mask_ratio and data.datasets and not (data.builder or data.tokenizer):
        yield (
            "data.tokenizer is not set; masked language modelling hides tokens behind the <mask> of the model that "
            "made the shards"
        )


def _checkpoints(config: Config):
    if config.checkpoint.local_folder is not None and not config.checkpoint.async_save:
        yield (
            "checkpoint.local_folder needs checkpoint.async_save: local copies are written and sent in the background, "
            "from memory"
        )


def _training(config: Config):
    """What training alone asks of data: scoring reads them whole."""
    if not config.data.builder and not parse_split(config.data.split)[0]:
        yield f'data.split is "{config.data.split}"; its first proportion, of training documents, must be positive'
