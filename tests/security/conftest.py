"""What the tests of hostile files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hostile import hostile

__all__ = ["hostile"]


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer that needs no training."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    path.write_text('{"kind": "bytes"}\n')
    return path
