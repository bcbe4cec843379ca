"""Refuses contradictions by name before anything is built: layout against world size, heads against tensor parallel, …

Each check names the fields, their values and what would be right. All problems are reported at once.
"""

from __future__ import annotations

from megatron_mm.config.schema import Config
from megatron_mm.models.graph import ParallelSizes


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
    problems = [*_batch(config, sizes), *_decoder(config, sizes), *_towers(config, sizes), *_values(config)]
    if problems:
        raise ValueError("\n  ".join(["the configuration contradicts itself:", *problems]))


def _divides(name: str, value: int, by_name: str, by: int):
    if by < 1 or value % by:
        yield f"{name} is {value}, which does not divide by {by_name} = {by}"


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
        yield from _divides("data.seq_length", length, "2 x parallel.context_parallel_size", 2 * sizes.cp)
    if sizes.sequence_parallel:
        tokens = length * training.micro_batch_size // sizes.cp
        yield from _divides("tokens of a microbatch on one process", tokens, "tensor_model_parallel_size", sizes.tp)


def _decoder(config: Config, sizes: ParallelSizes):
    decoder, cross = config.model.decoder, config.model.cross_attention
    heads, name = decoder.num_attention_heads, "parallel.tensor_model_parallel_size"
    yield from _divides("model.decoder.hidden_size", decoder.hidden_size, "model.decoder.num_attention_heads", heads)
    yield from _divides("model.decoder.num_attention_heads", heads, name, sizes.tp)
    yield from _divides(
        "model.decoder.num_attention_heads", heads, "model.decoder.num_query_groups", decoder.num_query_groups
    )
    yield from _divides("model.decoder.num_query_groups", decoder.num_query_groups, name, sizes.tp)
    yield from _divides("model.decoder.ffn_hidden_size", decoder.ffn_hidden_size, name, sizes.tp)
    yield from _divides("model.decoder.vocab_size", decoder.vocab_size, name, sizes.tp)
    yield from _divides(
        "model.decoder.num_attention_heads", heads, "model.cross_attention.num_query_groups", cross.num_query_groups
    )
    yield from _divides("model.cross_attention.num_query_groups", cross.num_query_groups, name, sizes.tp)
    if cross.every < 1:
        yield f"model.cross_attention.every is {cross.every}; it must be at least 1"


def _towers(config: Config, sizes: ParallelSizes):
    name = "parallel.tensor_model_parallel_size"
    for label, tower in (("vision", config.model.vision), ("audio", config.model.audio)):
        heads = f"model.{label}.num_attention_heads"
        yield from _divides(f"model.{label}.hidden_size", tower.hidden_size, heads, tower.num_attention_heads)
        yield from _divides(heads, tower.num_attention_heads, name, sizes.tp)
        yield from _divides(f"model.{label}.ffn_hidden_size", tower.ffn_hidden_size, name, sizes.tp)
    audio = config.model.audio
    if audio.num_frames % 2 or audio.num_frames < 2:
        yield f"model.audio.seconds is {audio.seconds}, {audio.num_frames} frames of 10 ms; it must make an even number"
    yield from _divides("model.audio.hidden_size", audio.hidden_size, "4 (sines and cosines of positions)", 4)
    decoder = config.model.decoder
    if decoder.hidden_size // max(1, decoder.num_attention_heads) % 2:
        yield "model.decoder: hidden_size / num_attention_heads must be even for rotary positions"
    vision = config.model.vision
    yield from _divides("model.vision.image_size", vision.image_size, "model.vision.patch_size", vision.patch_size)
    frames = config.data.frames_per_video
    if frames > vision.max_frames:
        yield f"data.frames_per_video is {frames}, above model.vision.max_frames {vision.max_frames}"


def _values(config: Config):
    optimizer, training = config.optimizer, config.training
    last = optimizer.lr_decay_iters or training.train_iters
    if optimizer.lr_warmup_iters >= last:
        yield f"optimizer.lr_warmup_iters is {optimizer.lr_warmup_iters}, not below the last step of the decay {last}"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}"
    if not any(dataset.weight > 0 for dataset in config.data.datasets) and config.data.datasets:
        yield "data.datasets: every weight is zero"
    if training.train_iters < 1:
        yield f"training.train_iters is {training.train_iters}; it must be at least 1"
