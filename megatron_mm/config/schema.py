"""The one tree of settings: what a recipe may say, its types, its defaults and what each field means.

A recipe (YAML) names fields of this tree, the command line overrides any of them, `config/validate.py` refuses
contradictions, and the resolved tree is written to `config.yaml` of the run. Names are Megatron's where Megatron has
one. The docstring under a field is its `--help`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

section = dataclass(config=ConfigDict(extra="forbid", validate_assignment=True), kw_only=True)


def _megatron(*names: str):
    """The names by which Megatron's scripts call a field."""
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


# ---------------------------------------------------------------------------------------------------------- model


@section
class DecoderConfig:
    """The causal text decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head."""

    num_layers: int = 80
    """Self-attention layers."""
    hidden_size: int = 8192
    """Width of the residual stream."""
    num_attention_heads: int = 64
    """Query heads."""
    num_query_groups: int = 8
    """Key-value heads."""
    ffn_hidden_size: int = 27648
    """Inner width of the SwiGLU MLP."""
    vocab_size: int = 128000
    """Rows of the embedding and the head, at least the tokenizer's vocabulary."""
    rotary_base: float = 500000.0
    """Base of the rotary frequencies."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder."""


@section
class CrossAttentionConfig:
    """Tanh-gated cross-attention sublayers (Flamingo, arXiv:2204.14198) that read image and audio memory."""

    every: int = 10
    """One sublayer before each group of this many decoder layers."""
    num_query_groups: int = 32
    """Key-value heads; query heads are the decoder's. Memory is projected once, so these cost no growing cache."""
    qk_layernorm: bool = True
    """RMSNorm of queries and keys, per head."""
    gate_init: float = 0.0
    """Initial value of the gate before tanh; 0 leaves the decoder as it was."""


@section
class VisionTowerConfig:
    """CLIP's vision transformer (arXiv:2103.00020): class token, learned positions, quick-GELU, no final norm."""

    num_layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width; the memory that cross-attention reads has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    patch_size: int = 14
    """Pixels on a patch's side."""
    image_size: int = 224
    """Pixels on an image's side."""
    max_frames: int = 32
    """Rows of the temporal position table for video frames."""
    frozen: bool = True
    """Keep the tower's weights as loaded (the temporal table stays trainable)."""

    @property
    def tokens_per_image(self) -> int:
        """Memory positions of one image or frame: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@section
class AudioTowerConfig:
    """Whisper's encoder (arXiv:2212.04356) on log-mel spectrograms of fixed length."""

    num_layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width; the memory that cross-attention reads has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    num_mel_bins: int = 80
    """Mel bands."""
    sample_rate: int = 16000
    """Samples a second; sounds of another rate are resampled."""
    seconds: float = 30.0
    """Length to which every sound is padded or cut."""
    frozen: bool = False
    """Keep the tower's weights as loaded."""

    @property
    def num_frames(self) -> int:
        """Spectrogram frames of one sound (10 ms hop)."""
        return round(self.seconds * 100)

    @property
    def tokens_per_sound(self) -> int:
        """Memory positions of one sound: the second convolution has stride 2."""
        return self.num_frames // 2


@section
class SynapseConfig:
    """Synapse-70B: a decoder that reads image, video and audio memory through gated cross-attention."""

    system: Literal["synapse"] = "synapse"
    """Name of the system."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: Transformer Engine on CUDA, plain torch elsewhere; auto chooses."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    hidden_dropout: float = 0.0
    """Dropout on each sublayer's output."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    cross_attention: CrossAttentionConfig = Field(default_factory=CrossAttentionConfig)
    vision: VisionTowerConfig = Field(default_factory=VisionTowerConfig)
    audio: AudioTowerConfig = Field(default_factory=AudioTowerConfig)


# ------------------------------------------------------------------------------------------------------- the rest


@section
class ParallelConfig:
    """How the model and the batch are divided over processes. Data parallel = world size / (TP × PP × CP)."""

    tensor_model_parallel_size: Annotated[int, _megatron("tensor-model-parallel-size")] = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: Annotated[int, _megatron("pipeline-model-parallel-size")] = 1
    """Processes in the pipeline."""
    virtual_pipeline_model_parallel_size: Annotated[
        int | None, _megatron("virtual-pipeline-model-parallel-size")
    ] = None
    """Chunks a pipeline stage holds in the interleaved schedule."""
    context_parallel_size: Annotated[int, _megatron("context-parallel-size")] = 1
    """Processes that share each text sequence."""
    sequence_parallel: Annotated[bool, _megatron("sequence-parallel")] = False
    """Shard norms and dropout of text over the tensor-parallel group."""
    use_distributed_optimizer: Annotated[bool, _megatron("use-distributed-optimizer")] = False
    """Shard optimizer state over data-parallel processes."""
    recompute_granularity: Annotated[
        Literal["none", "selective", "full"], _megatron("recompute-granularity")
    ] = "none"
    """Activations to recompute in the backward pass: none, core attention, or whole layers."""
    pipeline_cuts: list[str] | None = None
    """Names of the nodes that begin chunks 2, 3, …; null lets the partitioner choose."""
    world_size: Annotated[int | None, _megatron("world-size")] = None
    """Processes that a dry run plans for; null: those it was started on. A real run has what torchrun starts."""
    distributed_timeout_minutes: Annotated[float, _megatron("distributed-timeout-minutes")] = 10.0
    """Minutes after which a hung collective ends the run with every rank's stacks."""


@section
class DatasetConfig:
    """One dataset of a blend."""

    path: str
    """Prefix of a text shard (without .bin) or folder that tools/preprocess_multimodal.py wrote."""
    weight: float = 1.0
    """Share of the samples, relative to the other datasets."""


@section
class DataConfig:
    """What is read, and in which order."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    """The blend."""
    tokenizer: str | None = None
    """SentencePiece model that made the shards."""
    split: str = "969,30,1"
    """Proportions of train, validation and test documents."""
    seq_length: Annotated[int, _megatron("seq-length")] = 4096
    """Tokens of one sample (a row of packed documents)."""
    max_images_per_sample: int = 8
    """Most images and video frames in one row."""
    max_sounds_per_sample: int = 2
    """Most sounds in one row."""
    frames_per_video: int = 8
    """Frames taken from a video, evenly spaced."""
    random_crop: bool = True
    """Random crop of training images (scale 0.5–1 of the area); false: resize and centre crop, as in validation."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Channel means of image normalisation (CLIP's)."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Channel deviations of image normalisation (CLIP's)."""
    num_workers: Annotated[int, _megatron("num-workers")] = 2
    """Reader processes a rank; 0 reads in the training process."""
    log_sample_ids: bool = False
    """Write the document ids of every step to metrics.jsonl."""


@section
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, _megatron("lr")] = 3e-5
    """Peak learning rate."""
    min_lr: Annotated[float, _megatron("min-lr")] = 1e-6
    """Learning rate at the end of the decay."""
    lr_warmup_iters: Annotated[int, _megatron("lr-warmup-iters")] = 2000
    """Steps of linear warm-up."""
    lr_decay_iters: Annotated[int | None, _megatron("lr-decay-iters")] = None
    """Step at which the cosine ends; null: the last step."""
    weight_decay: Annotated[float, _megatron("weight-decay")] = 0.1
    """Decay of matrices; norms, biases and gates have none."""
    adam_beta1: Annotated[float, _megatron("adam-beta1")] = 0.9
    """Adam's first moment."""
    adam_beta2: Annotated[float, _megatron("adam-beta2")] = 0.95
    """Adam's second moment."""
    adam_eps: Annotated[float, _megatron("adam-eps")] = 1e-6
    """Adam's epsilon."""
    clip_grad: Annotated[float, _megatron("clip-grad")] = 1.0
    """Largest global gradient norm; 0 clips nothing."""


@section
class TrainingConfig:
    """Batch, length and precision of the run."""

    micro_batch_size: Annotated[int, _megatron("micro-batch-size")] = 1
    """Samples a process handles at once."""
    global_batch_size: Annotated[int, _megatron("global-batch-size")] = 1024
    """Samples a step."""
    train_iters: Annotated[int, _megatron("train-iters")] = 100000
    """Steps of the run."""
    seed: Annotated[int, _megatron("seed")] = 1234
    """Seed of weights, order, augmentation and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the layers; master weights and optimizer are fp32."""
    eval_interval: Annotated[int, _megatron("eval-interval")] = 1000
    """Steps between validations; 0 never validates."""
    eval_iters: Annotated[int, _megatron("eval-iters")] = 10
    """Global batches of one validation."""


@section
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    save: Annotated[str | None, _megatron("save")] = None
    """Folder of checkpoints; null: OUTPUT/checkpoints."""
    load: Annotated[str | None, _megatron("load")] = None
    """Folder to resume from; null: the folder of `save`, if it holds a checkpoint."""
    save_interval: Annotated[int, _megatron("save-interval")] = 1000
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 3
    """Checkpoints kept; 0 keeps all."""
    pretrained: str | None = None
    """Checkpoint (from tools/convert_checkpoint.py or another run) whose weights start a new run."""


@section
class LoggingConfig:
    """Where figures go."""

    output: str = "outputs/run"
    """Folder of metrics.jsonl, config.yaml, TensorBoard events and checkpoints."""
    log_interval: Annotated[int, _megatron("log-interval")] = 10
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

    model: SynapseConfig = Field(default_factory=SynapseConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    dry_run: bool = False
    """Build and run one microbatch of every pipeline stage without data or devices, print its costs, and end."""
    dry_run_json: str | None = None
    """Also write the dry run's figures to this file."""
