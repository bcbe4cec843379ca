"""Documents → sentences, with nltk's Punkt models (Kiss & Strunk 2006, doi:10.1162/coli.2006.32.4.485).

Used for shards whose documents are sequences of sentences (`--split-sentences`), as Megatron's own script makes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from megatron_mm.media.errors import DataError

#: Characters that are split at a time, as in Megatron's script. It bounds what a document costs: nltk takes at most
#: some 10 µs a character, whatever the text. A longer document is cut there, and a sentence across the cut becomes two.
MAX_CHARACTERS = 1_000_000


class SentenceSplitter:
    """Splits texts of one language.

    Args:
        language: name of a Punkt model, such as "english".
        folder: nltk data with `tokenizers/punkt_tab`; None: nltk's own places (NLTK_DATA among them).
        keep_space: sentences keep the spaces and line ends between them; else these are left out.

    Raises:
        DataError: nltk or its tables are not there.
    """

    def __init__(self, language: str = "english", folder: str | None = None, keep_space: bool = False) -> None:
        try:
            import nltk.data
            from nltk.tokenize.punkt import PunktTokenizer
        except ImportError as error:
            raise DataError("splitting into sentences needs nltk: pip install 'megatron_mm[sentences]'") from error
        if folder is not None:
            if not os.path.isdir(folder):
                raise DataError(f"--nltk-data {folder}: no such folder")
            nltk.data.path.insert(0, os.path.abspath(folder))
        try:
            self._punkt = PunktTokenizer(language)
        except (LookupError, ValueError, OSError) as error:
            place = folder or ", ".join(nltk.data.path)
            raise DataError(
                f"nltk's table tokenizers/punkt_tab/{language} is not in {place}; fetch it on a machine with internet "
                "(python -m nltk.downloader -d FOLDER punkt_tab) and pass --nltk-data FOLDER"
            ) from error
        self.keep_space = keep_space

    def __call__(self, text: str) -> list[str]:
        """Sentences of a text, in order."""
        found: list[str] = []
        for start in range(0, len(text), MAX_CHARACTERS):
            window = text[start : start + MAX_CHARACTERS]
            with _any_speed():
                spans = list(self._punkt.span_tokenize(window))
            if self.keep_space:
                starts = [begin for begin, _ in spans]
                spans = list(zip(starts, [*starts[1:], *(end for _, end in spans[-1:])]))
            found += [window[begin:end] for begin, end in spans]
        return found


def is_cut(text: str) -> bool:
    """Whether a text is longer than what is split at a time."""
    return len(text) > MAX_CHARACTERS


@contextlib.contextmanager
def _any_speed() -> Iterator[None]:
    """Takes nltk's limit of seconds away: whether a document can be split must not depend on the machine.

    From 3.10 on, nltk gives up once the process has computed for 5 s since a window was begun, against patterns that a
    stranger wrote. Punkt's own need no such guard, and a slow machine reaches the limit with any long document.
    """
    try:
        from nltk import redos
    except ImportError:  # an older release, without limits
        yield
        return
    limit, redos.DEFAULT_TIMEOUT = redos.DEFAULT_TIMEOUT, None
    try:
        yield
    finally:
        redos.DEFAULT_TIMEOUT = limit
