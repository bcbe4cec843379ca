"""Prepares the quick start's samples: emoji art and spoken names, fetched through npm and apt, as JSONL.

Usage (run.sh does this):

    python -m examples.quickstart.prepare --output outputs/quickstart/data

Writes into the output folder `train.jsonl`, `heldout_image.jsonl`, `heldout_sound.jsonl`, `names.txt` (text for the
tokenizer), `LICENCES.txt`, and the pictures and sounds they name. Training has four vendors' art and several voices;
held out are a fifth vendor's art and another voice, for the same names. A second run downloads and speaks nothing
again. Samples are images alone, sounds alone, both together, two images, and text without media.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.data import emoji_art, speech
from examples.data.emoji_art import Emoji, picture_path
from examples.data.samples import LICENCES, begin_data, sample, write_jsonl, write_lines
from megatron_mm.config.outputs import exit_status

TRAIN_VENDORS = ("google", "fluent", "flat", "openmoji")
HELDOUT_VENDOR = "twitter"
TRAIN_VOICES = ("en-us", "en-gb-x-rp+f2", "en-gb+m3", "en-029+f4", "en-us-nyc+m7", "en-us+f5")
HELDOUT_VOICE = "en-gb-scotland+f3"
#: Words per minute of training recordings, and of the held-out voice's.
TRAIN_SPEEDS = (210, 260)
HELDOUT_SPEED = 240


@dataclass
class Arguments:
    """Emoji art and spoken names as samples of text, images and sounds."""

    output: Path = Path("outputs/quickstart/data")
    """Folder to write."""
    cache: Path | None = None
    """Folder of downloaded packages; default: OUTPUT/packages."""
    names: int = 256
    """Names to learn; 0 takes all (about 840)."""
    variants: int = 6
    """Pictures made of each training drawing: one on white, the others on colours, turned and shifted."""
    seed: int = 1
    """Seed of the pairs in samples with two media."""


def training_samples(emoji: list[Emoji], variants: int, seed: int) -> list[dict]:
    """All training samples: per name every picture and every voice alone, and one of each kind with company.

    Args:
        emoji: the names.
        variants: pictures of each drawing.
        seed: chooses who goes with whom.

    Returns:
        Samples in the format of tools/preprocess_multimodal.py, media paths relative to the JSONL's folder.
    """
    chance = random.Random(seed)
    samples = []
    recordings = [(voice, speed) for voice in TRAIN_VOICES for speed in TRAIN_SPEEDS]
    for e in emoji:
        pictures = [(v, k) for v in TRAIN_VENDORS for k in range(variants)]
        other = chance.choice(emoji)
        samples += [sample(f"image/{v}/{k}/{e.code}", e.name, images=[picture_path(e, v, k)]) for v, k in pictures]
        samples += [sample(f"sound/{v}/{s}/{e.code}", e.name, audios=[sound_path(e, v, s)]) for v, s in recordings]
        seen, heard = picture_path(e, *chance.choice(pictures)), sound_path(e, *chance.choice(recordings))
        samples.append(sample(f"both/{e.code}", e.name, images=[seen], audios=[heard]))
        two = [picture_path(e, *chance.choice(pictures)), picture_path(other, *chance.choice(pictures))]
        samples.append(sample(f"two/{e.code}", f"{e.name} and {other.name}", images=two))
        samples.append(sample(f"text/{e.code}", e.name))
    return samples


def heldout_samples(emoji: list[Emoji]) -> dict[str, list[dict]]:
    """Held-out samples by modality: the unseen vendor's art, and the unseen voice, each alone."""
    vendor, voice = HELDOUT_VENDOR, HELDOUT_VOICE
    return {
        "image": [sample(f"image/{vendor}/{e.code}", e.name, images=[picture_path(e, vendor, 0)]) for e in emoji],
        "sound": [
            sample(f"sound/{voice}/{e.code}", e.name, audios=[sound_path(e, voice, HELDOUT_SPEED)]) for e in emoji
        ],
    }


def sound_path(emoji: Emoji, voice: str, speed: int) -> str:
    """Path of a recording relative to the output folder."""
    return f"sounds/{voice}-{speed}/{emoji.name.replace(' ', '_')}.wav"


def make_media(emoji: list[Emoji], variants: int, output: Path) -> float:
    """Draws every picture and speaks every name that is not there yet.

    Returns:
        Seconds of the longest recording.
    """
    emoji_art.draw_all(emoji, {**dict.fromkeys(TRAIN_VENDORS, variants), HELDOUT_VENDOR: 1}, output)
    recordings = [(voice, speed) for voice in TRAIN_VOICES for speed in TRAIN_SPEEDS] + [(HELDOUT_VOICE, HELDOUT_SPEED)]
    sentences = [
        (e.name, voice, speed, output / sound_path(e, voice, speed)) for e in emoji for voice, speed in recordings
    ]
    return speech.record_all(sentences)


def main(arguments: Arguments) -> None:
    """Fetches, draws, speaks and writes; raises ValueError for what a user can mend."""
    begin_data(arguments.output, "examples.quickstart.prepare")
    if not (arguments.output / "sounds").is_dir():
        speech.install()  # before anything is downloaded in vain
    cache = arguments.cache or arguments.output / "packages"
    packages = {}
    for vendor in emoji_art.VENDORS.values():
        print(f"{vendor.package}: {vendor.package.licence}", flush=True)
        packages[vendor.name] = emoji_art.fetch(vendor, cache)
    print(f"espeak-ng (apt): {speech.LICENCE}", flush=True)
    emoji = emoji_art.choose_names(packages, arguments.names)
    longest = make_media(emoji, arguments.variants, arguments.output)

    train = training_samples(emoji, arguments.variants, arguments.seed)
    random.Random(arguments.seed).shuffle(train)
    write_jsonl(arguments.output / "train.jsonl", train)
    for modality, samples in heldout_samples(emoji).items():
        write_jsonl(arguments.output / f"heldout_{modality}.jsonl", samples)
    write_lines(arguments.output / "names.txt", [e.name for e in emoji])
    licences = [f"{v.package}: {v.package.licence}" for v in emoji_art.VENDORS.values()]
    write_lines(arguments.output / LICENCES, [*licences, f"espeak-ng: {speech.LICENCE}"])
    print(f"{len(emoji)} names, {len(train)} training samples; longest sound {longest:.2f} s; in {arguments.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
