"""What is in a dataset: counts and lengths from its tables, samples as text, and a full check of every record."""

from __future__ import annotations

import os

import numpy as np
from tqdm import tqdm

from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.store.manifest import damaged_files
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS, Tokenizer
from megatron_mm.media.decoding import check_medium, decode_image, decode_sound
from megatron_mm.media.errors import DataError


def summary(shard: Shard) -> dict:
    """Counts, sizes and length statistics of a dataset, ready for JSON."""
    lengths = shard.document_lengths()
    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100])
    out: dict = {
        "path": shard.path,
        "kind": "multimodal" if shard.is_multimodal else "text",
        "documents": len(shard),
        "tokens": int(lengths.sum()),
        "token_dtype": str(shard.text.data.dtype),
        "document_tokens": {
            "mean": float(lengths.mean()),
            **{name: int(q) for name, q in zip(("min", "median", "p90", "p99", "max"), quantiles)},
        },
        "tokenizer": shard.manifest.get("tokenizer", {}).get("identity"),
    }
    if shard.is_multimodal:
        out["loss_tokens"] = int(shard.column("num_loss_tokens").sum())
        for kind in KINDS:
            reader = shard.media.get(kind)
            out[kind] = {
                "count": len(reader) if reader else 0,
                "bytes": int(reader.data.size) if reader else 0,
                "most_per_document": int(shard.column(f"num_{kind}").max()),
            }
        has_none = sum(shard.column(f"num_{kind}") for kind in KINDS) == 0
        out["documents_without_media"] = int(has_none.sum())
    return out


def describe_sample(shard: Shard, document: int, tokenizer: Tokenizer | None, width: int = 400) -> dict:
    """One document for the terminal: id, text (or ids where there is no tokenizer), media with their sizes."""
    tokens = shard.text.document(document)
    prompt = shard.prompt_length(document)
    out: dict = {"id": shard.document_id(document), "tokens": int(tokens.size)}
    if tokenizer is None:
        out["token_ids"] = tokens[:32].tolist()
    else:
        try:
            if prompt > 1:
                out["prompt"] = tokenizer.decode(tokens[:prompt].tolist())[:width]
            out["text"] = tokenizer.decode(tokens[prompt:].tolist())[:width]
        except IndexError:
            out["text"] = f"DAMAGED: holds the id {int(tokens.max())}; the tokenizer has {tokenizer.vocab_size} pieces"
    for kind in KINDS:
        media = [_describe_medium(kind, shard.medium(kind, record)) for record in shard.records(kind, document)]
        if media:
            out[kind] = media
    return out


def _describe_medium(kind: str, data: bytes) -> str:
    try:
        if kind == "images":
            image = decode_image(data)
            return f"{image.width}×{image.height}, {len(data):,} bytes"
        if kind == "audios":
            samples, rate = decode_sound(data)
            return f"{samples.size / rate:.2f} s at {rate} Hz, {len(data):,} bytes"
    except DataError as error:
        return f"DAMAGED: {error}"
    return f"{len(data):,} bytes"


def verify(shard: Shard, tokenizer: Tokenizer | None, progress: bool = True) -> list[str]:
    """Compares all checksums, reads every token and decodes every medium of a dataset that has opened.

    Returns:
        What is wrong, one message a record; empty for a sound dataset.
    """
    base = shard.path + os.sep if shard.is_multimodal else shard.path
    problems = damaged_files(shard.manifest, base)
    try:
        shard.check()
    except DataError as error:
        return [*problems, str(error)]
    for kind, reader in {"text": shard.text, "ids": shard.ids, **shard.media}.items():
        for document in reader.damaged() if reader is not None else ():
            what = f"document {document}" if kind in ("text", "ids") else f"record {document}"
            problems.append(f"{reader.prefix}.bin, {what}: its CRC-32 is not the one with which it was written")
    placeholders = tokenizer.placeholder_ids if tokenizer is not None and shard.is_multimodal else {}
    unlearned = np.array(tokenizer.unlearned_ids) if tokenizer is not None else np.array([], dtype=np.int64)
    for document in tqdm(range(len(shard)), desc=shard.name, unit="doc", disable=not progress, mininterval=0.5):
        where = f"{shard.path}, document {document} ({shard.document_id(document)})"
        tokens = shard.text.document(document)
        limit = tokenizer.vocab_size if tokenizer is not None else np.iinfo(np.int32).max
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            problems.append(f"{where}: token ids from {int(tokens.min())} to {int(tokens.max())}, not below {limit}")
        for kind, token in placeholders.items():
            written, stored = int((tokens == token).sum()), len(shard.records(kind, document))
            if written != stored:
                problems.append(f"{where}: {written} {PLACEHOLDERS[kind]} in the text, but {stored} {kind}")
        if placeholders:
            learned = int((~np.isin(tokens[shard.prompt_length(document) :], unlearned)).sum())
            if learned != int(shard.table["num_loss_tokens"][document]):
                problems.append(f"{where}: {learned} learned tokens, but the table says otherwise")
        for kind in KINDS:
            for record in shard.records(kind, document):
                try:
                    check_medium(kind, shard.medium(kind, record))
                except DataError as error:
                    problems.append(f"{shard.describe_record(kind, record, document)}: {error}")
    return problems
