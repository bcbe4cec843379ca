"""Training checkpoints to Hugging Face folders and back.

Both walk the list of `names.synapse_entries` and hold one training tensor and one of its parts at a time, so that
memory stays under twice the largest tensor. Everything is written to a temporary folder beside the destination and
renamed at the end: a folder that exists is whole. `pretrained.py` adds the import of CLIP, Whisper and Llama.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_mm.config.load import config_from_tree, dump_config, load_config
from megatron_mm.config.schema import Config
from megatron_mm.config.systems import SynapseConfig
from megatron_mm.inference.checkpoint_stream import CheckpointReader, write_checkpoint_weights
from megatron_mm.inference.names import Entry, Part, synapse_entries
from megatron_mm.inference.safetensors_stream import SafetensorsFolder, SafetensorsWriter
from megatron_mm.training import checkpoint_folder

HF_FILES = Path(__file__).parent / "hf"
MODELLING_FILES = ("configuration_synapse.py", "modeling_synapse.py", "processing_synapse.py")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

README = """# Synapse

Exported by megatron_mm (tools/convert_checkpoint.py export). Needs transformers, sentencepiece and Pillow.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([{"prompt": "<image>", "images": ["picture.png"]}])
    print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]))
"""


# ------------------------------------------------------------------------------------------------------ configuration


def hf_config(config: Config) -> dict:
    """config.json of an exported model, without transformers' own fields."""
    model, data = config.model, config.data
    decoder, cross = model.decoder, model.cross_attention
    fields = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups,
        "rope_theta": decoder.rotary_base,
        "rms_norm_eps": decoder.layernorm_epsilon,
        "initializer_range": model.init_std,
        "max_position_embeddings": data.seq_length,
        "cross_attention_every": cross.every,
        "cross_attention_num_key_value_heads": cross.num_query_groups,
        "cross_attention_qk_norm": cross.qk_layernorm,
        "vision_patch_size": model.vision.patch_size,
        "vision_image_size": model.vision.image_size,
        "vision_max_frames": model.vision.max_frames,
        "audio_num_mel_bins": model.audio.num_mel_bins,
        "audio_sample_rate": model.audio.sample_rate,
        "audio_seconds": model.audio.seconds,
        "image_mean": list(data.image_mean),
        "image_std": list(data.image_std),
        "frames_per_video": data.frames_per_video,
    }
    for name, tower in (("vision", model.vision), ("audio", model.audio)):
        fields[f"{name}_num_hidden_layers"] = tower.num_layers
        fields[f"{name}_hidden_size"] = tower.hidden_size
        fields[f"{name}_num_attention_heads"] = tower.num_attention_heads
        fields[f"{name}_intermediate_size"] = tower.ffn_hidden_size
    return fields


