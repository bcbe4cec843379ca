"""Prepares emoji that are seen, as stills and moving, and named aloud: the data of AVT's tiny run.

    python -m examples.data.audio_visual --output outputs/avt-tiny/data

Names have stills of seven vendors, clips in which those stills move, and recordings of several voices (espeak-ng). Held
out are another artist's animations of the same names (Fluent's, in three dimensions, whose stills are left out as well)
and another voice, so neither the clip nor the recording of a held-out pair was ever met. Writes into the output folder

    train.jsonl            clips or stills with a spoken name, each of them alone, and names alone; the text is the name
    heldout_pairs.jsonl    an unseen clip and an unseen voice; heldout_clips.jsonl, heldout_sounds.jsonl: each alone
    heldout_names.jsonl    the same names without media: what a blind and deaf model may know
    names.txt              for the tokenizer
    LICENCES.txt           and the media

A second run downloads, draws and speaks nothing again.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tqdm import tqdm

from examples.data import clips, emoji_art, speech
from examples.data.emoji_art import ALL_VENDORS, Emoji, picture_path
from examples.data.samples import LICENCES, begin_data, sample, write_jsonl, write_lines
from megatron_mm.config.outputs import exit_status

#: Its stills are frames of the held-out animations.
LIKE_THE_CLIPS = "fluent"
TRAIN_VENDORS = tuple(name for name in ALL_VENDORS if name != LIKE_THE_CLIPS)
TRAIN_VOICES = ("en-us", "en-gb-x-rp+f2", "en-gb+m3", "en-029+f4", "en-us-nyc+m7", "en-us+f5")
HELDOUT_VOICE = "en-gb-scotland+f3"
TRAIN_SPEEDS = (210, 260)
HELDOUT_SPEED = 240


@dataclass
class Arguments:
    """What to prepare, and where."""

    output: Path
    """Folder to write."""
    cache: Path | None = None
    """Folder of downloaded packages; default: OUTPUT/packages."""
    names: int = 0
    """Names to learn; 0 takes all that move (about 110)."""
    variants: int = 4
    """Pictures made of each training drawing; one clip is made of each."""
    seed: int = 1
    """Seed of who goes with whom, and of the order."""


@dataclass(frozen=True)
class Thing:
    """A name with all that shows or says it, paths relative to the output folder."""

    emoji: Emoji

    @property
    def vendors(self) -> list[str]:
        """Those whose drawing is learned."""
        return [vendor for vendor in TRAIN_VENDORS if vendor in self.emoji.pictures]

    def pictures(self, variants: int) -> list[str]:
        """Stills to learn from."""
        return [picture_path(self.emoji, vendor, k) for vendor in self.vendors for k in range(variants)]

    def moving(self) -> dict[str, str]:
        """Clip to learn from, by vendor of the drawing that moves in it."""
        return {vendor: f"clips/{vendor}/{self.emoji.code}.webp" for vendor in self.vendors}

    @property
    def animation(self) -> str:
        """The held-out clip."""
        return f"clips/animated/{self.emoji.code}.webp"

    def recordings(self) -> list[tuple[str, int, str]]:
        """(voice, speed, path) of each recording to learn from."""
        return [(voice, speed, self.recording(voice, speed)) for voice in TRAIN_VOICES for speed in TRAIN_SPEEDS]

    def recording(self, voice: str, speed: int) -> str:
        """The name in a voice."""
        return f"sounds/{voice}-{speed}/{self.emoji.name.replace(' ', '_')}.wav"


def training_samples(things: list[Thing], variants: int, seed: int) -> list[dict]:
    """Every still and clip with a recording, and alone; every recording alone, twice; the name alone, a few times."""
    chance = random.Random(seed)
    samples = []
    for thing in things:
        name, code = thing.emoji.name, thing.emoji.code
        seen = [("images", path) for path in thing.pictures(variants)]
        seen += [("videos", path) for path in thing.moving().values()]
        heard = [path for *_, path in thing.recordings()]
        for number, (kind, path) in enumerate(seen):
            with_sound = {kind: [path], "audios": [chance.choice(heard)]}
            samples.append(sample(f"both/{code}/{number}", name, **with_sound))
            samples.append(sample(f"seen/{code}/{number}", name, **{kind: [path]}))
        samples += [sample(f"heard/{code}/{n}", name, audios=[path]) for n, path in enumerate(heard * 2)]
        samples += [sample(f"name/{code}/{n}", name) for n in range(4)]
    chance.shuffle(samples)
    return samples


def heldout_samples(things: list[Thing]) -> dict[str, list[dict]]:
    """Pairs, clips alone, sounds alone and names alone."""
    held = {"pairs": [], "clips": [], "sounds": [], "names": []}
    for thing in things:
        seen, heard = {"videos": [thing.animation]}, {"audios": [thing.recording(HELDOUT_VOICE, HELDOUT_SPEED)]}
        for kind, media in (("pairs", seen | heard), ("clips", seen), ("sounds", heard), ("names", {})):
            held[kind].append(sample(f"{kind}/{thing.emoji.code}", thing.emoji.name, **media))
    return held


def make_media(things: list[Thing], animations: dict[str, Path], variants: int, output: Path) -> float:
    """Draws, animates and speaks all that is not there yet.

    Returns:
        Seconds of the longest recording.
    """
    for vendor in TRAIN_VENDORS:
        emoji_art.draw_all([t.emoji for t in things if vendor in t.vendors], {vendor: variants}, output)
    moving = [(t.emoji.pictures[vendor], output / path, 1) for t in things for vendor, path in t.moving().items()]
    sampled = [(animations[t.emoji.code], output / t.animation) for t in things]
    spoken = [(t.emoji.name, voice, speed, output / path) for t in things for voice, speed, path in t.recordings()]
    voice, speed = HELDOUT_VOICE, HELDOUT_SPEED
    spoken += [(t.emoji.name, voice, speed, output / t.recording(voice, speed)) for t in things]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda job: clips.move_drawing(*job), moving)
        list(tqdm(made, total=len(moving), desc="moving", unit="drawing", mininterval=1))
        made = pool.map(lambda job: clips.sample_animation(*job), sampled)
        list(tqdm(made, total=len(sampled), desc="animating", unit="emoji", mininterval=1))
    return speech.record_all(spoken)


def choose_things(fetched: dict[str, Path], animations: dict[str, Path], count: int) -> list[Thing]:
    """Names that the quick start's vendors drew and that move.

    Args:
        fetched: unpacked package of every vendor.
        animations: by code points.
        count: at most this many; 0 takes all.
    """
    base = {name: folder for name, folder in fetched.items() if name in emoji_art.VENDORS}
    more = {name: folder for name, folder in fetched.items() if name not in base}
    extra = {vendor: emoji_art.pictures_of(vendor, folder) for vendor, folder in more.items()}
    things = []
    for emoji in emoji_art.choose_names(base, 0):
        if emoji.code in animations:
            also = {vendor: files[emoji.code] for vendor, files in extra.items() if emoji.code in files}
            things.append(replace(emoji, pictures=emoji.pictures | also))
    things = random.Random(0).sample(things, min(count or len(things), len(things)))
    return [Thing(emoji) for emoji in sorted(things, key=lambda e: e.code)]


def main(arguments: Arguments) -> None:
    """Fetches, draws, speaks and writes; raises ValueError for what a user can mend."""
    output, cache = arguments.output, arguments.cache or arguments.output / "packages"
    begin_data(output, "examples.data.audio_visual")
    if not (output / "sounds").is_dir():
        speech.install()  # before anything is downloaded in vain
    shipped = [vendor.package for vendor in ALL_VENDORS.values()] + [clips.PACKAGE]
    licences = [f"{package}: {package.licence}" for package in shipped] + [f"espeak-ng (apt): {speech.LICENCE}"]
    print(*licences, sep="\n", flush=True)
    fetched = {vendor.name: emoji_art.fetch(vendor, cache) for vendor in ALL_VENDORS.values()}
    animations = clips.fetch(cache)
    things = choose_things(fetched, animations, arguments.names)
    longest = make_media(things, animations, arguments.variants, output)
    train = training_samples(things, arguments.variants, arguments.seed)
    write_jsonl(output / "train.jsonl", train)
    for kind, lines in heldout_samples(things).items():
        write_jsonl(output / f"heldout_{kind}.jsonl", lines)
    write_lines(output / "names.txt", [thing.emoji.name for thing in things])
    write_lines(output / LICENCES, licences)
    print(f"{len(things)} names; {len(train)} training samples; longest sound {longest:.2f} s; in {output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"audio_visual.py: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
