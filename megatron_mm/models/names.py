"""Training parameters and Hugging Face tensors: which is which, as data, with the arithmetic between them.

Training fuses what tensor parallelism shards together: queries, keys and values (grouped per key-value head), the keys
and values of a memory, gate and up projections. Hugging Face files keep them apart. An `Entry` names one training
tensor, the Hugging Face tensors that it is made of, and how. A kind of layer lists those of its weights, and a graph
those of its nodes (models/graph.py); export, restore and the import of pretrained weights all walk that one list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

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


def linear(training: str, hf: str, rows: int, columns: int, bias: bool = True) -> Iterator[Entry]:
    """Weight [rows, columns] of a linear layer, and its bias."""
    yield plain(f"{training}.weight", f"{hf}.weight", rows, columns)
    if bias:
        yield plain(f"{training}.bias", f"{hf}.bias", rows)


def query_key_value(
    training: str, hf: tuple[str, str, str], heads: int, head_dim: int, columns: int, bias: bool = True
) -> Iterator[Entry]:
    """megatron-core's fused projection (of each head the query, the key, the value) from three linear layers."""
    for kind, trailing in (("weight", (columns,)), ("bias", ())) if bias else (("weight", (columns,)),):
        yield Entry(training + f".{kind}", tuple(Part(f"{name}.{kind}") for name in hf), heads, head_dim, trailing)


@dataclass(frozen=True)
class LayerNames:
    """Names of a layer's parts in the exported model, below the layer's own."""

    attention_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    mlp_norm: str
    fc1: tuple[str, ...]
    """One linear layer, or gate and up projection of a gated MLP."""
    fc2: str
    key_bias: bool = True
    """Whether keys have a bias where queries have one."""


def _layer_names(attention_norm: str, attention: str, output: str, mlp_norm: str, fc1, fc2: str, **kind) -> LayerNames:
    query, key, value = (f"{attention}.{letter}_proj" for letter in "qkv")
    return LayerNames(attention_norm, query, key, value, f"{attention}.{output}", mlp_norm, fc1, fc2, **kind)


#: Llama's, of a gated MLP without biases.
LLAMA = _layer_names(
    "input_layernorm",
    "self_attn",
    "o_proj",
    "post_attention_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
CLIP = _layer_names("layer_norm1", "self_attn", "out_proj", "layer_norm2", ("mlp.fc1",), "mlp.fc2")
WHISPER = _layer_names(
    "self_attn_layer_norm", "self_attn", "out_proj", "final_layer_norm", ("fc1",), "fc2", key_bias=False
)
OPT = _layer_names("self_attn_layer_norm", "self_attn", "out_proj", "final_layer_norm", ("fc1",), "fc2")
#: Of ViT-MAE, and of the parts that have no model of their own at Hugging Face.
VIT = _layer_names("layernorm_before", "attention", "o_proj", "layernorm_after", ("mlp.fc1",), "mlp.fc2")


def self_attention_names(
    node: str, exported: str, names: LayerNames, hidden: int, heads: int, groups: int, bias: bool, norm_bias: bool
) -> Iterator[Entry]:
    """Norm, fused queries, keys and values, and output projection of a layer of self-attention.

    Args:
        groups: key-value heads.
        norm_bias: the norm has a bias.
    """
    yield from norm(f"{node}.input_layernorm", f"{exported}.{names.attention_norm}", hidden, bias=norm_bias)
    for kind, trailing in (("weight", (hidden,)), ("bias", ()))[: 2 if bias else 1]:
        key = None if kind == "bias" and not names.key_bias else f"{exported}.{names.key}.{kind}"
        query, value = f"{exported}.{names.query}.{kind}", f"{exported}.{names.value}.{kind}"
        parts = (Part(query, heads // groups), Part(key), Part(value))
        yield Entry(f"{node}.self_attention.linear_qkv.{kind}", parts, groups, hidden // heads, trailing)
    yield from linear(
        f"{node}.self_attention.linear_proj", f"{exported}.{names.attention_output}", hidden, hidden, bias=bias
    )


def mlp_names(
    node: str, exported: str, names: LayerNames, hidden: int, ffn: int, bias: bool, norm_bias: bool
) -> Iterator[Entry]:
    """Norm and both projections of an MLP."""
    yield from norm(f"{node}.pre_mlp_layernorm", f"{exported}.{names.mlp_norm}", hidden, bias=norm_bias)
    fc1, fc2 = f"{node}.mlp.linear_fc1", f"{node}.mlp.linear_fc2"
    if len(names.fc1) > 1:
        yield stacked(f"{fc1}.weight", [f"{exported}.{name}.weight" for name in names.fc1], ffn, hidden)
        yield plain(f"{fc2}.weight", f"{exported}.{names.fc2}.weight", hidden, ffn)
    else:
        yield from linear(fc1, f"{exported}.{names.fc1[0]}", ffn, hidden, bias=bias)
        yield from linear(fc2, f"{exported}.{names.fc2}", hidden, ffn, bias=bias)


def memory_attention_names(
    node: str, exported: str, hidden: int, heads: int, groups: int, memory_width: int, qk_norm: bool = False
) -> Iterator[Entry]:
    """Attention to a memory, without biases."""
    head_dim = hidden // heads
    yield plain(f"{node}.linear_q.weight", f"{exported}.q_proj.weight", hidden, hidden)
    parts = (Part(f"{exported}.k_proj.weight"), Part(f"{exported}.v_proj.weight"))
    yield Entry(f"{node}.linear_kv.weight", parts, groups, head_dim, (memory_width,))
    if qk_norm:
        for kind in "qk":
            yield from norm(f"{node}.{kind}_layernorm", f"{exported}.{kind}_norm", head_dim, bias=False)
    yield plain(f"{node}.linear_proj.weight", f"{exported}.o_proj.weight", hidden, hidden)


#: Spelling of a layer's norms in checkpoints: megatron-core keeps Transformer Engine's fused names in both backends.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def plain_name(name: str) -> str:
    """The name of a training parameter with its norm on its own, whichever backend's layer has it."""
    for plain, fused in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def checkpoint_key(training: str) -> str:
    """The key under which a checkpoint holds a training parameter.

    Transformer layers fuse their norms. `decoder.cross_layers` have no self-attention: what comes before their queries
    keeps its plain name, what comes before their MLP (if they have one) does not.
    """
    if ".layers." in training:
        for plain, fused in FUSED_NORMS.items():
            training = training.replace(plain, fused)
    elif ".cross_layers." in training:
        training = training.replace("pre_mlp_layernorm.", FUSED_NORMS["pre_mlp_layernorm."])
    return training