def config_from_hf(fields: dict, source: Path) -> Config:
    """The configuration of an exported model: its architecture and preprocessing, defaults elsewhere."""
    if fields.get("model_type") != "synapse":
        raise ValueError(
            f'{source}: model_type is {fields.get("model_type")!r}, not "synapse"; restore takes a folder that export '
            "wrote (import-pretrained takes CLIP, Whisper and Llama)"
        )
    get = fields.__getitem__
    try:
        towers = {
            name: {
                "num_layers": get(f"{name}_num_hidden_layers"),
                "hidden_size": get(f"{name}_hidden_size"),
                "num_attention_heads": get(f"{name}_num_attention_heads"),
                "ffn_hidden_size": get(f"{name}_intermediate_size"),
            }
            for name in ("vision", "audio")
        }
        towers["vision"] |= {k: get(f"vision_{k}") for k in ("patch_size", "image_size", "max_frames")}
        towers["audio"] |= {k: get(f"audio_{k}") for k in ("num_mel_bins", "sample_rate", "seconds")}
        decoder = {
            "num_layers": get("num_hidden_layers"),
            "hidden_size": get("hidden_size"),
            "num_attention_heads": get("num_attention_heads"),
            "num_query_groups": get("num_key_value_heads"),
            "ffn_hidden_size": get("intermediate_size"),
            "vocab_size": get("vocab_size"),
            "rotary_base": get("rope_theta"),
            "layernorm_epsilon": get("rms_norm_eps"),
        }
        cross = {
            "every": get("cross_attention_every"),
            "num_query_groups": get("cross_attention_num_key_value_heads"),
            "qk_layernorm": get("cross_attention_qk_norm"),
        }
        data = {
            "image_mean": get("image_mean"),
            "image_std": get("image_std"),
            "frames_per_video": get("frames_per_video"),
            "seq_length": get("max_position_embeddings"),
        }
        model = {"decoder": decoder, "cross_attention": cross, "init_std": get("initializer_range"), **towers}
    except KeyError as error:
        raise ValueError(f"{source}: lacks the field {error}") from error
    return config_from_tree({"model": model, "data": data}, source)


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


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder looks like an exported model."""
    return (Path(path) / "config.json").exists()


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Only an exported model is ever replaced.

    Raises:
        ValueError: `path` exists and holds something.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (overwrite and is_hf_folder(path)):
        raise ValueError(
            f"{path}: exists and is not empty; choose another folder (--overwrite replaces an exported model only)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"{path}: not written: {error.strerror or error} (nothing was left behind)") from error
        raise


def tokenizer_of(config: Config, folder: Path) -> Path | None:
    """The SentencePiece model of a checkpoint: its copy, or the file that its config names; None if neither exists."""
    for candidate in (folder / "tokenizer.model", config.data.tokenizer and Path(config.data.tokenizer)):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return None


def check_vocabulary(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Ids of the tokenizer's special pieces; ValueError if the model's vocabulary cannot hold the tokenizer's."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{tokenizer}: not a SentencePiece model: {error}") from error
    if pieces.get_piece_size() > vocab_size:
        raise ValueError(
            f"{tokenizer} has {pieces.get_piece_size()} pieces, the model's vocabulary {vocab_size} rows; they do not "
            "belong together"
        )
    names = {"pad_token_id": pieces.pad_id(), "bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    missing = [name for name, value in names.items() if value < 0]
    if missing:
        raise ValueError(f"{tokenizer}: has no {', '.join(missing)}; train it with tools/train_tokenizer.py")
    return names


# ------------------------------------------------------------------------------------------------------------- export


def hf_tensors(config: SynapseConfig, reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Named Hugging Face tensors of a training checkpoint, one at a time."""
    for entry in synapse_entries(config):
        yield from entry.split(reader.read(entry.training))


