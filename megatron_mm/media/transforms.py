"""Pixels and samples → what the towers read: cropped and normalised images, log-mel spectrograms, waveforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

Box = tuple[float, float, float, float]


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height of an image, or of an array [height, width, channels]."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def center_crop_box(width: int, height: int) -> Box:
    """The largest centred square: resizing it equals resizing the shorter side and cropping the centre."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resize(image: Image.Image | np.ndarray, size: int, box: Box) -> Image.Image:
    """The box of an image, made size × size (bicubic, antialiased).

    Where the box has whole pixels, an array (uint8 [height, width, 3]) is cropped and resized by torch, at four to
    seven times Pillow's speed and within two levels of 255 of it; everything else by Pillow, which also sees pixels
    around the box.
    """
    if isinstance(image, np.ndarray):
        if all(float(edge).is_integer() for edge in box):
            left, top, right, bottom = map(int, box)
            pixels = torch.from_numpy(image)[top:bottom, left:right].permute(2, 0, 1)[None]
            pixels = functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
            return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
        image = Image.fromarray(image)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def image_tensor(
    image: Image.Image | np.ndarray, size: int, box: Box, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Crops, resizes (bicubic) and normalises an RGB image, or an array uint8 [height, width, 3].

    Returns:
        float32 [3, size, size].
    """
    return pixel_tensor(resize(image, size, box), mean, std)


def pixel_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalises channels: (value / 255 - mean) / std.

    Returns:
        float32 [3, height, width].
    """
    scale = 1.0 / (255.0 * np.asarray(std, dtype=np.float32))
    shift = np.asarray(mean, dtype=np.float32) / np.asarray(std, dtype=np.float32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.mul_(torch.from_numpy(scale)[:, None, None]).sub_(torch.from_numpy(shift)[:, None, None])


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, n_fft: int, num_mel_bins: int) -> torch.Tensor:
    """Slaney's triangular filters with area normalisation, 0 Hz to half the rate, as Whisper has them.

    Returns:
        float32 [num_mel_bins, n_fft // 2 + 1].
    """
    # Linear below 1 kHz (200/3 Hz a mel), logarithmic above (27 mels for a factor of 6.4): Slaney's Auditory Toolbox.
    linear_mels, log_step = 15.0, math.log(6.4) / 27.0
    nyquist = sample_rate / 2
    top = linear_mels + math.log(nyquist / 1000.0) / log_step if nyquist >= 1000.0 else nyquist * 3 / 200
    mels = np.linspace(0.0, top, num_mel_bins + 2)
    edges = np.where(mels >= linear_mels, 1000.0 * np.exp(log_step * (mels - linear_mels)), 200.0 / 3 * mels)
    bins = np.linspace(0.0, sample_rate // 2, n_fft // 2 + 1)
    slopes = edges[:, None] - bins[None, :]
    widths = np.diff(edges)
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters.astype(np.float32))


def log_mel_spectrogram(samples: np.ndarray, sample_rate: int, seconds: float, num_mel_bins: int) -> torch.Tensor:
    """Whisper's log-mel spectrogram (arXiv:2212.04356) of a sound padded or cut to a fixed length.

    Windows of 25 ms every 10 ms, power, mel filters, log10, at most 8 below the maximum, (x + 4) / 4.

    Args:
        samples: mono, float32 [samples].
        sample_rate: Hz.
        seconds: length to pad or cut to.
        num_mel_bins: mel bands.

    Returns:
        float32 [num_mel_bins, round(100 · seconds)].
    """
    n_fft, hop = sample_rate // 40, sample_rate // 100
    num_frames = round(seconds * 100)
    padded = torch.zeros(num_frames * hop)
    kept = min(samples.size, padded.numel())
    padded[:kept] = torch.from_numpy(np.ascontiguousarray(samples[:kept], dtype=np.float32))
    spectrum = torch.stft(padded, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)
    power = spectrum[:, :num_frames].abs() ** 2
    log_mel = torch.clamp(mel_filters(sample_rate, n_fft, num_mel_bins) @ power, min=1e-10).log10()
    log_mel = torch.maximum(log_mel, log_mel.max() - 8.0)
    return (log_mel + 4.0) / 4.0


def waveform(samples: np.ndarray, num_samples: int) -> torch.Tensor:
    """A waveform as wav2vec 2.0 reads it (arXiv:2006.11477): cut, of mean 0 and deviation 1, then padded with zeros.

    Args:
        samples: mono, float32 [samples], at least one.
        num_samples: length to cut or pad to.

    Returns:
        float32 [num_samples].
    """
    kept = samples[:num_samples].astype(np.float32)
    out = torch.zeros(num_samples)
    out[: kept.size] = torch.from_numpy((kept - kept.mean()) / np.sqrt(kept.var() + 1e-7))
    return out
