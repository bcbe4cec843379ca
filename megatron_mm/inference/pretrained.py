"""Pretrained Hugging Face CLIP, Whisper and Llama weights as a checkpoint from which a recipe's run starts.

The exported model keeps their names inside its own (`model.vision_tower.` is CLIP's `vision_model.`), so an import is
the list of entries with the source's prefix. Everything is checked from configurations and file headers before a
tensor is read: a function that would differ (heads, activation, rotary base, …) is refused like a shape that does not
fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import Config
from megatron_mm.inference.convert import DTYPES, merge, read_json, write_training_checkpoint
from megatron_mm.inference.hf.modeling_synapse import sinusoids
from megatron_mm.inference.names import Entry, Part
from megatron_mm.inference.safetensors_stream import SafetensorsFolder
from megatron_mm.inference.systems.synapse import synapse_entries

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Source:
    """How one kind of pretrained checkpoint maps into the exported model's names."""

    kind: str
    ours: tuple[str, ...]
    """Prefixes of our Hugging Face names that this source fills."""
    theirs: tuple[str, ...]
    """Prefixes that stand in place of `strip` in the source, tried in order."""
    strip: str
    expected: Callable[[Config], dict[str, object]]
    """Fields of the source's config.json and the values that the recipe needs."""
    skipped: tuple[str, ...] = ()
    """Our names under `ours` that the source does not have; they keep their initial values."""
    defaults: dict[str, object] = field(default_factory=dict)
    """Values of fields that a config.json may leave out."""


def _clip(config: Config) -> dict[str, object]:
    tower = config.model.vision
    return {
        "hidden_size": tower.hidden_size, "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_attention_heads, "intermediate_size": tower.ffn_hidden_size,
        "patch_size": tower.patch_size, "image_size": tower.image_size, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }  # fmt: skip


def _whisper(config: Config) -> dict[str, object]:
    tower = config.model.audio
    return {
        "d_model": tower.hidden_size, "encoder_layers": tower.num_layers,
        "encoder_attention_heads": tower.num_attention_heads, "encoder_ffn_dim": tower.ffn_hidden_size,
        "num_mel_bins": tower.num_mel_bins, "activation_function": "gelu", "scale_embedding": False,
    }  # fmt: skip


def _llama(config: Config) -> dict[str, object]:
    decoder = config.model.decoder
    return {
        "hidden_size": decoder.hidden_size, "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads, "num_key_value_heads": decoder.num_query_groups,
        "intermediate_size": decoder.ffn_hidden_size, "rms_norm_eps": decoder.layernorm_epsilon,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "head_dim": decoder.hidden_size // decoder.num_attention_heads,
        "rope_theta": decoder.rotary_base, "rope_type": "default",
    }  # fmt: skip


