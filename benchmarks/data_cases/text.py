"""Text preprocessing: tokens a second of whole commands, of the builder, and of the encoder alone.

The builder's peer is the obvious loop: one line a task over `multiprocessing.Pool.imap`, each document added to
megatron-core's `IndexedDatasetBuilder`. It is what Megatron-LM's script does, without its imports and options.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from benchmarks.data import ROOT, Arguments, Figure
from benchmarks.data_cases import corpora

_MEGATRON = "https://github.com/NVIDIA/Megatron-LM.git"
_TAG = "core_v0.16.1"


def megatron_lm(arguments: Arguments) -> Path | None:
    """A checkout with Megatron-LM's script, or None."""
    if arguments.smoke:
        return None
    if arguments.megatron_lm:
        if not (arguments.megatron_lm / "tools" / "preprocess_data.py").exists():
            raise SystemExit(f"error: --megatron-lm {arguments.megatron_lm}: has no tools/preprocess_data.py")
        return arguments.megatron_lm
    path = arguments.folder / "Megatron-LM"
    if not path.exists():
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", _TAG, _MEGATRON, str(path)]
        if subprocess.run(command, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}).returncode:
            shutil.rmtree(path, ignore_errors=True)
            return None
    return path


def _seconds(command: list[str], **environment: str) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def run(arguments: Arguments) -> Iterator[Figure]:
    """Whole commands and encoders, for a BPE and a unigram model."""
    path, checkout = arguments.text or corpora.text(arguments.folder, arguments.smoke), megatron_lm(arguments)
    one = arguments.folder / "one.jsonl"  # what a command takes before its first document
    one.write_text(corpora.ONE)
    workers, work = str(arguments.workers), arguments.folder / "work"
    work.mkdir(exist_ok=True)
    for kind in ("bpe", "unigram"):
        model = str(corpora.tokenizer(arguments.folder, kind, arguments.smoke, corpus=arguments.text))
        common = ["--tokenizer-model", model, "--append-eod", "--workers", workers]
        ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *common, "--overwrite"]
        sides = {"ours": (ours, {"PYTHONPATH": str(ROOT)})}
        if checkout:
            script = [sys.executable, str(checkout / "tools" / "preprocess_data.py"), *common]
            script += ["--tokenizer-type", "GPTSentencePieceTokenizer"]
            site = peers_site(arguments)
            sides["megatron"] = (script, {"PYTHONPATH": f"{checkout}{os.pathsep}{site}"})
        took: dict[str, list[float]] = {}
        for _ in range(1 if arguments.smoke else arguments.repeats):
            for name, (command, environment) in sides.items():
                for source in (one, path):
                    words = [*command, "--input", str(source), "--output-prefix", str(work / f"{name}-{source.stem}")]
                    took.setdefault(f"{name} {source.stem}", []).append(_seconds(words, **environment))
        best = {name: min(values) for name, values in took.items()}
        size = path.stat().st_size / 1e6
        tokens = (work / f"ours-{path.stem}_text_document.bin").stat().st_size / 2
        running = best[f"ours {path.stem}"] - best["ours one"]
        yield Figure(
            "text",
            f"{kind}: ours, {workers} workers, {size:.0f} MB, without start-up",
            tokens / running / 1e6,
            "Mtok/s",
        )
        if checkout:
            for suffix in (".bin", ".idx"):
                files = [str(work / f"{name}-{path.stem}_text_document{suffix}") for name in sides]
                if not filecmp.cmp(*files, shallow=False):
                    raise SystemExit(f"error: {' and '.join(files)} differ")
            theirs = best[f"megatron {path.stem}"] - best["megatron one"]
            whole = best[f"megatron {path.stem}"] / best[f"ours {path.stem}"]
            yield Figure("text", f"{kind}: Megatron-LM's script, without start-up", tokens / theirs / 1e6, "Mtok/s")
            yield Figure(
                "text", f"{kind}: ours / Megatron-LM's, without start-up; same bytes", theirs / running, "x", ">= 3"
            )
            yield Figure("text", f"{kind}: ours / Megatron-LM's, whole commands", whole, "x", ">= 3")
        else:
            print(f"{kind}: Megatron-LM's script is not here (--megatron-lm): its ratio is not measured")
        yield from _builders(kind, model, path, work, arguments)
        yield from _encoders(kind, model, path, arguments)


