"""Speed of tools/preprocess_data.py against the obvious loop: one document a task over a process pool.

    python benchmarks/preprocess_data.py --workers 2

The peer parses and encodes one line in each call of `multiprocessing.Pool.imap` and adds each document to
megatron-core's `IndexedDatasetBuilder`, as Megatron's own script does. Both run with the same SentencePiece model and
number of workers, alternately; start-up of the pools is in both times, megatron-core's import in neither. Outputs are
compared byte for byte. Without --input the text is the source and documentation of the running Python.
"""

from __future__ import annotations

import filecmp
import glob
import json
import multiprocessing
import os
import resource
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass

import sentencepiece
import tyro

from megatron_mm.data.build_text import build_text
from megatron_mm.data.errors import run_tool
from megatron_mm.data.train_tokenizer import train_tokenizer

_peer: dict = {}


@dataclass
class Args:
    """Benchmark of text preprocessing."""

    input: str | None = None
    """JSONL with "text"; by default the Python library's own text."""
    megabytes: int = 40
    """Size of the default text."""
    tokenizer_model: str | None = None
    """SentencePiece model; by default a unigram and a BPE model of 8,000 pieces, trained on the text."""
    workers: int = 2
    """Worker processes of both."""
    repeats: int = 3
    """Runs of each; the fastest counts."""
    json: str | None = None
    """Write the figures here."""


def default_text(path: str, megabytes: int) -> None:
    """Writes a JSONL of Python sources, cut into documents of about 40 lines."""
    size = 0
    library = sysconfig.get_paths()["stdlib"]
    with open(path, "w", encoding="utf-8") as stream:
        for name in sorted(glob.glob(library + "/**/*.py", recursive=True)):
            try:
                with open(name, encoding="utf-8") as source:
                    lines = source.read().split("\n")
            except (OSError, UnicodeDecodeError):
                continue
            for start in range(0, len(lines), 40):
                size += stream.write(json.dumps({"text": "\n".join(lines[start : start + 40])}) + "\n")
            if size > megabytes << 20:
                return


def _start_peer(model: str) -> None:
    _peer["model"] = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_line(line: str) -> list[int]:
    ids = _peer["model"].encode(json.loads(line)["text"])
    if ids:
        ids.append(_peer["model"].eos_id())
    return ids


def run_peer(path: str, prefix: str, model: str, workers: int) -> tuple[int, float]:
    """Runs the per-document loop. Returns tokens and seconds."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size()
    begin, tokens = time.perf_counter(), 0
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    with open(path, encoding="utf-8") as stream, multiprocessing.Pool(workers, _start_peer, (model,)) as pool:
        for ids in pool.imap(_encode_line, stream, 32):
            builder.add_document(ids, [len(ids)] if ids else [])
            tokens += len(ids)
    builder.finalize(prefix + ".idx")
    return tokens, time.perf_counter() - begin


def cpu_seconds() -> float:
    """CPU time of this process and its finished children: unlike the clock, it hardly notices other programs."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.input
        if path is None:
            path = os.path.join(folder, "text.jsonl")
            default_text(path, args.megabytes)
        models = {"given": args.tokenizer_model}
        if args.tokenizer_model is None:
            models = {kind: os.path.join(folder, kind + ".model") for kind in ("unigram", "bpe")}
            for kind, model in models.items():
                train_tokenizer([path], model, 8000, kind, max_sentences=50000)
        for kind, model in models.items():
            ours, peers, same = [], [], True
            cpu = {"ours": [], "peer": []}
            for _ in range(args.repeats):
                start = cpu_seconds()
                tokens, seconds = run_peer(path, folder + "/peer", model, args.workers)
                cpu["peer"].append(cpu_seconds() - start)
                start = cpu_seconds()
                peers.append(tokens / seconds)
                report = build_text(
                    [path], folder + "/ours", model, append_eod=True, workers=args.workers, overwrite=True,
                    progress=False,
                )  # fmt: skip
                cpu["ours"].append(cpu_seconds() - start)
                figures = report[folder + "/ours_text_document"]
                ours.append(figures["tokens"] / figures["seconds"])
                for suffix in (".bin", ".idx"):
                    same &= filecmp.cmp(folder + "/peer" + suffix, folder + "/ours_text_document" + suffix, False)
            results.append(
                {
                    "model": kind, "megabytes": os.path.getsize(path) / 1e6, "tokens": tokens, "workers": args.workers,
                    "peer_tokens_per_second": max(peers), "tokens_per_second": max(ours),
                    "ratio": max(ours) / max(peers), "cpu_ratio": min(cpu["peer"]) / min(cpu["ours"]),
                    "identical": same,
                }
            )  # fmt: skip
            r = results[-1]
            print(
                f"{kind:8} {r['megabytes']:.0f} MB, {args.workers} workers: per-document loop "
                f"{r['peer_tokens_per_second'] / 1e6:.2f} Mtok/s, preprocess_data {r['tokens_per_second'] / 1e6:.2f} "
                f"Mtok/s, ratio {r['ratio']:.2f} (in CPU time {r['cpu_ratio']:.2f}), "
                f"output {'identical' if same else 'DIFFERS'}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"preprocess_data": results}, stream, indent=2)
    if not all(r["identical"] for r in results):
        print("error: the outputs differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_tool(main)
