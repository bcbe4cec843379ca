"""Training checkpoints to Hugging Face folders and back.

Both walk the list of entries of the graph's nodes (`systems/export.py: model_entries`) and hold one training tensor and
one of its parts at a time, so that memory stays under twice the largest tensor. `hf_folder.py` has the other files of
an exported folder, `pretrained.py` the import of others' weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.streamed import write_checkpoint_weights
from megatron_mm.config.load import config_from_tree, dump_config, load_config, load_saved_config
from megatron_mm.config.plugins import load_plugins
from megatron_mm.config.schema import Config
from megatron_mm.config.system import SystemConfig
from megatron_mm.conversion.hf_folder import (
    FOREIGN_CODE,
    adapter_of_folder,
    new_folder,
    read_json,
    release_fields,
    renew,
    tokenizer_of_folder,
    write_hf_files,
)
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder, SafetensorsWriter
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer, tokenizer_in
from megatron_mm.models.names import Entry, Part, checkpoint_key
from megatron_mm.systems.export import Adapter, adapter_of, differences, model_entries

#: Fields of config.json that say how long a run's rows were, which another run may choose anew.
ROW_LENGTH = frozenset({"seq_length", "max_position_embeddings"})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_from_hf(fields: dict, source: Path, plugins: Sequence[str] = ()) -> Config:
    """The configuration of an exported model: its architecture and preprocessing, defaults elsewhere.

    Args:
        plugins: of the configuration; they were imported (`config.plugins.load_plugins`).
    """
    try:
        tree = adapter_of_folder(fields, source).tree(fields)
    except KeyError as error:
        raise ValueError(f"{source}: lacks the field {error}") from error
    return config_from_tree(tree | {"plugins": list(plugins)}, source)


# ------------------------------------------------------------------------------------------------------------ folders


def find_checkpoint(path: str | Path) -> Path:
    """A whole checkpoint folder, from itself, a folder of checkpoints (the newest whole one) or a run's output folder.

    Raises:
        ValueError: there is none; says what is wrong with those that are there.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a checkpoint such as OUTPUT/checkpoints/iter_0000100")
    inner = path / "checkpoints"
    return checkpoint_folder.resolve(inner if inner.is_dir() else path)


def tokenizer_of(config: Config, folder: Path) -> Path | None:
    """The tokenizer of a checkpoint: its copy, or the file that its config names; None if neither exists."""
    for candidate in (tokenizer_in(folder), config.data.tokenizer and Path(config.data.tokenizer)):
        if candidate and candidate.exists():
            return candidate
    return None


def opened_tokenizer(file: str | Path | None) -> Tokenizer | None:
    """The tokenizer of a file, if there is one; which special tokens a model needs, `text_fields` says."""
    return None if file is None else open_tokenizer(file, require_media=False)


def chosen_tokenizer(adapter: Adapter, given: str | Path | None, beside: Path | None) -> Tokenizer | None:
    """The tokenizer that an exported model reads: that of the file that the caller gives, else the one beside the
    weights; None where there is none, or the system's processor needs none.

    Raises:
        ValueError: one is given to such a system.
    """
    if adapter.reads_tokenizer:
        return opened_tokenizer(given or beside)
    if given:
        raise ValueError(f"--tokenizer {given}: {adapter.name} reads text without a tokenizer's file; leave it out")
    return None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Ids of the tokenizer's special pieces, and how many pieces it has: further rows of the vocabulary are padding.

    Raises:
        ValueError: the model's vocabulary cannot hold the tokenizer's, or it lacks a special piece.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model's vocabulary {vocab_size} rows; they do "
            "not belong together"
        )
    names = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    missing = [name for name, value in names.items() if value is None]
    if missing:
        raise ValueError(f"{tokenizer.path}: has no {', '.join(missing)}; train it with tools/train_tokenizer.py")
    names["tokenizer_size"] = tokenizer.vocab_size
    return names | ({} if tokenizer.mask_id is None else {"mask_token_id": tokenizer.mask_id})


# ------------------------------------------------------------------------------------------------------------- export


