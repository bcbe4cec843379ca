"""Texts on which encoders are compared: real ones, and some chosen to be awkward."""

from __future__ import annotations

from pathlib import Path

ODD = [
    "", " ", "\n", "  two  spaces ", "tab\tand\r\nline", "日本語 の 文", "▁ literal", "a▁b", "<image>x <image> y<mask>",
    "-" * 100, "aaaa" * 50, "☃\u00a0é e\u0301 ﬁ", "\x00 nul", "</s> <unk> <pad>", "٣ 𝕏 👩‍👩‍👧",
    "a \u0301b", "a\u00a0 \u3000b\u200b \u200b c", "¨ x¨ ¨", "line\x0bfeed\x0c\x1f \x7f", "ﷺ ﷺ ﷺ", "Привет, мир! Ёж é",
    "aaab" * 300 + " " + "☃" * 300, "x" * 5000, "\u2028a\u2029 \u0085 b",
]  # fmt: skip


def real_texts() -> list[str]:
    """Sources of the standard library in pieces of 30 lines, and inputs chosen to be awkward."""
    import argparse
    import asyncio.events
    import pydoc_data.topics as topics

    texts = list(ODD)
    for module in (argparse, asyncio.events, topics):
        lines = Path(module.__file__).read_text(encoding="utf-8").split("\n")
        texts += ["\n".join(lines[i : i + 30]) for i in range(0, min(len(lines), 3000), 30)]
    return texts
