"""Builds that are killed with SIGKILL ten times end with the bytes of builds that nobody disturbed.

    python -m tests.data.killed_builds --folder outputs/killed-builds [--smoke]

Text: 1 GB of documentation and dictionaries from Debian's packages. Samples: every emoji of every vendor (npm), Tux
Paint's stamps with captions and spoken descriptions, and Asterisk's prompts with transcripts. Downloads are kept in the
folder. With --smoke, the Python library's own sources and a few drawn samples, without downloads. Each kill comes after
a random part, up to six tenths, of the time that the undisturbed build took: of a short one too, some come after its
journal was begun. Exit status 1 if a byte differs.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.data import emoji_art, tux_paint
from examples.data.packages import Package, fetch
from megatron_mm.config.outputs import begin_folder
from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.store.manifest import sha256

ROOT = Path(__file__).resolve().parents[2]
_TEXT = r"usr/share/(doc|dictd|linux-doc|cppreference)/.*\.(html|txt|rst|dict\.dz|dz)"
TEXTS = [
    Package("apt", name, "", _TEXT, licence)
    for name, licence in {
        "rust-doc": "MIT or Apache-2.0",
        "openjdk-17-doc": "GPL-2 with classpath exception",
        "linux-doc-6.1": "GPL-2",
        "cppreference-doc-en-html": "CC-BY-SA-3.0",
        "python3.11-doc": "PSF-2.0",
        "dict-gcide": "GPL-3",
        "dict-wn": "WordNet",
    }.items()
]
PROMPTS = Package("apt", "asterisk-core-sounds-en-wav", "", r"usr/share/asterisk/sounds/.*\.wav", "CC-BY-SA-3.0")
TRANSCRIPTS = Package("apt", "asterisk-core-sounds-en", "", r"usr/share/.*core-sounds-en\.txt(\.gz)?", "CC-BY-SA-3.0")
STAMPS = Package("apt", "tuxpaint-stamps-default", "", r"usr/share/tuxpaint/stamps/.*\.(png|svg|txt|ogg|wav)", "GPL-2")


@dataclass
class Arguments:
    """Compare builds."""

    folder: Path = ROOT / "outputs" / "killed-builds"
    """Downloads, corpora and builds: a new folder, or one of earlier comparisons."""
    kills: int = 10
    """Times that each build is killed."""
    workers: int = 2
    """Worker processes."""
    seed: int = 0
    """Of the moments."""
    smoke: bool = False
    """Small corpora without downloads."""


def documents(folder: Path, smoke: bool) -> Iterator[str]:
    """Texts of the corpus."""
    if smoke:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            yield path.read_text(encoding="utf-8", errors="replace")
        return
    for package in TEXTS:
        for path in sorted(fetch(package, folder / "packages" / package.name).rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode(errors="replace")
            for start in range(0, len(text), 1 << 16):
                yield text[start : start + (1 << 16)]


def samples(folder: Path, smoke: bool) -> Iterator[dict]:
    """Samples with media; paths are absolute."""
    if smoke:
        from tests.data.conftest import write_samples

        made = write_samples(folder / "drawn", 400)
        for line in made.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for kind in ("images", "audios", "videos"):
                record[kind] = [str(made.parent / name) for name in record.get(kind, [])]
            yield record
        return
    packages, drawn = folder / "packages", folder / "drawn"
    jobs, records = [], []
    for name, vendor in emoji_art.ALL_VENDORS.items():
        for code, picture in sorted(emoji_art.pictures_of(name, emoji_art.fetch(vendor, packages)).items()):
            target = drawn / name / f"{code}.png"
            jobs.append((picture, target, 0))
            records.append({"prompt": "<image>", "text": f"{name} {code}", "images": [str(target)]})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(_drawn, jobs))
    yield from (record for record, there in zip(records, made) if there)
    stamps = fetch(STAMPS, packages / "tuxpaint-stamps-with-sounds") / "usr/share/tuxpaint/stamps"
    for stamp in tux_paint.read_stamps(stamps, longest=100):
        target = drawn / "stamps" / f"{stamp.name}.png"
        tux_paint.draw(stamp, target, 256)
        yield {"prompt": "<image>", "text": stamp.caption, "images": [str(target)]}
        for sound in sorted(stamp.picture.parent.glob(f"{stamp.picture.stem}_desc*.ogg")):
            yield {"prompt": "<image><audio>", "text": stamp.caption, "images": [str(target)], "audios": [str(sound)]}
    (table,) = [
        path for path in fetch(TRANSCRIPTS, packages / TRANSCRIPTS.name).rglob("core-sounds-en*") if path.is_file()
    ]
    data = table.read_bytes()
    lines = (gzip.decompress(data) if table.suffix == ".gz" else data).decode(errors="replace").splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    prompts = fetch(PROMPTS, packages / PROMPTS.name)
    for sound in sorted(prompts.rglob("*.wav")):
        name = re.sub(r"^.*/sounds/[^/]+/", "", sound.as_posix()).removesuffix(".wav")
        if name in said:
            yield {"prompt": "<audio>", "text": said[name].strip(), "audios": [str(sound)]}


def _drawn(job: tuple[Path, Path, int]) -> bool:
    """Draws a picture that is not there yet; a few vendors' files are no pictures."""
    if not job[1].is_file():
        try:
            emoji_art.draw(*job)
        except (OSError, ValueError):
            return False
    return True


