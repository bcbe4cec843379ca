"""Scores a model on held-out samples: of captions, of classes and of tokens, with true and with swapped media.

    python tools/evaluate.py --model exported --input heldout_image.jsonl heldout_sound.jsonl --swap-media

`--model` is a folder that tools/convert_checkpoint.py exported, or a training checkpoint or run. A line of the JSONL is
a sample as tools/preprocess_multimodal.py reads it; its "text" is the reference. Scores:

    exact match, CIDEr-D   of texts as captions
    word F1                of the words that text and reference share
    WAR, UAR, macro F1     of texts as names of classes, such as emotions: recall weighted by how often each is true,
                           which is exact match, mean recall and mean F1 of the classes; "commonest" is the WAR of
                           always answering the commonest
    token loss             of the true text
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import check_file, figures, records
from megatron_mm.platform.atomic_files import write_figures, write_whole
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """Which model, on which samples."""

    model: Path
    """Exported folder, checkpoint, folder of checkpoints, or output folder of a run."""
    input: list[Path]
    """JSONL files of samples; each is a line of the table."""
    media_root: Path | None = None
    """Folder to which paths in the JSONL are relative; default: the JSONL's."""
    swap_media: bool = False
    """Also evaluate with images, sounds and videos exchanged between samples of different text."""
    limit: int = 0
    """At most this many samples of each file; 0 takes all."""
    max_new_tokens: int = 32
    """Most tokens of one caption."""
    num_beams: int = 1
    """Beams of beam search; 1 takes the likeliest token each time."""
    batch_size: int = 32
    """Samples handled at once."""
    seed: int = 0
    """Seed of the exchange of media."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    device: str = "auto"
    """Torch device; auto takes cuda where there is one."""
    tokenizer: Path | None = None
    """File of a tokenizer of any kind (docs/data.md); default: the one beside the weights."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system of your own, imported first; what --model names in their place loads none."""
    json: Path | None = None
    """File for the table's figures."""
    captions: Path | None = None
    """JSONL for the generated captions beside the references."""


def run(arguments: Arguments) -> list[dict]:
    """Evaluates every file; returns the table's rows."""
    check_file(arguments.json, "--json", figures("rows"))
    check_file(arguments.captions, "--captions", records("generated"))
    import torch

    from megatron_mm.evaluation.classification import score_class_names, word_f1
    from megatron_mm.evaluation.evaluate import MEDIA, check_references, evaluate, swap_media
    from megatron_mm.generation.generate import Decoding, Generator
    from megatron_mm.generation.prompts import read_prompts

    decoding = Decoding(arguments.max_new_tokens, arguments.num_beams)
    decoding.arguments()
    sets = []
    for path in arguments.input:
        samples = read_prompts(path, arguments.media_root)[: arguments.limit or None]
        check_references(samples)
        sets.append((path, "true", samples))
        if arguments.swap_media:
            if not any(sample.get(kind) for sample in samples for kind in MEDIA):
                raise ValueError(f"--swap-media: no sample of {path} has an image, a sound or a video; leave it out")
            sets.append((path, "swapped", swap_media(samples, arguments.seed)))
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    words = (arguments.model, arguments.dtype, device, arguments.tokenizer, arguments.plugins)
    generator = Generator.from_path(*words)
    rows, lines = [], []
    for path, media, samples in sets:
        result = evaluate(generator, samples, decoding, arguments.batch_size, progress=True)
        truth = [sample["text"] for sample in samples]
        scores = {
            **asdict(score_class_names(result.captions, truth)), **asdict(result.scores),
            "word_f1": word_f1(result.captions, [[text] for text in truth]),
            "token_loss": result.tokens.loss, "token_accuracy": result.tokens.accuracy,
        }  # fmt: skip
        rows.append({"input": path.name, "media": media, **scores})
        lines += [
            {"input": path.name, "media": media, "id": sample["id"], "generated": caption, "reference": sample["text"]}
            for sample, caption in zip(samples, result.captions)
        ]
    if arguments.captions is not None:
        write_whole(arguments.captions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_figures(arguments.json, {"model": str(arguments.model), "rows": rows})
    return rows


#: Heading of each score in the table, and its key in the figures.
COLUMNS = {
    "exact match": "exact_match", "CIDEr-D": "cider", "word F1": "word_f1", "WAR": "weighted_recall",
    "UAR": "unweighted_recall", "macro F1": "macro_f1", "commonest": "majority", "token loss": "token_loss",
    "token accuracy": "token_accuracy",
}  # fmt: skip


def print_table(rows: list[dict]) -> None:
    """One line a file and kind of media."""
    width = max(len("samples of"), *(len(row["input"]) for row in rows))
    headings = [f"{heading:>{_wide(heading)}}" for heading in COLUMNS]
    print(f"{'samples of':<{width}}  {'media':<8}{'count':>7}{'classes':>9}" + "".join(headings))
    for row in rows:
        scores = "".join(f"{row[key]:>{_wide(heading)}.3f}" for heading, key in COLUMNS.items())
        print(f"{row['input']:<{width}}  {row['media']:<8}{row['samples']:>7}{row['classes']:>9}{scores}")


def _wide(heading: str) -> int:
    return max(len(heading), len("0.000")) + 2


def main() -> None:
    """Evaluates and prints the table."""
    print_table(run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    run_tool(main, left="")
