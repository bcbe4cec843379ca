"""Prompts of an exported model: text, image, video and sound files to the tensors that it reads, and back.

Part of every exported folder; needs torch, transformers, sentencepiece and Pillow, and, where sounds or videos are
read, soundfile with soxr (sounds of another rate) and PyAV. `AutoProcessor.from_pretrained(folder,
trust_remote_code=True)` gives a `MultimodalProcessor`; its output goes to `model.generate(**inputs)` as it is. What the
model reads, and how, its configuration says (`config.inputs`).
"""

import io
import os

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageSequence
from transformers import AutoConfig
from transformers.audio_utils import mel_filter_bank
from transformers.utils import logging

logger = logging.get_logger(__name__)

PLACEHOLDERS = {"images": "<image>", "audios": "<audio>", "videos": "<video>"}
TOKENIZER_FILE = "tokenizer.model"


def _missing(package, purpose):
    return ValueError(f"{purpose} needs the package {package}: pip install {package}")


# ------------------------------------------------------------------------------------------------------------- images


def to_rgb(image):
    """RGB; transparent pixels show white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


def resize_and_centre_crop(image, size):
    """The largest square in the middle, resized (bicubic)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def evenly_spaced(total, wanted):
    """Frame numbers in the middle of `wanted` equal parts of `total` frames."""
    return ((2 * np.arange(wanted) + 1) * total // (2 * wanted)).tolist()


def video_frames(data, wanted):
    """`wanted` evenly spaced frames of a video or an animated image."""
    if data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        image = Image.open(io.BytesIO(data))
        numbers = evenly_spaced(getattr(image, "n_frames", 1), wanted)
        frames = {i: to_rgb(f.copy()) for i, f in enumerate(ImageSequence.Iterator(image)) if i in numbers}
        return [frames[i] for i in numbers]
    try:
        import av
    except ImportError as error:
        raise _missing("av", "reading videos") from error
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise ValueError("no video track")
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    for _ in range(2):  # a packet may hold no frame: then the frames that were found are counted instead
        if total == 0:
            break
        numbers = evenly_spaced(total, wanted)
        frames, count = {}, 0
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                if count in numbers:
                    frames[count] = frame.to_image()
                count += 1
                if count > numbers[-1]:
                    break
        if len(frames) == len(set(numbers)):
            return [frames[i] for i in numbers]
        total = count
    raise ValueError("a video without frames")


# ------------------------------------------------------------------------------------------------------------- sounds


def read_sound(data, rate):
    """Mono float32 samples of a sound file, resampled to `rate`."""
    try:
        import soundfile
    except ImportError as error:
        raise _missing("soundfile", "reading sounds") from error
    try:
        samples, found = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        samples = samples.mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError):
        samples, found = _sound_of_container(data)
    if samples.size == 0:
        raise ValueError("a sound without samples")
    if found != rate:
        try:
            import soxr
        except ImportError as error:
            raise _missing("soxr", f"a sound of {found} Hz (the model hears {rate} Hz)") from error
        length, samples = samples.size, soxr.resample(samples, found, rate)
        if samples.size == 0:
            raise ValueError(f"a sound too short to hear: {length} samples at {found} Hz are none at {rate} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _sound_of_container(data):
    try:
        import av
    except ImportError as error:
        raise _missing("av", "reading this kind of sound") from error
    parts = []
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.audio:
            raise ValueError("no sound track")
        rate = container.streams.audio[0].codec_context.sample_rate
        resampler = av.AudioResampler(format="fltp", layout=None, rate=None)
        for frame in container.decode(audio=0):
            parts += [out.to_ndarray().mean(axis=0) for out in resampler.resample(frame)]
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32), rate


def log_mel(samples, num_mel_bins, rate, seconds):
    """Whisper's log-mel spectrogram [mels, seconds·100] of samples padded or cut to `seconds`."""
    n_fft, hop, frames = rate // 40, rate // 100, round(seconds * 100)
    samples = torch.from_numpy(samples[: frames * hop])
    samples = torch.nn.functional.pad(samples, (0, frames * hop - samples.numel()))
    spectrum = torch.stft(samples, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)
    power = spectrum[:, :frames].abs() ** 2
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=rate / 2,
        sampling_rate=rate,
        norm="slaney",
        mel_scale="slaney",
    )
    mel = (torch.from_numpy(filters.T.astype(np.float32)) @ power).clamp(min=1e-10).log10()
    return (mel.maximum(mel.max() - 8.0) + 4.0) / 4.0