def _stored(reader: CheckpointReader, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """The weight; where fp32 is wanted of a BF16 run, the optimizer's fp32 master copy of it."""
    master = "optimizer.fp32_param." + entry.training
    if dtype == torch.float32 and master in reader and reader.shape(master) == entry.shape:
        return reader.read(master)
    return reader.read(entry.training)


def check_checkpoint(config: SynapseConfig, reader: CheckpointReader) -> None:
    """Refuse a checkpoint that lacks parameters of the model or has them in other shapes, before reading any."""
    entries = synapse_entries(config)
    missing = [e.training for e in entries if e.training not in reader]
    if missing:
        raise ValueError(f"{reader.folder}: lacks {len(missing)} of {len(entries)} parameters, first {missing[0]}")
    for entry in entries:
        if reader.shape(entry.training) != entry.shape:
            raise ValueError(
                f"{reader.folder}: {entry.training} has shape {list(reader.shape(entry.training))}; config.yaml says "
                f"{list(entry.shape)}"
            )


def export(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Training checkpoint -> Hugging Face folder.

    Args:
        checkpoint: checkpoint folder, or a folder of them.
        output: folder to write.
        dtype: "fp32" or "bf16"; None keeps the stored type of the embedding.
        max_shard_bytes: most bytes of one safetensors file.
        tokenizer: SentencePiece model; None: the checkpoint's.
        overwrite: replace what `output` holds.
        quiet: no progress bar.

    Raises:
        ValueError: the checkpoint is not whole, or does not fit its configuration, or has no tokenizer.
    """
    folder = find_checkpoint(checkpoint)
    config = load_config(folder / "config.yaml")
    reader = CheckpointReader(folder)
    check_checkpoint(config.model, reader)
    tokenizer_file = Path(tokenizer) if tokenizer else tokenizer_of(config, folder)
    if tokenizer_file is None or not tokenizer_file.exists():
        raise ValueError(f"{tokenizer_file or folder / 'tokenizer.model'}: missing; pass --tokenizer")
    ids = check_vocabulary(tokenizer_file, config.model.decoder.vocab_size)
    torch_dtype = DTYPES[dtype] if dtype else reader.dtype("decoder.embedding.word_embeddings.weight")

    with new_folder(Path(output), overwrite) as temporary:
        write_hf_files(temporary, config, ids, torch_dtype, tokenizer_file)
        entries = synapse_entries(config.model)
        plan = [(p.name, e.part_shape(p)) for e in entries for p in e.parts if p.name is not None]
        writer = SafetensorsWriter(temporary, plan, torch_dtype, max_shard_bytes)
        for entry in tqdm(entries, desc="export", unit="tensor", disable=quiet):
            for name, tensor in entry.split(_stored(reader, entry, torch_dtype)):
                writer.write(name, tensor)
                del tensor
        writer.close()
    return Path(output)


def write_hf_files(folder: Path, config: Config, ids: dict[str, int], dtype: torch.dtype, tokenizer: Path) -> None:
    """Everything of an exported folder but the weights."""
    import transformers

    auto_map = {
        "AutoConfig": "configuration_synapse.SynapseConfig",
        "AutoModel": "modeling_synapse.SynapseModel",
        "AutoModelForCausalLM": "modeling_synapse.SynapseForCausalLM",
        "AutoProcessor": "processing_synapse.SynapseProcessor",
    }
    head = {"architectures": ["SynapseForCausalLM"], "model_type": "synapse", "auto_map": auto_map}
    version = {"transformers_version": transformers.__version__}
    tail = {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False, **version}
    write = lambda name, tree: (folder / name).write_text(json.dumps(tree, indent=2) + "\n")  # noqa: E731
    write("config.json", head | hf_config(config) | ids | tail)
    write("generation_config.json", {"_from_model_config": True, **ids, **version})
    for name in MODELLING_FILES:
        shutil.copyfile(HF_FILES / name, folder / name)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    (folder / "README.md").write_text(README)


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
    """Write `entries` as `root/iter_0000000`, from which a run starts: weights, config.yaml and tokenizer.model."""
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
            common = {"iteration": 0, "consumed_samples": 0}
            write_checkpoint_weights(part, shapes, dtype, make_named, common)
        dump_config(config, part / "config.yaml")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, part / "tokenizer.model")
        return checkpoint_folder.finish(part, {"iteration": 0})
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
) -> Path:
    """Exported Hugging Face folder -> training checkpoint folder.

    Args:
        hf_folder: folder that `export` (or `save_pretrained`) wrote.
        output: folder of checkpoints to make; it will hold `iter_0000000`.
        config: recipe whose other settings the checkpoint's config.yaml carries; its model must fit.
        dtype: "fp32" or "bf16"; None keeps the folder's.
        overwrite: replace what `output` holds.
        quiet: no progress bar.

    Raises:
        ValueError: the folder is not whole or does not fit the recipe; names the tensor and both shapes.
    """
    hf_folder = Path(hf_folder)
    source = SafetensorsFolder(hf_folder)
    fields = read_json(hf_folder / "config.json")
    tree = load_config(config) if config else config_from_hf(fields, hf_folder / "config.json")
    if config:
        theirs = hf_config(tree) | {"max_position_embeddings": fields.get("max_position_embeddings")}
        differ = [f"{k}: {fields.get(k)} in the folder, {v} in the recipe" for k, v in theirs.items()
                  if k != "initializer_range" and fields.get(k) != v]  # fmt: skip
        if differ:
            raise ValueError(f"{config} does not describe {hf_folder}: {'; '.join(differ)}")
    entries = synapse_entries(tree.model)
    for entry in entries:
        for part in entry.parts:
            if part.name is not None:
                if part.name not in source:
                    raise ValueError(f"{hf_folder}: lacks the tensor {part.name}")
                entry.check_part(part, source.shape(part.name))
    torch_dtype = DTYPES[dtype] if dtype else source.dtype("lm_head.weight")
    tokenizer = hf_folder / "tokenizer.model"
    return write_training_checkpoint(
        Path(output), tree, entries, lambda entry: merge(entry, lambda part: source.read(part.name)), torch_dtype,
        tokenizer if tokenizer.exists() else None, overwrite, quiet, "restore",
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


def read_json(path: Path) -> dict:
    """A JSON object; ValueError naming the file."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; give the folder of a Hugging Face model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree
