"""Folders for tests/releases: every system exported, what its training model says, and copies whose cache is lost.

    python -m tests.releases.prepare FOLDER

Weights are random, sizes small. For each system FOLDER/NAME holds `exported`, `picture.jpg`, `truth.pt` (generated
rows, values and greedy tokens of the training graph, and the picture as training reads it) and, where it generates
text, copies of `exported` in each of which one line of the modelling code is as a release that nobody tried would have
it: the cache does not come back, or does not arrive.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from megatron_mm.config.schema import Config
from megatron_mm.conversion.convert import export, find_checkpoint
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.export_proof import NEW_TOKENS, Rows, exact_reader, questions, training_fields
from megatron_mm.evaluation.streams import GraphReader
from megatron_mm.media.decoding import read_image
from megatron_mm.media.transforms import center_crop_box, image_tensor, size_of
from megatron_mm.systems.export import adapter_of
from tests.conversion import system_case as case
from tests.conversion.export_case import random_weights, tiny_recipe, train_tokenizer, write_training_folder
from tests.support.media_files import photo, picture

SYSTEMS = ("synapse", "vlm", "dual_encoder", "perceiver_fusion", "avt")
#: A line of a modelling file, and what stands in its place in a copy.
LOST = {
    "cache-not-returned": ("**{CACHE: cache}", "| {CACHE: cache}", "| {}"),
    "cache-not-taken": ("begin(past_key_values, cache,", "begin(None, None,"),
}


def write_checkpoint(name: str, root: Path, tokenizer: Path) -> Config:
    """A training checkpoint below `root`, and its recipe."""
    if name == "synapse":
        config = tiny_recipe()
        write_training_folder(root / "run" / "checkpoints", config, random_weights(config.model), tokenizer)
        return config
    config = case.with_vocabulary(case.SYSTEMS[name]())
    case.trained(config).save(root / "run" / "checkpoints", tokenizer)
    return config


def greedy(reader: GraphReader, rows: Rows, pieces: int) -> torch.Tensor:
    """Tokens [R, NEW_TOKENS] after each prompt by argmax of the training model, each computed from the whole text."""
    tokens_RT, lengths = rows.batch.tokens_RT.clone(), rows.lengths.clone()
    every = torch.arange(len(lengths))
    for _ in range(NEW_TOKENS):
        streams, _ = reader.run(rows.begun(lengths, tokens_RT), ["logits"])
        logits_RTV = streams["logits"].view(*tokens_RT.shape, -1)
        tokens_RT[every, lengths] = logits_RTV[every, lengths - 1, :pieces].argmax(dim=-1)
        lengths += 1
    return torch.stack([tokens_RT[row, last - NEW_TOKENS : last] for row, last in enumerate(lengths.tolist())])


def pixels_of(config: Config, file: Path) -> torch.Tensor:
    """A picture, written, as training reads it where nothing is augmented: [3, size, size]."""
    file.write_bytes(picture(photo(), "JPEG"))
    image = read_image(file.read_bytes())
    size, data = config.model.inputs.image_size, config.data
    return image_tensor(image, size, center_crop_box(*size_of(image)), data.image_mean, data.image_std)


def prepare(name: str, root: Path, tokenizer: Path) -> None:
    """One system's folder."""
    config = write_checkpoint(name, root, tokenizer)
    exported = export(root / "run", root / "exported", quiet=True)
    adapter = adapter_of(name, root)
    rows = Rows.of(config, config.model.generates)
    given = questions(config, rows, left=name != "perceiver_fusion")
    reader = exact_reader(config, find_checkpoint(root / "run"))
    tokens = None
    if rows.generates:
        tokens = greedy(reader, rows, open_tokenizer(str(tokenizer)).vocab_size)
        names, batch = given["answered"], rows.answered(tokens)
    else:
        names, batch = [name for _, wanted in given["calls"] for name in wanted], rows.batch
    truth = {"questions": given, "tokens": tokens, "fields": training_fields(reader, batch, names)}
    truth["pixels"] = pixels_of(config, root / "picture.jpg")
    torch.save(truth, root / "truth.pt")
    for copy, (*found, put) in (LOST if rows.generates else {}).items():
        shutil.copytree(exported, root / copy)
        file = root / copy / f"{adapter.model_class.partition('.')[0]}.py"
        code = file.read_text()
        changed = code
        for line in found:
            changed = changed.replace(line, put if line.startswith(("|", "begin")) else "")
        if changed == code:
            raise ValueError(f"{file} has none of {found}")
        file.write_text(changed)


def main() -> None:
    """See the top."""
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(root / "spm.model")
    for name in SYSTEMS:
        prepare(name, root / name, tokenizer)
        print(f"prepared {name}", flush=True)


if __name__ == "__main__":
    main()
