"""Training parameters and Hugging Face tensors: which is which, as data, with the arithmetic between them.

Training fuses what tensor parallelism shards together: queries, keys and values (grouped per key-value head), the keys
and values of a memory, gate and up projections. Hugging Face files keep them apart. An `Entry` names one training
tensor, the Hugging Face tensors that it is made of, and how; `synapse_entries` lists those of a whole model. Export,
restore and the import of pretrained CLIP, Whisper and Llama weights all walk that one list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_mm.config.systems import SynapseConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor within a training tensor: `per_group` × `head_dim` rows of each group."""

    name: str | None
    """Hugging Face name; None for rows that Hugging Face leaves out, which are zero (Whisper's key bias)."""
    per_group: int = 1


@dataclass(frozen=True)
class Entry:
    """One training tensor [groups · Σ per_group · unit, …] and its parts, whose rows alternate within each group."""

    training: str
    parts: tuple[Part, ...]
    groups: int
    unit: int
    trailing: Shape

    @property
    def shape(self) -> Shape:
        """Shape of the training tensor."""
        return (self.groups * sum(p.per_group for p in self.parts) * self.unit, *self.trailing)

    def part_shape(self, part: Part) -> Shape:
        """Shape of one part as Hugging Face stores it."""
        return (self.groups * part.per_group * self.unit, *self.trailing)

    def part_view(self, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """The rows of `part` in the training tensor: a view [groups, per_group · unit, …].

        Raises:
            ValueError: `tensor` has not the training shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.training} has shape {list(tensor.shape)}; the model has {list(self.shape)}")
        start = 0
        for other in self.parts:
            if other is part:
                break
            start += other.per_group * self.unit
        return tensor.reshape(self.groups, -1, *self.trailing)[:, start : start + part.per_group * self.unit]

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Training tensor -> its named Hugging Face tensors, one at a time."""
        for part in self.parts:
            if part.name is not None:
                yield part.name, self.part_view(tensor, part).reshape(self.part_shape(part))

    def fill(self, out: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
        """Copy a Hugging Face tensor into its rows of the training tensor `out`.

        Raises:
            ValueError: the tensor does not fit; names it and both shapes.
        """
        self.check_part(part, tuple(tensor.shape))
        view = self.part_view(out, part)
        view.copy_(tensor.reshape(view.shape))

    def check_part(self, part: Part, shape: Shape, source: str | None = None) -> None:
        """Refuse a Hugging Face tensor of another shape, naming it and both shapes."""
        if tuple(shape) != self.part_shape(part):
            raise ValueError(
                f"{source or part.name} has shape {list(shape)}; the recipe needs {list(self.part_shape(part))} "
                f"(for {self.training})"
            )


def plain(training: str, hf: str, *shape: int) -> Entry:
    """A tensor that is the same on both sides."""
    return Entry(training, (Part(hf),), groups=1, unit=shape[0], trailing=tuple(shape[1:]))


def stacked(training: str, hf: list[str], rows: int, *trailing: int) -> Entry:
    """Tensors of `rows` rows each, one after the other."""
    return Entry(training, tuple(Part(name) for name in hf), groups=1, unit=rows, trailing=trailing)


def norm(training: str, hf: str, size: int, bias: bool) -> Iterator[Entry]:
    """Weight of a norm, and its bias."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield plain(f"{training}.{kind}", f"{hf}.{kind}", size)


def _tower_layers(training: str, hf: str, tower, names: dict[str, str], key_bias: bool) -> Iterator[Entry]:
    """Layers of an encoder with biases and LayerNorm; `names` are the Hugging Face names inside a layer."""
    size, heads, ffn = tower.hidden_size, tower.num_attention_heads, tower.ffn_hidden_size
    for i in range(tower.num_layers):
        node, layer = f"{training}.{i}", f"{hf}.{i}"
        attention = f"{layer}.self_attn"
        yield from norm(f"{node}.input_layernorm", f"{layer}.{names['attention_norm']}", size, bias=True)
        for kind, trailing in (("weight", (size,)), ("bias", ())):
            key = None if kind == "bias" and not key_bias else f"{attention}.k_proj.{kind}"
            parts = (Part(f"{attention}.q_proj.{kind}"), Part(key), Part(f"{attention}.v_proj.{kind}"))
            yield Entry(f"{node}.self_attention.linear_qkv.{kind}", parts, heads, size // heads, trailing)
        yield plain(f"{node}.self_attention.linear_proj.weight", f"{attention}.out_proj.weight", size, size)
        yield plain(f"{node}.self_attention.linear_proj.bias", f"{attention}.out_proj.bias", size)
        yield from norm(f"{node}.pre_mlp_layernorm", f"{layer}.{names['mlp_norm']}", size, bias=True)
        for linear, rows, columns in (("fc1", ffn, size), ("fc2", size, ffn)):
            yield plain(f"{node}.mlp.linear_{linear}.weight", f"{layer}.{names[linear]}.weight", rows, columns)
            yield plain(f"{node}.mlp.linear_{linear}.bias", f"{layer}.{names[linear]}.bias", rows)


def _vision(config: SynapseConfig) -> Iterator[Entry]:
    tower, hf = config.vision, "model.vision_tower"
    size = tower.hidden_size
    embeddings = "vision.embeddings"
    patch = (size, 3, tower.patch_size, tower.patch_size)
    yield plain(f"{embeddings}.patch_embedding.weight", f"{hf}.embeddings.patch_embedding.weight", *patch)
    yield plain(f"{embeddings}.class_embedding", f"{hf}.embeddings.class_embedding", size)
    yield plain(
        f"{embeddings}.position_embedding", f"{hf}.embeddings.position_embedding.weight", tower.tokens_per_image, size
    )
    yield from norm(f"{embeddings}.pre_layernorm", f"{hf}.pre_layrnorm", size, bias=True)
    names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    yield from _tower_layers("vision.layers", f"{hf}.encoder.layers", tower, names, key_bias=True)
    yield plain("vision.temporal.position_embedding", f"{hf}.temporal_embedding.weight", tower.max_frames, size)


def _audio(config: SynapseConfig) -> Iterator[Entry]:
    tower, hf = config.audio, "model.audio_tower"
    size = tower.hidden_size
    for name, channels in (("conv1", tower.num_mel_bins), ("conv2", size)):
        yield plain(f"audio.embeddings.{name}.weight", f"{hf}.{name}.weight", size, channels, 3)
        yield plain(f"audio.embeddings.{name}.bias", f"{hf}.{name}.bias", size)
    names = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "fc1": "fc1", "fc2": "fc2"}
    yield from _tower_layers("audio.layers", f"{hf}.layers", tower, names, key_bias=False)
    yield from norm("audio.output.final_layernorm", f"{hf}.layer_norm", size, bias=True)


def _decoder_layer(config: SynapseConfig, i: int) -> Iterator[Entry]:
    decoder = config.decoder
    size, ffn, groups = decoder.hidden_size, decoder.ffn_hidden_size, decoder.num_query_groups
    node, hf = f"decoder.layers.{i}", f"model.layers.{i}"
    parts = (
        Part(f"{hf}.self_attn.q_proj.weight", decoder.num_attention_heads // groups),
        Part(f"{hf}.self_attn.k_proj.weight"),
        Part(f"{hf}.self_attn.v_proj.weight"),
    )
    head_dim = size // decoder.num_attention_heads
    yield from norm(f"{node}.input_layernorm", f"{hf}.input_layernorm", size, bias=False)
    yield Entry(f"{node}.self_attention.linear_qkv.weight", parts, groups, head_dim, (size,))
    yield plain(f"{node}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", size, size)
    yield from norm(f"{node}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", size, bias=False)
    gate_up = [f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"]
    yield stacked(f"{node}.mlp.linear_fc1.weight", gate_up, ffn, size)
    yield plain(f"{node}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight", size, ffn)


def _cross_layer(config: SynapseConfig, j: int) -> Iterator[Entry]:
    size, heads = config.decoder.hidden_size, config.decoder.num_attention_heads
    head_dim, groups = size // heads, config.cross_attention.num_query_groups
    node, hf = f"decoder.cross_layers.{j}", f"model.cross_layers.{j}"
    yield from norm(f"{node}.input_layernorm", f"{hf}.input_layernorm", size, bias=False)
    yield plain(f"{node}.linear_q.weight", f"{hf}.cross_attn.q_proj.weight", size, size)
    for memory, width in (("image", config.vision.hidden_size), ("audio", config.audio.hidden_size)):
        parts = tuple(Part(f"{hf}.cross_attn.{kind}_proj_{memory}.weight") for kind in "kv")
        yield Entry(f"{node}.linear_kv_{memory}.weight", parts, groups, head_dim, (width,))
    if config.cross_attention.qk_layernorm:
        for kind in "qk":
            yield from norm(f"{node}.{kind}_layernorm", f"{hf}.cross_attn.{kind}_norm", head_dim, bias=False)
    yield plain(f"{node}.linear_proj.weight", f"{hf}.cross_attn.o_proj.weight", size, size)
    yield plain(f"{node}.gate", f"{hf}.gate", 1)


def synapse_entries(config: SynapseConfig) -> list[Entry]:
    """Every parameter of a Synapse model, in the order of its nodes."""
    decoder = config.decoder
    entries = [*_vision(config), *_audio(config)]
    vocabulary = (decoder.vocab_size, decoder.hidden_size)
    entries.append(plain("decoder.embedding.word_embeddings.weight", "model.embed_tokens.weight", *vocabulary))
    for i in range(decoder.num_layers):
        if i % config.cross_attention.every == 0:
            entries += _cross_layer(config, i // config.cross_attention.every)
        entries += _decoder_layer(config, i)
    entries += norm("decoder.output.final_layernorm", "model.norm", decoder.hidden_size, bias=False)
    entries.append(plain("decoder.output.output_layer.weight", "lm_head.weight", *vocabulary))
    return entries


#: Spelling of a layer's norms in checkpoints: megatron-core keeps Transformer Engine's fused names in both backends.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def checkpoint_key(training: str) -> str:
    """The key under which a checkpoint holds a training parameter.

    Only transformer layers fuse their norms; `decoder.cross_layers` keep the plain name.
    """
    if ".layers." in training:
        for plain, fused in FUSED_NORMS.items():
            training = training.replace(plain, fused)
    return training
