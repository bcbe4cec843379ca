"""Figures as people read them."""

from __future__ import annotations


def readable_size(size: float) -> str:
    """Bytes: '37.5 MB'."""
    if size < 1000:
        return f"{size:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"


def readable_time(seconds: float) -> str:
    """Seconds: '12.5 s', '37.0 min', '5.2 h'."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
