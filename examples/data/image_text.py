"""Prepares pictures with names, and questions about pictures: the data of the image-text systems' tiny runs.

    python -m examples.data.image_text --output outputs/vlm-tiny/data --questions 12000

Emoji art with names of seven vendors to learn from; held out is an eighth vendor's art of the same things. With
`--questions`, easy-vqa's training questions; held out are questions of its test pictures. With `--shapes`, the same
pictures of coloured shapes, with captions. With `--stamps`, Tux Paint's stamps with captions of a sentence; two
families of them are held out whole. Writes into the output folder, of pairs, questions, shapes and stamps,

    pairs.jsonl …          to learn from
    heldout_pairs.jsonl …  to score on
    texts.jsonl            every text to learn, as a sample without picture
    texts.txt              the same for the tokenizer
    LICENCES.txt           and the pictures

A second run downloads and draws nothing again.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.data import easy_vqa, emoji_art, tux_paint
from examples.data.emoji_art import ALL_VENDORS, Emoji, picture_path
from examples.data.samples import LICENCES, begin_data, sample, write_jsonl, write_lines
from megatron_mm.config.outputs import exit_status

HELDOUT_VENDOR = "twitter"
TRAIN_VENDORS = tuple(name for name in ALL_VENDORS if name != HELDOUT_VENDOR)
HELDOUT_FAMILIES = ("food", "vehicles")
STAMP_SIZE = 64


@dataclass
class Arguments:
    """What to prepare, and where."""

    output: Path
    """Folder to write."""
    cache: Path | None = None
    """Folder of downloaded packages; default: OUTPUT/packages."""
    names: int = 256
    """Names to learn; 0 takes all (about 520)."""
    variants: int = 4
    """Pictures made of each training drawing: one on white, the others on colours, turned and shifted."""
    questions: int = 0
    """Training questions of easy-vqa (38,575 in all)."""
    heldout_questions: int = 1000
    """Held-out questions (9,673 in all)."""
    shapes: int = 0
    """Training pictures of easy-vqa with a caption, such as "blue rectangle" (2,435 in all)."""
    heldout_shapes: int = 512
    """Held-out pictures with a caption."""
    stamps: bool = False
    """Tux Paint's stamps as well; needs apt-get and dpkg-deb."""
    seed: int = 1
    """Seed of the order of samples."""


def pair_samples(emoji: list[Emoji], vendors: dict[str, int]) -> list[dict]:
    """A picture and its name: every variant of every vendor's drawing.

    Args:
        vendors: variants of each vendor's drawings.
    """
    return [
        sample(f"{vendor}/{variant}/{e.code}", e.name, images=[picture_path(e, vendor, variant)])
        for e in emoji
        for vendor, variants in vendors.items()
        for variant in range(variants)
    ]


def stamp_samples(stamps: list[tux_paint.Stamp]) -> list[dict]:
    """A stamp and its caption."""
    return [sample(f"stamps/{s.name}", s.caption, images=[f"stamps/{s.name}.png"]) for s in stamps]


def main(arguments: Arguments) -> None:
    """Fetches, draws and writes; raises ValueError for what a user can mend."""
    output, cache = arguments.output, arguments.cache or arguments.output / "packages"
    begin_data(output, "examples.data.image_text")
    licences, train, held_out = [], {}, {}

    def announce(package) -> None:
        licences.append(f"{package}: {package.licence}")
        print(licences[-1], flush=True)

    fetched = {}
    for vendor in ALL_VENDORS.values():
        announce(vendor.package)
        fetched[vendor.name] = emoji_art.fetch(vendor, cache)
    emoji = emoji_art.choose_names(fetched, arguments.names)
    learned = dict.fromkeys(TRAIN_VENDORS, arguments.variants)
    emoji_art.draw_all(emoji, {**learned, HELDOUT_VENDOR: 1}, output)
    train["pairs"], held_out["pairs"] = pair_samples(emoji, learned), pair_samples(emoji, {HELDOUT_VENDOR: 1})

    if arguments.questions or arguments.shapes:
        announce(easy_vqa.PACKAGE)
        data = easy_vqa.fetch(cache)
    if arguments.shapes:
        train["shapes"] = easy_vqa.caption_samples(data, "train", output, arguments.shapes)
        held_out["shapes"] = easy_vqa.caption_samples(data, "test", output, arguments.heldout_shapes)
    if arguments.questions:
        train["questions"] = easy_vqa.question_samples(data, "train", output, arguments.questions)
        held_out["questions"] = easy_vqa.question_samples(data, "test", output, arguments.heldout_questions)
    if arguments.stamps:
        announce(tux_paint.PACKAGE)
        stamps = tux_paint.read_stamps(tux_paint.fetch(cache))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda s: tux_paint.draw(s, output / "stamps" / f"{s.name}.png", STAMP_SIZE), stamps))
        held = [stamp for stamp in stamps if stamp.family in HELDOUT_FAMILIES]
        train["stamps"] = stamp_samples([stamp for stamp in stamps if stamp.family not in HELDOUT_FAMILIES])
        held_out["stamps"] = stamp_samples(held)

    texts = {line["prompt"].replace("<image>", "") for lines in train.values() for line in lines}
    texts |= {line["text"] for lines in train.values() for line in lines}
    texts = sorted(texts - {""})
    write_lines(output / "texts.txt", texts)
    write_jsonl(output / "texts.jsonl", [sample(f"text/{number}", text) for number, text in enumerate(texts)])
    for name, lines in train.items():
        random.Random(arguments.seed).shuffle(lines)
        write_jsonl(output / f"{name}.jsonl", lines)
        write_jsonl(output / f"heldout_{name}.jsonl", held_out[name])
    write_lines(output / LICENCES, licences)
    counts = ", ".join(f"{len(lines)} {name} to learn, {len(held_out[name])} held out" for name, lines in train.items())
    print(f"{len(emoji)} names; {counts}; in {output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"image_text.py: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
