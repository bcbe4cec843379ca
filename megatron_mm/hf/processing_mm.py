"""Prompts of an exported model: text, image, video and sound files to the tensors that it reads, and back.

Part of every exported folder, with the files of megatron_mm/media by which training reads media: a file becomes the
same tensor there and here, or is refused with the same words. Needs torch, transformers and Pillow, and where a folder
or a file asks for them sentencepiece (tokenizer.model), simplejpeg (JPEG), soundfile (sounds), soxr (sounds of another
rate) and PyAV (videos). `AutoProcessor.from_pretrained(folder, trust_remote_code=True)` gives a `MultimodalProcessor`;
its output goes to `model.generate(**inputs)` as it is. What the model reads, and how, its configuration says
(`config.inputs`).
"""

import os

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_mm.media.decoding import (
    check_samples,
    decode_clip,
    decode_sound,
    decode_video,
    read_image,
    resample,
    to_rgb,
)
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import read_file
from megatron_mm.media.transforms import center_crop_box, image_tensor, log_mel_spectrogram, size_of, waveform

logger = logging.get_logger(__name__)

PLACEHOLDERS = {"images": "<image>", "audios": "<audio>", "videos": "<video>"}
TOKENIZER_FILE = "tokenizer.model"


def folder_tokenizer(folder):
    """The tokenizer of an exported folder, a SentencePiece model or one that AutoTokenizer loads; None: it has none."""
    model = os.path.join(folder, TOKENIZER_FILE)
    if os.path.exists(model):
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(f"{model}: needs the package sentencepiece: pip install sentencepiece") from error
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return None


class MultimodalProcessor:
    """Prompts to model inputs, and generated ids to text.

    Args:
        config: the model's configuration, whose `inputs` has: `packed` (a row takes any number of media, in slots, or
            one image or video and one sound), `image_size`, `image_mean`, `image_std`, `video` ("frames", "clips" or
            "none"), `frames_per_video`, `sound` ("log_mel", "waveform" or "none"), `sample_rate`, `seconds`,
            `num_mel_bins`, `padding_side`, `row_multiple` (rows are padded to a multiple of so many tokens) and
            `row_length` (longest row).
        tokenizer: has encode(text) -> ids and decode(ids) -> text; a tower alone may have none (None), and reads no
            text.
    """

    def __init__(self, config, tokenizer):
        self.config, self.inputs, self.tokenizer, self.warned = config, config.inputs, tokenizer, False
        if tokenizer is None and getattr(config, "has_text", True):
            source = config.name_or_path or "the model"
            raise ValueError(f"{source}: reads text, and there is no tokenizer; an exported folder carries one")

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The processor of an exported folder."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return cls(config, folder_tokenizer(folder))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """AutoProcessor asks for this; the folder's config.json already names the class."""

    def image(self, image):
        """An image to normalised pixels [3, size, size].

        Args:
            image: of Pillow, or an array uint8 [height, width, 3]. Training resizes JPEGs as arrays and all others
                with Pillow, within two levels of 255 of each other (`media`).

        Raises:
            DataError: an array of another type or shape.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise DataError(
                    f"an image is an array {image.dtype} {list(image.shape)}; give uint8 [height, width, 3], or a "
                    "Pillow image"
                )
        else:
            image = to_rgb(image)
        return self._pixels(image, center_crop_box(*size_of(image)))

    def _pixels(self, image, box):
        return image_tensor(image, self.inputs["image_size"], box, self.inputs["image_mean"], self.inputs["image_std"])

    def sound(self, samples):
        """Samples at the model's rate to a log-mel spectrogram [mels, frames] or a waveform [samples].

        Raises:
            DataError: they are not mono, there are none, or some are no numbers.
        """
        samples, rate, seconds = np.asarray(samples, np.float32), self.inputs["sample_rate"], self.inputs["seconds"]
        if samples.ndim != 1:
            raise DataError(f"a sound of shape {list(samples.shape)}; give mono samples [samples] at {rate} Hz")
        check_samples(samples)
        if self.inputs["sound"] == "waveform":
            return waveform(samples, round(rate * seconds))
        return log_mel_spectrogram(samples, rate, seconds, self.inputs["num_mel_bins"])

    def media(self, kind, path):
        """One file to a list of (tensor, frame number); a video of a model that reads clips to one tensor.

        Raises:
            DataError: the file is missing or does not decode; names it.
            ImportError: a package that reads such files is not installed; says which.
        """
        try:
            data = read_file(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        try:
            return self._decoded(kind, data)
        except DataError as error:
            raise DataError(f"{path}: cannot be read as one of the {kind}: {error}") from error

    def _decoded(self, kind, data):
        if kind == "images":
            return [(self.image(read_image(data)), -1)]
        if kind == "audios":
            return [(self.sound(resample(*decode_sound(data), self.inputs["sample_rate"])), -1)]
        if self.inputs["video"] == "clips":  # all frames are seen alike
            frames = decode_clip(data, self.inputs["frames_per_video"])
            box = center_crop_box(*size_of(frames[0]))
            return [(torch.stack([self._pixels(frame, box) for frame in frames]), -1)]
        frames = decode_video(data, self.inputs["frames_per_video"])
        return [(self.image(frame), i) for i, frame in enumerate(frames)]

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

    def encode(self, text):
        """Ids of a text, without tokens that mark its beginning and end."""
        if isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(text)

    def _rows(self, prompts, with_text):
        rows = []
        for prompt in prompts:
            text = self.with_placeholders(prompt)
            row = [self.config.bos_token_id, *(self.encode(text) if text else [])]
            if with_text:
                row += self.encode(prompt.get("text") or "")
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
        size = getattr(self.config, "tokenizer_size", None)
        if size is not None and ids and max(ids) >= size:
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