SOURCES = {
    "clip": Source(
        "CLIP", ("model.vision_tower.",), ("vision_model.", "", "model.vision_model."), "model.vision_tower.", _clip,
        ("model.vision_tower.temporal_embedding.weight",),
        {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
    ),
    "whisper": Source(
        "Whisper", ("model.audio_tower.",), ("model.encoder.", "encoder.", ""), "model.audio_tower.", _whisper, (),
        {
            "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
            "num_mel_bins": 80, "activation_function": "gelu", "scale_embedding": False,
        },
    ),
    "llama": Source(
        "Llama", ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."), ("", "language_model."), "",
        _llama, (),
        {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    ),
}  # fmt: skip


def _their_config(kind: str, folder: Path) -> dict:
    fields = read_json(folder / "config.json")
    if kind == "clip":
        fields = fields.get("vision_config") or fields
    if kind == "llama":
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        heads = fields.get("num_attention_heads", 32)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        fields = {
            "rope_theta": rope.get("rope_theta", 10000.0), "rope_type": rope_type,
            "num_key_value_heads": heads, "head_dim": fields.get("hidden_size", 4096) // heads,
            **{k: v for k, v in fields.items() if v is not None},
        }  # fmt: skip
    return {**SOURCES[kind].defaults, **fields}


class _Weights:
    """The tensors of one pretrained folder under our names."""

    def __init__(self, kind: str, folder: Path, config: Config, resize_vocab: bool):
        self.source, self.folder, self.resize_vocab = SOURCES[kind], folder, resize_vocab
        self.files = SafetensorsFolder(folder)
        fields = _their_config(kind, folder)
        differ = [
            f"{name} is {fields.get(name)!r} in the checkpoint, {wanted!r} in the recipe"
            for name, wanted in self.source.expected(config).items()
            if fields.get(name) != wanted
        ]
        self.config_problem = f"{folder}/config.json does not fit the recipe: {'; '.join(differ)}" if differ else None
        self.entries = [
            entry for entry in synapse_entries(config.model)
            if entry.parts[0].name.startswith(self.source.ours) and entry.parts[0].name not in self.source.skipped
        ]  # fmt: skip
        first = self.entries[0].parts[0].name.removeprefix(self.source.strip)
        prefixes = [prefix for prefix in self.source.theirs if prefix + first in self.files]
        if not prefixes:
            raise ValueError(
                f"{folder}: no {self.source.kind} checkpoint, it lacks {self.source.theirs[0]}{first} (it has, for "
                f"example, {', '.join(self.files.names[:3])})"
            )
        self.prefix = prefixes[0]
        self.tied = bool(fields.get("tie_word_embeddings"))

    def name(self, part: Part) -> str:
        """The source's name of one of our parts."""
        name = self.prefix + part.name.removeprefix(self.source.strip)
        if part.name == "lm_head.weight" and name not in self.files and self.tied:
            name = self.prefix + VOCABULARY[0]
        return name

    def check(self) -> None:
        """Refuse what is missing or does not fit, before anything is read or written."""
        for entry in self.entries:
            for part in entry.parts:
                if part.name is None:
                    continue
                name = self.name(part)
                if name not in self.files:
                    detail = f"; {self.config_problem}" if self.config_problem else ""
                    raise ValueError(f"{self.folder}: lacks {name}, which the recipe needs{detail}")
                shape = self.files.shape(name)
                wanted = entry.part_shape(part)
                if part.name in VOCABULARY and shape[0] != wanted[0] and shape[1:] == wanted[1:]:
                    if not self.resize_vocab:
                        raise ValueError(
                            f"{self.folder}: {name} has {shape[0]} rows, model.decoder.vocab_size is {wanted[0]}; set "
                            f"it to {shape[0]} and use that model's tokenizer, or pass --resize-vocab"
                        )
                    continue
                entry.check_part(part, shape, f"{self.folder}: {name}")
        if self.config_problem:
            raise ValueError(self.config_problem)
        if self.source is SOURCES["whisper"]:
            self._check_positions()

    def _check_positions(self) -> None:
        """Our positions are computed; Whisper stores the same numbers, and another model may not."""
        name = self.prefix + "embed_positions.weight"
        if name in self.files:
            stored = self.files.read(name).float()
            if not torch.allclose(stored, sinusoids(*stored.shape, "cpu"), atol=2e-2):
                raise ValueError(f"{self.folder}: {name} is not Whisper's sinusoid table")

    def read(self, entry: Entry, part: Part) -> torch.Tensor:
        """One tensor, its vocabulary resized where that was asked for."""
        tensor = self.files.read(self.name(part))
        rows = entry.part_shape(part)[0]
        if part.name in VOCABULARY and tensor.shape[0] != rows:
            return resize_rows(tensor, rows)
        return tensor


def resize_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` rows; rows beyond those that there are get the mean of all, so that no logit stands out."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    out = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype)
    out[: tensor.shape[0]] = tensor
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for piece in tensor.split(4096):  # a float64 copy of the whole embedding would be four times its size
        total += piece.sum(dim=0, dtype=torch.float64)
    out[tensor.shape[0] :] = (total / tensor.shape[0]).to(tensor.dtype)
    return out


def import_pretrained(
    config: str | Path,
    output: str | Path,
    clip: str | Path | None = None,
    whisper: str | Path | None = None,
    llama: str | Path | None = None,
    resize_vocab: bool = False,
    dtype: str = "fp32",
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Pretrained folders -> a checkpoint that holds the nodes they fill, for `checkpoint.init_from`.

    Args:
        config: recipe whose model the weights enter.
        output: folder of checkpoints to make; it will hold `iter_0000000`.
        clip: folder of a CLIPModel or CLIPVisionModel.
        whisper: folder of a Whisper model (its encoder is used).
        llama: folder of a LlamaForCausalLM.
        resize_vocab: cut or extend Llama's vocabulary to the recipe's instead of refusing.
        dtype: type to store, "fp32" or "bf16".
        overwrite: replace what `output` holds.
        quiet: no progress bar.

    Raises:
        ValueError: no source; a file that is missing, damaged or of another architecture; a tensor that does not fit
            (named with both shapes); a vocabulary of another size.
    """
    tree = load_config(config)
    folders = {"clip": clip, "whisper": whisper, "llama": llama}
    sources = [_Weights(kind, Path(folder), tree, resize_vocab) for kind, folder in folders.items() if folder]
    if not sources:
        raise ValueError("nothing to import: pass --clip, --whisper or --llama with the folder of a model")
    for source in sources:
        source.check()
    owner = {entry.training: source for source in sources for entry in source.entries}

    def make(entry: Entry) -> torch.Tensor:
        source = owner[entry.training]
        return merge(entry, lambda part: source.read(entry, part))

    entries = [entry for source in sources for entry in source.entries]
    return write_training_checkpoint(
        Path(output), tree, entries, make, DTYPES[dtype], None, overwrite, quiet, "import-pretrained"
    )
