"""Without a network: what was downloaded and made is used again, and what is missing is named.

Every client of a registry, and espeak-ng, is a stand-in that fails and leaves a line. Truth: there is no line where
everything is there; where something is missing, its name is in the error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from examples.data import audio_visual, clips, emoji_art
from examples.quickstart import prepare
from tests.examples.art import write_animation, write_packages
from tests.examples.test_two_phases import NAMES, write_questions
from tests.support.programs import PYTHON, environment
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
NAMES = {**NAMES, "1f406": "TALL TREE", "1f407": "OLD SHIP", "1f408": "MOON"}
MODULES = {
    "examples.quickstart.prepare": ["--names", "0"],
    "examples.data.audio_visual": [],
    "examples.data.image_text": ["--questions", "12", "--shapes", "12"],
}


class Offline:
    """Stand-ins for the clients, in PATH and, for `python -m pip`, on Python's path."""

    def __init__(self, folder: Path) -> None:
        self.log, self.bin, self.modules = folder / "called", folder / "bin", folder / "modules"
        (self.modules / "pip").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("npm", "pip", "pip3", "apt-get", "dpkg-deb", "espeak-ng", "curl", "git"):
            script = self.bin / name
            said = 'echo "getaddrinfo ENOTFOUND host" >&2; exit 9'
            script.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.log}\n{said}\n')
            script.chmod(0o755)
        call = f"open({str(self.log)!r}, 'a').write('pip\\n')\nraise SystemExit('Failed to establish a new connection')"
        (self.modules / "pip" / "__init__.py").write_text("")
        (self.modules / "pip" / "__main__.py").write_text(call)
        self.environment = environment(PYTHONPATH=f"{self.modules}:{ROOT}")

    def run(self, command: list[str], path: str) -> subprocess.CompletedProcess:
        environment = {**self.environment, "PATH": f"{self.bin}{path}"}
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS, env=environment, cwd=ROOT, check=False
        )

    def prepare(self, module: str, data: Path, cache: Path) -> subprocess.CompletedProcess:
        words = [PYTHON, "-m", module, "--output", str(data), "--cache", str(cache), *MODULES[module]]
        return self.run(words, "")

    def called(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def write_sounds(data: Path, names: list[str]) -> None:
    """A tone in place of every recording of every preparation."""
    kinds = (prepare, audio_visual)
    recordings = {(voice, speed) for kind in kinds for voice in kind.TRAIN_VOICES for speed in kind.TRAIN_SPEEDS}
    recordings |= {(kind.HELDOUT_VOICE, kind.HELDOUT_SPEED) for kind in kinds}
    for number, (voice, speed) in enumerate(sorted(recordings)):
        for name in names:
            path = data / "sounds" / f"{voice}-{speed}" / f"{name.lower().replace(' ', '_')}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = 0.3 * np.sin(np.arange(4000 + 100 * len(name)) * (0.05 + 0.01 * number))
            soundfile.write(path, tone, 16000, subtype="PCM_16")


@pytest.fixture
def offline(tmp_path) -> Offline:
    return Offline(tmp_path)


@pytest.fixture
def cache(tmp_path) -> Path:
    """Every package of every preparation."""
    folder = tmp_path / "cache"
    write_packages(folder, NAMES, emoji_art.ALL_VENDORS)
    write_questions(folder)
    for code in NAMES:
        write_animation(folder / clips.PACKAGE.name.split("/")[1] / "assets" / f"{code}.webp", 10)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_called_if_everything_is_there(module, offline, cache, tmp_path):
    write_sounds(tmp_path / "data", list(NAMES.values()))
    for _ in range(2):
        done = offline.prepare(module, tmp_path / "data", cache)
        assert done.returncode == 0, done.stderr[-2000:]
    assert offline.called() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "missing", "message"),
    [
        ("examples.quickstart.prepare", "google", "npm could not get emoji-datasource-google 16.0.0 (npm): the regis"),
        ("examples.data.audio_visual", "fluent-emoji-anim-3", "npm could not get @lobehub/fluent-emoji-anim-3 1.0.0"),
        ("examples.data.image_text", "easy-vqa", "pip could not get easy-vqa 1.0 (pip): the registry cannot be"),
    ],
)
def test_a_package_that_is_missing_is_named(module, missing, message, offline, cache, tmp_path):
    write_sounds(tmp_path / "data", list(NAMES.values()))
    shutil.rmtree(cache / missing)
    done = offline.prepare(module, tmp_path / "data", cache)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert len(offline.called()) == 1


@pytest.mark.parametrize("module", ["examples.quickstart.prepare", "examples.data.audio_visual"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_program_that_is_missing_is_named(module, recorded, offline, cache, tmp_path):
    """Before anything is downloaded, if nothing was recorded yet; else when a recording turns out to be missing."""
    (offline.bin / "espeak-ng").unlink()
    if recorded:
        write_sounds(tmp_path / "data", list(NAMES.values()))
        (next((tmp_path / "data" / "sounds").glob("*/owl.wav"))).unlink()
    done = offline.prepare(module, tmp_path / "data", cache)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ("could not get espeak-ng" if os.geteuid() == 0 else "needs root") in done.stderr
    assert ("drawing" in done.stderr) == recorded


@pytest.mark.parametrize("module", MODULES)
def test_a_users_folder_is_not_prepared(module, offline, cache, tmp_path):
    """Lists of samples that have the names of a preparation's are not replaced."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "pairs.jsonl", "names.txt", "LICENCES.txt"):
        (data / name).write_text("mine\n")
    for output in (data, Path(""), Path("/")):
        done = offline.prepare(module, output, cache)
        assert done.returncode == 2 and "--output" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name: path.read_text() for path in data.iterdir()} == dict.fromkeys(os.listdir(data), "mine\n")
    assert len(os.listdir(data)) == 4 and offline.called() == []


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_of_an_earlier_version_goes_on(module, offline, cache, tmp_path):
    data = tmp_path / "data"
    write_sounds(data, list(NAMES.values()))  # it was interrupted
    assert offline.prepare(module, data, cache).returncode == 0
    lists = {path.name: path.read_bytes() for path in data.glob("*.jsonl")}
    (data / ".megatron_mm-output").unlink()  # it was complete
    assert offline.prepare(module, data, cache).returncode == 0
    assert lists and lists == {path.name: path.read_bytes() for path in data.glob("*.jsonl")}


@pytest.mark.slow
def test_the_whole_quick_start_runs_offline(offline, cache, tmp_path):
    """On a few samples, in the environment that is there; its clients would leave a line."""
    write_sounds(tmp_path / "out" / "data", list(NAMES.values()))
    words = ["bash", "examples/quickstart/run.sh", "--smoke", "--output", str(tmp_path / "out"), "--cache", str(cache)]
    done = offline.run([*words, "--seed", "7"], f":{offline.environment['PATH']}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done in" in done.stdout and (tmp_path / "out" / "results.json").exists() and offline.called() == []
    for run in ("run", "untrained"):
        assert "\n  seed: 7\n" in (tmp_path / "out" / run / "config.yaml").read_text()
