"""Arrays in .npy files that others may have written: mapped, of numbers alone."""

from __future__ import annotations

import numpy as np

from megatron_mm.media.errors import DataError
from megatron_mm.media.files import open_file


def load_array(path: str) -> np.ndarray:
    """The array of a file, mapped read-only, so that its size is that of the file whatever its header says.

    Raises:
        DataError: the file is missing, is no plain file, is damaged, or holds Python's objects; names it.
    """
    try:
        open_file(path).close()  # numpy would wait for the other end of a pipe
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header ends in whatever Python's parser raises
        raise DataError(f"{path}: missing or damaged ({error})") from error