def hf_tensors(config: SystemConfig, reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Named Hugging Face tensors of a training checkpoint, one at a time."""
    for entry in model_entries(config):
        yield from entry.split(reader.read(entry.training))


def _stored(reader: CheckpointReader, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """The weight; where fp32 is wanted of a BF16 run, the optimizer's fp32 master copy of it."""
    master = "optimizer.fp32_param." + entry.training
    if dtype == torch.float32 and master in reader and reader.shape(master) == entry.shape:
        return reader.read(master)
    return reader.read(entry.training)


def check_checkpoint(entries: list[Entry], reader: CheckpointReader) -> None:
    """Refuse a checkpoint that lacks parameters of the model, has them in other shapes or has more, before reading any.

    Weights that no node of the graph names would be left out without a word.
    """
    missing = [e.training for e in entries if e.training not in reader]
    if missing:
        raise ValueError(f"{reader.folder}: lacks {len(missing)} of {len(entries)} parameters, first {missing[0]}")
    for entry in entries:
        if reader.shape(entry.training) != entry.shape:
            raise ValueError(
                f"{reader.folder}: {entry.training} has shape {list(reader.shape(entry.training))}; config.yaml says "
                f"{list(entry.shape)}"
            )
    unnamed = reader.weights() - {key for e in entries for key in (e.training, checkpoint_key(e.training))}
    if unnamed:
        raise ValueError(
            f"{reader.folder}: {len(unnamed)} of its weights have no name in an exported model, first {min(unnamed)}"
        )


def export(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    check: Callable[[Path], None] | None = None,
    plugins: Sequence[str] = (),
) -> Path:
    """Training checkpoint -> Hugging Face folder.

    Args:
        checkpoint: checkpoint folder, or a folder of them.
        output: folder to write.
        dtype: "fp32" or "bf16"; None keeps the stored type.
        max_shard_bytes: most bytes of one safetensors file.
        tokenizer: a file that `open_tokenizer` reads; None: the checkpoint's.
        overwrite: replace an exported folder that is there.
        quiet: no progress bar.
        check: is given the folder before it gets its name; what it raises leaves nothing behind, and a folder that is
            to be replaced stays.
        plugins: files or modules to import, which the checkpoint names in its configuration.

    Raises:
        ValueError: the checkpoint is not whole, or does not fit its configuration, or has no tokenizer; it needs a
            plugin that was not named.
    """
    load_plugins(plugins)
    folder = find_checkpoint(checkpoint)
    config = load_saved_config(folder / "config.yaml")
    adapter, reader = adapter_of(config.model.system, folder / "config.yaml"), CheckpointReader(folder)
    entries = model_entries(config.model)
    check_checkpoint(entries, reader)
    opened = chosen_tokenizer(adapter, tokenizer, tokenizer_of(config, folder))
    text = text_fields(adapter, config.model, opened, folder)
    torch_dtype = DTYPES[dtype] if dtype else reader.dtype(entries[-1].training)

    with new_folder(Path(output), overwrite) as temporary:
        write_hf_files(temporary, adapter, config, text, torch_dtype, opened)
        plan = [(p.name, e.part_shape(p)) for e in entries for p in e.parts if p.name is not None]
        writer = SafetensorsWriter(temporary, plan, torch_dtype, max_shard_bytes)
        for entry in tqdm(entries, desc="export", unit="tensor", disable=quiet):
            for name, tensor in entry.split(_stored(reader, entry, torch_dtype)):
                writer.write(name, tensor)
                del tensor
        writer.close()
        if check is not None:
            check(temporary)
    return Path(output)


def refresh(
    hf_folder: str | Path, check: Callable[[Path], None] | None = None, plugins: Sequence[str] = ()
) -> list[str]:
    """Renews the code of a folder that was exported before, and what its config.json says of releases and tokenizer.

    Weights, tokenizer and all else stay as they are; a modelling file that changes is kept under `replaced-code/`. What
    config.json says of code is renewed too: which classes are loaded, and no code of others.

    Args:
        hf_folder: folder that `export` (or `save_pretrained` of its model) wrote.
        check: is given the renewed folder before anything is replaced; what it raises leaves the folder as it was.
        plugins: files or modules to import, of which one registers the folder's system.

    Returns:
        Names of the files that were renewed.

    Raises:
        ValueError: this is no such folder, or it cannot be written.
    """
    hf_folder = Path(hf_folder)
    fields, plugins = read_json(hf_folder / "config.json"), load_plugins(plugins)
    adapter = adapter_of_folder(fields, hf_folder / "config.json")
    config = config_from_hf(fields, hf_folder / "config.json", plugins)
    tokenizer = chosen_tokenizer(adapter, None, tokenizer_of_folder(fields, hf_folder))
    fields = {name: value for name, value in fields.items() if name not in FOREIGN_CODE}
    fields |= text_fields(adapter, config.model, tokenizer, hf_folder) | release_fields()
    fields["auto_map"] = adapter.auto_map(config.model)
    return renew(hf_folder, adapter, fields, tokenizer, check)


def text_fields(adapter: Adapter, model: SystemConfig, tokenizer: Tokenizer | None, folder: Path) -> dict[str, int]:
    """Fields of config.json that the tokenizer decides (`check_vocabulary`); none where the model needs no tokenizer.

    Raises:
        ValueError: the model needs a tokenizer, and there is none, or one that does not fit.
    """
    if not (adapter.reads_tokenizer and model.reads_text):
        return {}
    if tokenizer is None:
        raise ValueError(f"{folder}: holds no tokenizer; name one with --tokenizer")
    return check_vocabulary(tokenizer, model.inputs.vocab_size)


# ------------------------------------------------------------------------------------------------------------ restore


def write_training_checkpoint(
    root: Path,
    config: Config,
    entries: list[Entry],
    make: Callable[[Entry], torch.Tensor],
    dtype: torch.dtype,
    tokenizer: Path | None,
    overwrite: bool,
    quiet: bool,
    what: str,
) -> Path:
    """Write `entries` as `root/iter_0000000`, from which a run starts: weights, config.yaml and the tokenizer.

    Args:
        tokenizer: has the name that its kind gives it in checkpoints.
    """
    ours = {checkpoint_folder.folder_of(root, 0).name, checkpoint_folder.TRACKER}
    found = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if root.exists() and (not root.is_dir() or (found and not (overwrite and found <= ours))):
        raise ValueError(
            f"{root}: exists and is not empty; choose another folder (--overwrite replaces {min(ours)} only)"
        )
    by_name = {entry.training: entry for entry in entries}
    part = checkpoint_folder.begin(root, 0)
    try:
        with tqdm(total=len(by_name), desc=what, unit="tensor", disable=quiet) as bar:

            def make_named(name: str) -> torch.Tensor:
                bar.update()
                return make(by_name[name])

            shapes = {name: entry.shape for name, entry in by_name.items()}
            write_checkpoint_weights(part, shapes, dtype, make_named)
        dump_config(config, part / "config.yaml")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, part / tokenizer.name)
        return checkpoint_folder.finish(part, {"iteration": 0, "consumed_samples": 0})
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"{root}: not written: {error.strerror or error} (nothing was left behind)") from error
        raise