def peers_site(arguments: Arguments) -> str:
    """Folder of packages that Megatron-LM's script imports beside megatron-core's."""
    site = arguments.folder / "megatron-lm-needs"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*command, "six==1.17.0", "triton==3.7.1"], check=True)
    return str(site)


_loop: dict = {}


def _start_loop(model: str) -> None:
    _loop["model"] = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_line(line: str) -> list[int]:
    ids = _loop["model"].encode(json.loads(line)["text"])
    if ids:
        ids.append(_loop["model"].eos_id())
    return ids


def _run_loop(path: Path, prefix: str, model: str, workers: int) -> float:
    """Seconds of the loop; start-up of its pool included, megatron-core's import not."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size()
    began = time.perf_counter()
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    with path.open(encoding="utf-8") as stream, multiprocessing.Pool(workers, _start_loop, (model,)) as pool:
        for ids in pool.imap(_encode_line, stream, 32):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(prefix + ".idx")
    return time.perf_counter() - began


def _builders(kind: str, model: str, path: Path, work: Path, arguments: Arguments) -> Iterator[Figure]:
    """The builder against the loop over a pool, alternately in this process."""
    from megatron_mm.data.build.text import build_text

    ours, loop, took = str(work / "build"), str(work / "loop"), {"ours": [], "loop": []}
    for _ in range(1 if arguments.smoke else arguments.repeats):
        took["loop"].append(_run_loop(path, loop, model, arguments.workers))
        report = build_text([str(path)], ours, model, append_eod=True, workers=arguments.workers, overwrite=True,
                            progress=False)  # fmt: skip
        took["ours"].append(report[f"{ours}_text_document"]["seconds"])
    for suffix in (".bin", ".idx"):
        if not filecmp.cmp(f"{ours}_text_document{suffix}", loop + suffix, shallow=False):
            raise SystemExit(f"error: {ours}_text_document{suffix} and {loop}{suffix} differ")
    ratio = min(took["loop"]) / min(took["ours"])
    yield Figure(
        "text", f"{kind}: our builder / a loop over a pool, one document a task; same bytes", ratio, "x", ">= 1.5"
    )


def _encoders(kind: str, model: str, path: Path, arguments: Arguments) -> Iterator[Figure]:
    """The encoder of a worker against SentencePiece's own batch encoding, on one core."""
    from megatron_mm.data.tokens.tokenizer import open_tokenizer
    from megatron_mm.data.tokens.word_cache import block_encoder

    tokenizer = open_tokenizer(model, require_media=False)
    with path.open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    blocks = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    options = {"return_type": "numpy"} if hasattr(tokenizer.processor, "encode_as_numpy") else {}
    rates: dict[str, list[float]] = {"ours": [], "sentencepiece": []}
    for _ in range(1 if arguments.smoke else arguments.repeats):
        encode = block_encoder(tokenizer, tokenizer.eos_id)
        began = time.process_time()
        count = sum(encode(block)[0].size for block in blocks)
        rates["ours"].append(count / (time.process_time() - began))
        began = time.process_time()
        count = sum(len(ids) for block in blocks for ids in tokenizer.processor.encode(block, num_threads=1, **options))
        rates["sentencepiece"].append(count / (time.process_time() - began))
    ours, theirs = max(rates["ours"]), max(rates["sentencepiece"])
    yield Figure("text", f"{kind}: SentencePiece's batch encoding, a core", theirs / 1e6, "Mtok/s")
    yield Figure("text", f"{kind}: our encoder / SentencePiece's batch encoding, a core", ours / theirs, "x", ">= 0.9")
