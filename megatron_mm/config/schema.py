"""The one tree of settings: what a recipe may say, its types, its defaults and what each field means.

A recipe (YAML) names fields of this tree, the command line overrides any of them, `config/validate.py` refuses
contradictions, and the resolved tree is written to `config.yaml` of the run. Names are Megatron's where Megatron has
one. The docstring under a field is its `--help`. `model` is the section of a system (config/systems.py).
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from megatron_mm.config.performance import PerformanceConfig
from megatron_mm.config.proportions import parse_split
from megatron_mm.config.section import megatron, section
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import DEFAULT_SYSTEM, section_of


@section
class ParallelConfig:
    """How the model and the batch are divided over processes. Data parallel = world size / (TP × PP × CP)."""

    tensor_model_parallel_size: Annotated[int, megatron("tensor-model-parallel-size")] = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: Annotated[int, megatron("pipeline-model-parallel-size")] = 1
    """Processes in the pipeline."""
    virtual_pipeline_model_parallel_size: Annotated[int | None, megatron("virtual-pipeline-model-parallel-size")] = None
    """Chunks a pipeline stage holds in the interleaved schedule."""
    context_parallel_size: Annotated[int, megatron("context-parallel-size")] = 1
    """Processes that share each text sequence."""
    cp_comm_type: Annotated[Literal["all_gather", "a2a", "p2p"], megatron("cp-comm-type")] = "all_gather"
    """How attention meets the keys of the other context-parallel processes: gathers them; exchanges heads for tokens,
    so that each process has all tokens of its heads; or passes them round (p2p: Transformer Engine, one document a
    row)."""
    sequence_parallel: Annotated[bool, megatron("sequence-parallel")] = False
    """Shard norms and dropout of text over the tensor-parallel group."""
    use_distributed_optimizer: Annotated[bool, megatron("use-distributed-optimizer")] = False
    """Shard optimizer state over data-parallel processes."""
    recompute_granularity: Annotated[Literal["none", "selective", "full"], megatron("recompute-granularity")] = "none"
    """Activations to recompute in the backward pass: none, core attention, or whole layers."""
    recompute_method: Annotated[Literal["uniform", "block"] | None, megatron("recompute-method")] = None
    """Of full recomputation: uniform, as every layer is recomputed by itself; null says the same."""
    recompute_num_layers: Annotated[int | None, megatron("recompute-num-layers")] = None
    """Of full recomputation: layers that are recomputed together, 1; null says the same."""
    recompute_modules: Annotated[list[str], megatron("recompute-modules")] = Field(
        default_factory=lambda: ["core_attn"]
    )
    """Of selective recomputation: what is recomputed, core_attn."""
    pipeline_cuts: list[str] | None = None
    """Names of the nodes that begin chunks 2, 3, …; null lets the partitioner choose."""
    memory_limit_gb: float | None = None
    """GiB that a process may hold by the planner's estimate, which the partitioner then keeps; null: no limit."""
    world_size: Annotated[int | None, megatron("world-size")] = None
    """Processes that a dry run plans for; null: those it was started on. A real run has what torchrun starts."""
    distributed_timeout_minutes: Annotated[float, megatron("distributed-timeout-minutes")] = 10.0
    """Minutes after which a hung collective ends the run with every rank's stacks."""


def _prefix(path: str) -> str:
    if path.endswith((".bin", ".idx")) and "://" not in path and not os.path.isdir(path):
        raise ValueError(f"give the prefix, {path[:-4]}, not the file {path}")
    return path


def _proportions(split: str) -> str:
    parse_split(split)
    return split


def _function(name: str) -> str:
    module, _, function = name.rpartition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"{name!r} must be module:function or file.py:function")
    return name