def restore(
    hf_folder: str | Path,
    output: str | Path,
    config: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    plugins: Sequence[str] = (),
) -> Path:
    """Exported Hugging Face folder -> training checkpoint folder.

    Args:
        hf_folder: folder that `export` (or `save_pretrained`) wrote.
        output: folder of checkpoints to make; it will hold `iter_0000000`.
        config: recipe whose other settings the checkpoint's config.yaml carries; its model must fit.
        dtype: "fp32" or "bf16"; None keeps the folder's.
        overwrite: replace what `output` holds.
        quiet: no progress bar.
        plugins: files or modules to import, of which one registers the folder's system; a recipe names its own.

    Raises:
        ValueError: the folder is not whole or does not fit the recipe; names the tensor and both shapes.
    """
    hf_folder = Path(hf_folder)
    source = SafetensorsFolder(hf_folder)
    fields, plugins = read_json(hf_folder / "config.json"), load_plugins(plugins)
    tree = load_config(config) if config else config_from_hf(fields, hf_folder / "config.json", plugins)
    adapter = adapter_of_folder(fields, hf_folder / "config.json")
    if config:
        ours = adapter.fields(tree) if tree.model.system == adapter.name else {"model_type": tree.model.system}
        differ = differences(fields, {name: value for name, value in ours.items() if name not in ROW_LENGTH})
        if differ:
            raise ValueError(f"{config} does not describe {hf_folder}: {'; '.join(differ)}")
    tokenizer, entries = tokenizer_of_folder(fields, hf_folder), model_entries(tree.model)
    for entry in entries:
        for part in entry.parts:
            if part.name is not None:
                if part.name not in source:
                    raise ValueError(f"{hf_folder}: lacks the tensor {part.name}")
                entry.check_part(part, source.shape(part.name))
    torch_dtype = DTYPES[dtype] if dtype else source.dtype(source.names[-1])
    return write_training_checkpoint(
        Path(output), tree, entries, lambda entry: merge(entry, lambda part: source.read(part.name)), torch_dtype,
        tokenizer, overwrite, quiet, "restore",
    )  # fmt: skip


def merge(entry: Entry, read: Callable[[Part], torch.Tensor]) -> torch.Tensor:
    """A training tensor from its parts, read one at a time; rows without a part are zero."""
    if len(entry.parts) == 1:
        tensor = read(entry.parts[0])
        entry.check_part(entry.parts[0], tuple(tensor.shape))
        return tensor
    out = None
    for part in entry.parts:
        if part.name is None:
            continue
        tensor = read(part)
        if out is None:
            out = torch.zeros(entry.shape, dtype=tensor.dtype)
        entry.fill(out, part, tensor)
        del tensor
    return out