def standard_waveform(samples, num_samples):
    """Samples cut to a length, brought to mean 0 and deviation 1, then padded with zeros (wav2vec 2.0)."""
    samples = samples[:num_samples]
    out = torch.zeros(num_samples)
    if samples.size:
        out[: samples.size] = torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))
    return out


# ---------------------------------------------------------------------------------------------------------- processor


class MultimodalProcessor:
    """Prompts to model inputs, and generated ids to text.

    Args:
        config: the model's configuration, whose `inputs` has: `packed` (a row takes any number of media, in slots, or
            one image or video and one sound), `image_size`, `image_mean`, `image_std`, `video` ("frames", "clips" or
            "none"), `frames_per_video`, `sound` ("log_mel", "waveform" or "none"), `sample_rate`, `seconds`,
            `num_mel_bins`, `padding_side`, `row_multiple` (rows are padded to a multiple of so many tokens) and
            `row_length` (longest row).
        tokenizer_file: SentencePiece model; a tower alone may have none (None), and reads no text.
    """

    def __init__(self, config, tokenizer_file):
        self.config, self.inputs, self.tokenizer, self.warned = config, config.inputs, None, False
        if tokenizer_file is not None and os.path.exists(tokenizer_file):
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
        elif getattr(config, "has_text", True):
            raise ValueError(f"{tokenizer_file}: missing; an exported folder carries its {TOKENIZER_FILE}")

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The processor of an exported folder."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return cls(config, os.path.join(folder, TOKENIZER_FILE))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """AutoProcessor asks for this; the folder's config.json already names the class."""

    def image(self, image):
        """A Pillow image to normalised pixels [3, size, size]."""
        image = resize_and_centre_crop(to_rgb(image), self.inputs["image_size"])
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(self.inputs[name])[:, None, None] for name in ("image_mean", "image_std"))
        return (pixels - mean) / std

    def sound(self, samples):
        """Samples at the model's rate to a log-mel spectrogram [mels, frames] or a waveform [samples]."""
        samples, rate, seconds = np.asarray(samples, np.float32), self.inputs["sample_rate"], self.inputs["seconds"]
        if self.inputs["sound"] == "waveform":
            return standard_waveform(samples, round(rate * seconds))
        return log_mel(samples, self.inputs["num_mel_bins"], rate, seconds)

    def media(self, kind, path):
        """One file to a list of (tensor, frame number); a video of a model that reads clips to one tensor.

        Raises:
            ValueError: the file is missing or does not decode; names it.
        """
        try:
            with open(path, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        try:
            if kind == "images":
                return [(self.image(Image.open(io.BytesIO(data))), -1)]
            if kind == "videos":
                frames = [self.image(frame) for frame in video_frames(data, self.inputs["frames_per_video"])]
                clip = self.inputs["video"] == "clips"
                return [(torch.stack(frames), -1)] if clip else [(frame, i) for i, frame in enumerate(frames)]
            return [(self.sound(read_sound(data, self.inputs["sample_rate"])), -1)]
        except Exception as error:  # decoders raise whatever they like; the file is what the user must know
            raise ValueError(f"{path}: cannot be read as one of the {kind}: {error}") from error

    @staticmethod
    def with_placeholders(prompt):
        """The prompt's text, with a placeholder in front for every file that it does not mention.

        Raises:
            ValueError: the text has more placeholders than files.
        """
        text = prompt.get("prompt") or ""
        front = ""
        for kind, token in PLACEHOLDERS.items():
            files, written = len(prompt.get(kind) or ()), text.count(token)
            if written > files:
                raise ValueError(f"the prompt has {written} {token} but names {files} {kind}")
            front += token * (files - written)
        return front + text

    def __call__(self, prompts, with_text=False):
        """Model inputs of a batch, padded.

        Args:
            prompts: dicts (or one dict) with "prompt" (text, optional) and lists of files "images", "audios", "videos".
            with_text: rows go on with "text", cut so that with the end of the document they are no longer than those
                that were trained on: what embeddings and matching read, where generation reads the prompt.

        Returns:
            input_ids, attention_mask, and, where any prompt has them, its media, with masks of the rows (or of the
            slots of a row) that have one. Packed rows: pixel_values [B, K, 3, size, size], image_mask, image_frames,
            input_features [B, J, mels, frames], sound_mask. Rows of one image or video, and one sound: pixel_values
            [B, 3, size, size], image_mask, pixel_values_videos [B, F, 3, size, size], video_mask, input_values
            [B, samples], sound_mask.
        """
        prompts = [prompts] if isinstance(prompts, dict) else list(prompts)
        inputs = {} if self.tokenizer is None else self._rows(prompts, with_text)
        return inputs | (self._slots(prompts) if self.inputs["packed"] else self._single_media(prompts))

    def _rows(self, prompts, with_text):
        rows = []
        for prompt in prompts:
            text = self.with_placeholders(prompt)
            row = [self.config.bos_token_id, *(self.tokenizer.encode(text) if text else [])]
            if with_text:
                row += self.tokenizer.encode(prompt.get("text") or "")
                row = [*row[: self.inputs["row_length"] - 1], self.config.eos_token_id]
            rows.append(row)
        multiple = self.inputs["row_multiple"]
        length = -(-max(map(len, rows)) // multiple) * multiple
        ids = torch.full((len(rows), length), self.config.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            start = length - len(row) if self.inputs["padding_side"] == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _slots(self, prompts):
        def read(kinds):
            return [[slot for kind in kinds for path in p.get(kind) or () for slot in self.media(kind, path)]
                    for p in prompts]  # fmt: skip

        images, sounds, inputs, size = read(("images", "videos")), read(("audios",)), {}, self.inputs["image_size"]
        if any(images):
            inputs["pixel_values"], inputs["image_mask"], inputs["image_frames"] = _pad_slots(images, (3, size, size))
        if any(sounds):
            shape = (self.inputs["num_mel_bins"], round(self.inputs["seconds"] * 100))
            inputs["input_features"], inputs["sound_mask"], _ = _pad_slots(sounds, shape)
        return inputs

    def _single_media(self, prompts):
        """As in training: a row's first image, or its first video where it has none, and its first sound."""
        reads = {"images": True, "videos": self.inputs["video"] == "clips", "audios": self.inputs["sound"] != "none"}
        chosen = {kind: [None] * len(prompts) for kind in PLACEHOLDERS}
        for i, prompt in enumerate(prompts):
            files = {kind: list(prompt.get(kind) or ()) for kind in PLACEHOLDERS}
            taken = {kind: paths[:1] if reads[kind] else [] for kind, paths in files.items()}
            taken["videos"] = [] if taken["images"] else taken["videos"]
            left = [str(path) for kind in files for path in files[kind][len(taken[kind]) :]]
            if left and not self.warned:
                logger.warning(f"a row has no place for {', '.join(left)} (others like it are not reported)")
                self.warned = True
            for kind, paths in taken.items():
                chosen[kind][i] = self.media(kind, paths[0])[0][0] if paths else None
        names = {
            "images": ("pixel_values", "image_mask"),
            "videos": ("pixel_values_videos", "video_mask"),
            "audios": ("input_values", "sound_mask"),
        }
        inputs = {}
        for kind, (values, mask) in names.items():
            present = [value for value in chosen[kind] if value is not None]
            if present:
                empty = torch.zeros_like(present[0])
                inputs[values] = torch.stack([empty if value is None else value for value in chosen[kind]])
                inputs[mask] = torch.tensor([value is not None for value in chosen[kind]])
        return inputs

    def decode(self, ids):
        """Text of generated ids, up to the first end-of-document token.

        Raises:
            ValueError: an id that the tokenizer does not have, such as a padded row of the vocabulary.
        """
        ids = [int(i) for i in ids]
        if self.config.eos_token_id in ids:
            ids = ids[: ids.index(self.config.eos_token_id)]
        special = {self.config.pad_token_id, self.config.bos_token_id}
        size = self.tokenizer.get_piece_size()
        if ids and max(ids) >= size:
            raise ValueError(f"{max(ids)} is no id of the tokenizer, which has {size} pieces")
        return self.tokenizer.decode([i for i in ids if i not in special])

    def batch_decode(self, sequences):
        """Texts of several sequences of ids."""
        return [self.decode(ids) for ids in sequences]


def _pad_slots(rows, shape):
    """Media of each row to tensors [B, slots, …], a mask [B, slots] and frame numbers [B, slots]."""
    slots = max(map(len, rows))
    values = torch.zeros(len(rows), slots, *shape)
    mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    frames = torch.full((len(rows), slots), -1)
    for i, row in enumerate(rows):
        for j, (value, frame) in enumerate(row):
            values[i, j], mask[i, j], frames[i, j] = value, True, frame
    return values, mask, frames


__all__ = ["MultimodalProcessor"]