def write(path: Path, records: Iterator[dict]) -> Path:
    """A JSONL, unless it is there."""
    if not path.exists():
        making = path.with_suffix(".making")
        with making.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        making.rename(path)
    return path


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = sha256(str(path))
    return found


def has_builds(folder: Path) -> bool:
    """Whether a folder has what earlier comparisons, which left no marker, began with."""
    packages = (folder / "packages" / package.name / "usr" for package in TEXTS)
    return any(map(Path.is_dir, [*packages, *folder.glob("text/undisturbed")]))


def compare(name: str, command: list[str], output: str, arguments: Arguments) -> bool:
    """Builds undisturbed and killed; whether the bytes agree."""
    root, chance = arguments.folder / name, random.Random(f"{arguments.seed}/{name}")
    shutil.rmtree(root, ignore_errors=True)
    folders = [root / "undisturbed", root / "killed"]
    for folder in folders:
        folder.mkdir(parents=True)
    whole, cut = ([*command, output, str(folder / "out")] for folder in folders)
    began = time.monotonic()
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took = time.monotonic() - began
    kills = took_up = 0
    while kills < arguments.kills:
        process = subprocess.Popen(cut, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ended = process.wait(chance.uniform(0.02, 0.6) * took)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if (folders[1] / "out.building").exists() or not any(folders[1].iterdir()):
                kills += 1
                took_up += (folders[1] / "out.building" / "journal.json").exists()
                continue
            ended = 0  # all was built: only the process had not ended yet
        if ended:
            raise SystemExit(f"error: {' '.join(cut)} ended with {ended}")
        for path in folders[1].iterdir():  # it ended before the kills did: from the start again
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    subprocess.run(cut, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted, found = map(checksums, folders)
    size = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    same = wanted == found and bool(wanted)
    print(
        f"{name}: {len(wanted)} files, {size / 1e6:,.1f} MB, undisturbed in {took:.0f} s; killed {kills} times, "
        f"{took_up} of them after its journal was begun: {'the same bytes' if same else 'DIFFERENT BYTES'}",
        flush=True,
    )
    return same


def main() -> int:
    """Prepares the corpora and compares."""
    arguments = tyro.cli(Arguments, description=__doc__)
    folder, tag = arguments.folder.resolve(), "-smoke" if arguments.smoke else ""
    arguments.folder = folder
    begin_folder(folder, "tests/data/killed_builds.py", "--folder", has_builds)
    text = write(folder / f"text{tag}.jsonl", ({"text": text} for text in documents(folder, arguments.smoke)))
    media = write(folder / f"samples{tag}.jsonl", samples(folder, arguments.smoke))
    model = folder / f"tokenizer{tag}.model"
    if not model.exists():
        pieces = 600 if arguments.smoke else 16000
        train_tokenizer([str(media), str(text)], str(model), pieces, "bpe", max_sentences=50000)
    for path in (text, media):
        with path.open("rb") as stream:
            print(f"{path.name}: {path.stat().st_size / 1e6:,.1f} MB, {sum(1 for _ in stream):,} lines", flush=True)
    tools, common = ROOT / "tools", ["--tokenizer-model", str(model), "--workers", str(arguments.workers)]
    builds = {
        "text": ([str(tools / "preprocess_data.py"), "--input", str(text), "--append-eod"], "--output-prefix"),
        "samples": ([str(tools / "preprocess_multimodal.py"), "--input", str(media)], "--output"),
    }
    same = [
        compare(name, [sys.executable, *words, *common], output, arguments) for name, (words, output) in builds.items()
    ]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
