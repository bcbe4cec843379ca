"""Signatures by which images are recognised after resizing and recompression: a perceptual hash and coarse colours.

The hash is the DCT one of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010: the
signs of the 64 lowest frequencies of the grey image of 32 × 32 pixels against their median. It sees no colours, so
pictures that differ by colour alone are told apart by a grid of mean chroma. An image without structure (one colour, a
soft gradient's worth of contrast) has a hash of rounding errors: it is `flat`, and equals files of the same bytes only.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from PIL import Image

#: Of one image.
SIGNATURE_DTYPE = np.dtype([("hash", "<u8"), ("flat", "?"), ("chroma", "u1", (32,))])
#: Largest difference of chroma (of 255) in a cell of the grid between pictures that count as one.
CHROMA_TOLERANCE = 16
_SIDE, _GRID = 32, 4
# A frequency beside the median by less is noise of compression, and its bit stays 0. In grey levels times pixels.
_NOISE = 12.0
# Standard deviation of the grey levels below which an image is flat.
_FLAT = 2.0


@functools.cache
def _dct() -> np.ndarray:
    """The orthonormal DCT-II of 32 values, its 9 lowest frequencies, [9, 32]."""
    frequencies, places = np.arange(9)[:, None], np.arange(_SIDE)[None]
    basis = np.cos(np.pi * frequencies * (2 * places + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis


def image_signature(image: Image.Image, data: bytes) -> tuple[int, bool, np.ndarray]:
    """Signature of an image.

    Args:
        image: decoded, RGB.
        data: its file, which identifies it if it is flat.

    Returns:
        (64-bit hash, whether it is flat, mean chroma Cb and Cr of 4 × 4 cells [32] u1).
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("YCbCr")
    pixels = np.asarray(small, dtype=np.float64)
    grey = pixels[..., 0]
    cell = _SIDE // _GRID
    chroma = pixels[..., 1:].reshape(_GRID, cell, _GRID, cell, 2).mean(axis=(1, 3)).round().astype(np.uint8).ravel()
    if grey.std() < _FLAT:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"), True, chroma
    frequencies = (_dct() @ grey @ _dct().T)[1:, 1:].ravel()
    bits = frequencies > np.median(frequencies) + _NOISE
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), False, chroma


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits by which the hashes of pairs of signatures differ, [n] u1; 65 where the images cannot be the same."""
    bits = np.bitwise_count(first["hash"] ^ second["hash"])
    chroma = np.abs(first["chroma"].astype(np.int16) - second["chroma"]).max(axis=1, initial=0)
    differ = (first["flat"] != second["flat"]) | (first["flat"] & (bits > 0)) | (chroma > CHROMA_TOLERANCE)
    return np.where(differ, np.uint8(65), bits)
