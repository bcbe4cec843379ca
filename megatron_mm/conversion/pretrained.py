"""Weights of pretrained Hugging Face models as a checkpoint from which a recipe's run starts.

The exported model keeps the names of its sources where it can, so an import is the list of entries of a part's nodes,
with the family's names in place of ours (families.py). Everything is checked from configurations and file headers
before a tensor is read: a family that does not fit the system, and a function that would differ (heads, activation,
rotary base, …), are refused like a shape that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import Config
from megatron_mm.conversion.convert import DTYPES, merge, write_training_checkpoint
from megatron_mm.conversion.families import FAMILIES, Family, Stored, check_fits, section_in
from megatron_mm.conversion.hf_folder import read_json
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder
from megatron_mm.models.names import Entry, Part
from megatron_mm.systems.export import model_nodes


class _Weights:
    """The tensors of one pretrained folder under our names."""

    def __init__(self, family: Family, folder: Path, config: Config, resize_vocab: bool):
        check_fits(family, config.model)
        self.family, self.folder, self.resize_vocab = family, folder, resize_vocab
        self.path, section = section_in(config.model, family.kind)
        self.files = SafetensorsFolder(folder)
        raw = read_json(folder / "config.json")
        if raw.get("model_type", family.model_types[0]) not in family.model_types:
            raise ValueError(
                f"{folder}: no {family.name} checkpoint, its config.json says model_type {raw['model_type']!r}"
            )
        fields = {**family.defaults, **family.fields(raw)}
        self.tied = bool(fields.get("tie_word_embeddings"))
        entries = family.entries(model_nodes(config.model))
        if not entries:
            raise ValueError(
                f"{family.name} does not fit {config.model.system}: {self.path} is a part that it could fill, and the "
                f"graph has no nodes {' or '.join(f'{name}…' for name in family.nodes)} with names that are known here"
            )
        self.prefix = self._prefix(entries[0])
        if family.optional and not any(self._there(e.parts[0]) for e in entries if self._is_optional(e)):
            entries = [entry for entry in entries if not self._is_optional(entry)]
        self.entries = entries
        differ = [
            f"{name} is {fields.get(name)!r} in the checkpoint, {wanted!r} in the recipe"
            for name, wanted in family.expected(section, config.model, [e.parts[0].name for e in entries]).items()
            if fields.get(name) != wanted
        ]
        self.config_problem = f"{folder}/config.json does not fit the recipe: {'; '.join(differ)}" if differ else None

    def _prefix(self, first: Entry) -> str:
        candidates = self.family.locate(first.parts[0].name)
        for prefix in self.family.prefixes:
            if any(prefix + stored.name in self.files for stored in candidates):
                return prefix
        raise ValueError(
            f"{self.folder}: no {self.family.name} checkpoint, it lacks {self.family.prefixes[0]}{candidates[0].name} "
            f"(it has, for example, {', '.join(self.files.names[:3])})"
        )

    def _is_optional(self, entry: Entry) -> bool:
        return entry.parts[0].name.startswith(self.family.optional)

    def _there(self, part: Part) -> bool:
        return any(self.prefix + stored.name in self.files for stored in self.family.locate(part.name))

    def locate(self, part: Part) -> tuple[str, Stored]:
        """The source's name of what holds one of our parts, and where in it.

        Raises:
            ValueError: there is none.
        """
        candidates = self.family.locate(part.name)
        for stored in candidates:
            if self.prefix + stored.name in self.files:
                return self.prefix + stored.name, stored
        if part.name == "lm_head.weight" and self.tied:
            return self.locate(Part(self.family.vocabulary[0]))
        detail = f"; {self.config_problem}" if self.config_problem else ""
        name = self.prefix + candidates[0].name
        raise ValueError(f"{self.folder}: lacks {name}, which the recipe needs{detail}")

    def check(self) -> None:
        """Refuse what is missing or does not fit, before anything is read or written."""
        for entry in self.entries:
            for part in entry.parts:
                if part.name is not None:
                    self._check_part(entry, part)
        if self.config_problem:
            raise ValueError(self.config_problem)
        for name, table in self.family.computed.items():
            self._check_positions(self.prefix + name, table)

    def _check_part(self, entry: Entry, part: Part) -> None:
        name, stored = self.locate(part)
        shape, wanted = stored.shape(self.files.shape(name)), entry.part_shape(part)
        if part.name in self.family.vocabulary and shape[0] != wanted[0] and shape[1:] == wanted[1:]:
            if not self.resize_vocab:
                raise ValueError(
                    f"{self.folder}: {name} has {shape[0]} rows, {self.path}.vocab_size is {wanted[0]}; set it to "
                    f"{shape[0]} and use that model's tokenizer, or pass --resize-vocab"
                )
        elif part.name == self.family.positions and shape[0] != wanted[0] and shape[1:] == wanted[1:]:
            if shape[0] < wanted[0]:
                raise ValueError(
                    f"{self.folder}: {name} has positions for {shape[0]} tokens, {self.path}.max_positions is "
                    f"{wanted[0]}; lower it, with data.seq_length"
                )
        else:
            entry.check_part(part, shape, f"{self.folder}: {name}")

    def _check_positions(self, name: str, table: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Our positions are computed; the source stores the same numbers, and another model may not."""
        if name in self.files:
            stored = self.files.read(name).float().squeeze(0)
            if not torch.allclose(stored, table(stored), atol=2e-2):
                raise ValueError(f"{self.folder}: {name} is not {self.family.name}'s table of sines and cosines")

    def read(self, entry: Entry, part: Part) -> torch.Tensor:
        """One tensor, its vocabulary resized where that was asked for."""
        name, stored = self.locate(part)
        tensor, rows = stored.take(self.files.read(name)), entry.part_shape(part)[0]
        if part.name in self.family.vocabulary or part.name == self.family.positions:
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
    *,
    resize_vocab: bool = False,
    dtype: str = "fp32",
    overwrite: bool = False,
    quiet: bool = False,
    **folders: str | Path | None,
) -> Path:
    """Pretrained folders -> a checkpoint that holds the nodes they fill, for `checkpoint.init_from`.

    Args:
        config: recipe whose model the weights enter.
        output: folder of checkpoints to make; it will hold `iter_0000000`.
        resize_vocab: cut or extend a text model's vocabulary to the recipe's instead of refusing.
        dtype: type to store, "fp32" or "bf16".
        overwrite: replace what `output` holds.
        quiet: no progress bar.
        folders: by family (`families.FAMILIES`): clip (a CLIPModel or CLIPVisionModel), whisper (its encoder is used),
            llama, gpt2, opt, vit_mae (with its decoder, where the recipe's phase has one).

    Raises:
        ValueError: no source, or two for one part; a family that does not fit the system; a file that is missing,
            damaged or of another architecture; a tensor that does not fit (named with both shapes); a vocabulary of
            another size.
    """
    tree = load_config(config)
    given = {FAMILIES[option]: Path(folder) for option, folder in folders.items() if folder}
    if not given:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in FAMILIES)
        raise ValueError(f"nothing to import: pass one of {options} with the folder of a model")
    by_part: dict[str, Family] = {}
    for family in given:
        if by_part.setdefault(family.part, family) is not family:
            raise ValueError(f"both {by_part[family.part].name} and {family.name} would fill the {family.part} part")
    sources = [_Weights(family, folder, tree, resize_vocab) for family, folder in given.items()]
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
