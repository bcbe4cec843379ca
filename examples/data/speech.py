"""Spoken names from espeak-ng: one short 16 kHz recording of a name in a voice, silence trimmed.

espeak-ng is a formant synthesiser, free software (GPL-3.0-or-later) in every Linux distribution; its voices differ in
accent (en-us, en-gb-scotland, …) and timbre (+m3, +f2, …). What is held out later is a voice.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from examples.data import programs
from megatron_mm.platform.atomic_files import written_whole

SAMPLE_RATE = 16000
LICENCE = "speech synthesised by espeak-ng, GPL-3.0-or-later (the program; its output is yours)"


def install() -> None:
    """Installs espeak-ng with apt-get if it is missing.

    Raises:
        ValueError: it is missing and this user cannot install it, or apt-get failed.
    """
    programs.install({"espeak-ng": "espeak-ng"})


def speak(text: str, voice: str, words_per_minute: int) -> np.ndarray:
    """Speaks a text.

    Args:
        text: what to say.
        voice: espeak-ng voice, such as "en-us+f2".
        words_per_minute: speed; espeak-ng's own default is 175.

    Returns:
        float32 samples in [-1, 1] at SAMPLE_RATE, without leading and trailing silence.

    Raises:
        ValueError: espeak-ng refused the voice or said nothing.
    """
    done = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "--stdout", "--", text], capture_output=True
    )
    if done.returncode != 0 or not done.stdout:
        raise ValueError(f"espeak-ng -v {voice} said nothing for {text!r}: {done.stderr.decode().strip()}")
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if loud.size == 0:
        raise ValueError(f"espeak-ng -v {voice} gave only silence for {text!r}")
    return soxr.resample(samples[loud[0] : loud[-1] + 1], rate, SAMPLE_RATE)


def record(text: str, voice: str, words_per_minute: int, target: Path) -> float:
    """Writes a spoken text as 16-bit WAV, unless the file exists.

    Returns:
        The recording's seconds.
    """
    if not target.is_file():
        with written_whole(target, "xb", partial=target.with_suffix(".partial")) as stream:
            soundfile.write(stream, speak(text, voice, words_per_minute), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    return soundfile.info(target).duration


def record_all(sentences: Sequence[tuple[str, str, int, Path]]) -> float:
    """Writes every recording that is not there yet; if one is missing, espeak-ng is installed where it is missing too.

    Args:
        sentences: arguments of `record`.

    Returns:
        Seconds of the longest recording.

    Raises:
        ValueError: espeak-ng is needed and cannot be installed, or does not have a voice.
    """
    if not all(target.is_file() for *_, target in sentences):
        install()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # espeak-ng is a process of its own
        seconds = pool.map(lambda sentence: record(*sentence), sentences)
        return max(tqdm(seconds, total=len(sentences), desc="speaking", unit="sound", mininterval=1))
