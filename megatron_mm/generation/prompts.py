"""Prompts for tools/generate.py: read and checked before torch is imported or a model loaded."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mm.data.corpus.samples import parse_line
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS
from megatron_mm.media.errors import DataError


def read_prompts(path: Path, media_root: Path | None = None) -> list[dict]:
    """Prompts of a JSONL: {"id", "prompt", "text" (kept as the reference), "images", "audios", "videos"}.

    Paths are relative to the file's folder, or to `media_root`.

    Raises:
        ValueError: no such file, a line that is not a JSON object or has a field of the wrong type, or names a
            missing file; with file and line number.
    """
    root = media_root or path.parent
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a JSONL of prompts") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_line(line, where)
        prompt = {"id": record.get("id", f"line {number}")}
        for name in ("prompt", "text"):
            value = record.get(name)
            if value is not None and not isinstance(value, str):
                raise DataError(f'{where}: field "{name}" must be a string, not {type(value).__name__}')
            prompt[name] = value
        for kind in PLACEHOLDERS:
            files = record.get(kind) or []
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise DataError(f'{where}: field "{kind}" must be a list of paths')
            prompt[kind] = [str(root / file) for file in files]
        check_prompt(prompt, where)
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def check_prompt(prompt: dict, where: str) -> None:
    """Refuse missing files and placeholders without a file before any model is loaded."""
    for kind in PLACEHOLDERS:
        for file in prompt.get(kind) or ():
            if not Path(file).is_file():
                raise DataError(f"{where}: no such file: {file}")
        files, written = len(prompt.get(kind) or ()), (prompt.get("prompt") or "").count(PLACEHOLDERS[kind])
        if written > files:
            raise DataError(f"{where}: the prompt has {written} {PLACEHOLDERS[kind]} but names {files} {kind}")


def result_line(prompt: dict, answer: str) -> str:
    """One line of the output JSONL."""
    record = {"id": prompt["id"], "prompt": prompt.get("prompt"), "generated": answer}
    if prompt.get("text") is not None:
        record["reference"] = prompt["text"]
    return json.dumps(record | {kind: prompt[kind] for kind in PLACEHOLDERS if prompt.get(kind)}, ensure_ascii=False)