#: A value of some kind, never an empty text: as an unset variable of a script leaves one.
_Text = Annotated[str, Field(min_length=1)]
_Chance = Annotated[float, Field(ge=0.0, le=1.0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@section
class DatasetConfig:
    """One dataset of a blend."""

    path: Annotated[_Text, AfterValidator(_prefix)]
    """Prefix of a text shard (without .bin) or folder that tools/preprocess_multimodal.py wrote; or a URL that fsspec
    knows, such as s3://bucket/emoji."""
    weight: _Positive = 1.0
    """Share of the samples, relative to the other datasets."""


@section
class DataConfig:
    """What is read, and in which order."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    """The blend."""
    tokenizer: _Text | None = None
    """Tokenizer that made the shards: a SentencePiece model, or a file of another kind (docs/data.md)."""
    split: Annotated[str, AfterValidator(_proportions)] = "969,30,1"
    """Proportions of train, validation and test documents."""
    seq_length: Annotated[int, Field(ge=2), megatron("seq-length")] = 4096
    """Tokens of one sample: a row of packed documents, or one document, padded or truncated, as the system asks."""
    max_images_per_sample: Annotated[int, Field(ge=0)] = 8
    """Most images and video frames in one row; a system of one document a row takes one image or one video."""
    max_sounds_per_sample: Annotated[int, Field(ge=0)] = 2
    """Most sounds in one row; a system of one document a row takes one."""
    frames_per_video: Annotated[int, Field(ge=0)] = 8
    """Frames taken from a video, evenly spaced; a video with fewer repeats them evenly."""
    random_crop: bool = True
    """Random crop of training images (scale 0.5–1 of the area); false: resize and centre crop, as in validation."""
    horizontal_flip: _Chance = 0.0
    """Chance that a training image is mirrored; one whose text says left or right never is."""
    color_jitter: _Chance = 0.0
    """Largest relative change of brightness, contrast and saturation of training images, and a quarter of it in hue."""
    image_mean: tuple[_Finite, _Finite, _Finite] = (0.48145466, 0.4578275, 0.40821073)
    """Channel means of image normalisation (CLIP's)."""
    image_std: tuple[_Positive, _Positive, _Positive] = (0.26862954, 0.26130258, 0.27577711)
    """Channel deviations of image normalisation (CLIP's)."""
    num_workers: Annotated[int, Field(ge=0), megatron("num-workers")] = 2
    """Reader processes a rank; 0 reads in the training process."""
    cache_folder: _Text | None = None
    """Folder into which datasets named by URLs are copied; null: ~/.cache/megatron_mm/datasets."""
    plan_folder: _Text | None = None
    """Folder in which the packing plans of large datasets are kept; null: PATH.plans beside each."""
    log_sample_ids: bool = False
    """Write the document ids of every step to metrics.jsonl."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What an image, sound or video does that does not decode while training: end the run with its name, or be read as
    grey or as silence, counted and named once (data/reading/records.py)."""
    builder: Annotated[str, AfterValidator(_function)] | None = None
    """`module:function` or `file.py:function` of a user's own that makes the datasets (contract:
    data/reading/dataset.py); null: shards."""


@section
class NodeGroupConfig:
    """Nodes that learn otherwise than the rest."""

    nodes: list[str]
    """Patterns of node names, such as `vision.*`."""
    lr_scale: float = 1.0
    """Their learning rate over the others'."""
    frozen_iters: int = 0
    """Steps for which they stay as they are; -1: always."""


@section
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, megatron("lr")] = 3e-5
    """Peak learning rate."""
    min_lr: Annotated[float, megatron("min-lr")] = 1e-6
    """Learning rate at the end of the decay."""
    lr_warmup_iters: Annotated[int, megatron("lr-warmup-iters")] = 2000
    """Steps of linear warm-up."""
    lr_decay_iters: Annotated[int | None, megatron("lr-decay-iters")] = None
    """Step at which the cosine ends; null: the last step."""
    weight_decay: Annotated[float, megatron("weight-decay")] = 0.1
    """Decay of matrices; norms, biases and gates have none."""
    adam_beta1: Annotated[float, megatron("adam-beta1")] = 0.9
    """Adam's first moment."""
    adam_beta2: Annotated[float, megatron("adam-beta2")] = 0.95
    """Adam's second moment."""
    adam_eps: Annotated[float, megatron("adam-eps")] = 1e-6
    """Adam's epsilon."""
    clip_grad: Annotated[float, megatron("clip-grad")] = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    groups: list[NodeGroupConfig] = Field(default_factory=list)
    """Nodes with a learning rate of their own, or frozen for a while; the first group that matches a node holds."""


@section
class TrainingConfig:
    """Batch, length and precision of the run."""

    micro_batch_size: Annotated[int, megatron("micro-batch-size")] = 1
    """Samples a process handles at once."""
    global_batch_size: Annotated[int, megatron("global-batch-size")] = 1024
    """Samples a step."""
    train_iters: Annotated[int, megatron("train-iters")] = 100000
    """Steps of the run."""
    seed: Annotated[int, megatron("seed")] = 1234
    """Seed of weights, order, augmentation and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the layers; master weights and optimizer are fp32."""
    eval_interval: Annotated[int, megatron("eval-interval")] = 1000
    """Steps between validations; 0 never validates."""
    eval_iters: Annotated[int, megatron("eval-iters")] = 10
    """Global batches of one validation."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


@section
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    save: Annotated[str | None, megatron("save")] = None
    """Folder of checkpoints; null: OUTPUT/checkpoints."""
    load: Annotated[str | None, megatron("load")] = None
    """Folder to resume from; null: the folder of `save`, if it holds a checkpoint."""
    save_interval: Annotated[int, megatron("save-interval")] = 1000
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 3
    """Checkpoints kept; 0 keeps all."""
    async_save: Annotated[bool, megatron("async-save")] = True
    """Training goes on while a checkpoint is written, where the hosts have memory for a copy of what they hold."""
    local_folder: Annotated[str | None, megatron("non-persistent-local-ckpt-dir")] = None
    """Folder of a node's own (its disk, /dev/shm) for copies of the newest state, which the next node keeps too; null:
    none. It may be another on each node."""
    local_interval: Annotated[int, Field(ge=1), megatron("non-persistent-save-interval")] = 100
    """Steps between local copies."""
    init_from: Annotated[list[str] | None, BeforeValidator(_listed), megatron("init-from")] = None
    """Checkpoints (of another run or phase, or from tools/convert_checkpoint.py) whose weights start a new run; each
    fills the nodes that it holds and none before it has filled. A recipe may name one without a list."""
    init_nodes: Annotated[list[str] | None, megatron("init-nodes")] = None
    """Nodes that take their weights from them, as patterns such as `vision.*`; null: all that they hold."""


@section
class LoggingConfig:
    """Where figures go."""

    output: str = "outputs/run"
    """Folder of metrics.jsonl, config.yaml, TensorBoard events and checkpoints."""
    log_interval: Annotated[int, megatron("log-interval")] = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project; null: not used."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU; null: known GPUs are looked up."""


@section
class Config:
    """Everything one run of pretrain_multimodal.py needs."""

    plugins: list[str] = Field(default_factory=list)
    """Python files or modules imported first, which register systems of a user's own (config/systems.py)."""
    model: SystemConfig = Field(default_factory=lambda: section_of(DEFAULT_SYSTEM)())
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
