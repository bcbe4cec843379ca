"""What one microbatch is: Python values that every pipeline stage knows, and tensors that only some stages read.

A microbatch is `num_rows` samples of `row_length` tokens. A sample (row) is a pack of whole documents, or one document
where the system does not pack (InputFormat.packed); a document is a text with its media. Text attends to its own
document and that document's media only, and no document crosses a row. Media of the whole microbatch are listed once,
in order of rows, and rows name them by slot.

Shape suffixes: R rows, T tokens of a row, I images and frames of the microbatch, K image slots of a row, V video clips,
F frames of a clip, A sounds of the microbatch, J sound slots of a row, N samples of a waveform, P patches of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from megatron_mm.config.inputs import InputFormat

#: Fields that every stage has; the others are read only by the chunks whose nodes consume them.
ALWAYS_READ = frozenset({"position_ids_RT", "document_ids_RT", "image_slots_RK", "image_slot_documents_RK",
                         "sound_slots_RJ", "sound_slot_documents_RJ", "loss_mask_RT", "clip_slots_R",
                         "masked_loss_mask_RT", "sample_numbers_R"})


@dataclass(frozen=True)
class MicrobatchPlan:
    """Counts and sizes, the same on every stage and known before any tensor exists."""

    num_rows: int
    row_length: int
    num_images: int
    """Images and video frames in `images`; at least 1 (an unreferenced zero image stands in where there are none)."""
    num_sounds: int
    """Sounds in `sounds`; at least 1, in the same way."""
    image_slots: int
    """K: image slots of a row, the largest count of any row of the microbatch, at least 1."""
    sound_slots: int
    """J: sound slots of a row, at least 1."""
    one_document_per_row: bool
    """No row has a second document: causal attention then needs no mask."""
    max_document_length: int
    """Tokens of the longest document."""
    max_documents_per_row: int | None = None
    """Documents of the row that has most; None where it was not counted (at most one a token, then)."""
    num_clips: int = 0
    """Video clips in `clips`; may be 0, without a stand-in."""
    clip_frames: int = 0
    """F: frames of each clip."""
    task: str = ""
    """Which of InputFormat.tasks this microbatch learns; empty: all objectives."""


@dataclass
class Microbatch:
    """One microbatch on one process. A field that this process does not read is None."""

    plan: MicrobatchPlan
    document_ids_RT: torch.Tensor
    """Number of the document within its row, from 0; -1 on padding. int64."""
    position_ids_RT: torch.Tensor
    """Position within the document, from 0. int64."""
    loss_mask_RT: torch.Tensor
    """1 where the label counts: not the end of a document, padding, a prompt or a media placeholder. float32."""
    image_slots_RK: torch.Tensor
    """Index into `images` of each slot; -1 for an empty slot. int64."""
    image_slot_documents_RK: torch.Tensor
    """Document of each slot; -2 for an empty slot. int64."""
    sound_slots_RJ: torch.Tensor
    sound_slot_documents_RJ: torch.Tensor
    clip_slots_R: torch.Tensor | None = None
    """Clip of each row, where the system reads clips; -1 for none. int64."""
    masked_loss_mask_RT: torch.Tensor | None = None
    """1 where a token of `masked_tokens_RT` is to be found again, where the format masks. float32."""
    sample_numbers_R: torch.Tensor | None = None
    """Global sample number of each row: what randomness within a forward pass is keyed by. int64."""
    tokens_RT: torch.Tensor | None = None
    """int64."""
    labels_RT: torch.Tensor | None = None
    """The next token of the same document, 0 where there is none. int64."""
    images_ICHW: torch.Tensor | None = None
    """Normalised images and frames, float32, [I, 3, image_size, image_size]."""
    image_frames_I: torch.Tensor | None = None
    """Frame number within its video, from 0; -1 for a still image. int64."""
    sounds_AMF: torch.Tensor | None = None
    """Log-mel spectrograms, float32, [A, num_mel_bins, num_frames]."""
    masked_tokens_RT: torch.Tensor | None = None
    """`tokens_RT` with some hidden, replaced or kept to be predicted (BERT's 80/10/10). int64."""
    masked_labels_RT: torch.Tensor | None = None
    """`tokens_RT` where `masked_loss_mask_RT` is 1, 0 elsewhere. int64."""
    clips_VFCHW: torch.Tensor | None = None
    """Normalised frames of each clip, float32, [V, F, 3, image_size, image_size]."""
    waveforms_AN: torch.Tensor | None = None
    """Waveforms of mean 0 and deviation 1 over their own samples, zero after their end, float32."""
    patch_noise_IP: torch.Tensor | None = None
    """Uniform noise of each patch; a random mask hides those with the largest. float32."""
    sample_ids: list[str] = field(default_factory=list)
    """Ids of the documents, for reports. Never read by a forward pass."""
    corrupt_media: list[str] = field(default_factory=list)
    """What this process read and could not decode, by shard and record, with the cause (`data.on_corrupt: skip`)."""

    def to(self, device: torch.device | str) -> Microbatch:
        """The same microbatch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Microbatch(**moved)


def field_shapes(inputs: InputFormat, plan: MicrobatchPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a microbatch of a format has: those always read and `inputs.fields`."""
    rows, length, size = plan.num_rows, plan.row_length, inputs.image_size
    image_slots, sound_slots = (rows, plan.image_slots), (rows, plan.sound_slots)
    whole, real = torch.int64, torch.float32
    shapes = {
        "position_ids_RT": ((rows, length), whole),
        "document_ids_RT": ((rows, length), whole),
        "loss_mask_RT": ((rows, length), real),
        "image_slots_RK": (image_slots, whole),
        "image_slot_documents_RK": (image_slots, whole),
        "sound_slots_RJ": (sound_slots, whole),
        "sound_slot_documents_RJ": (sound_slots, whole),
        "sample_numbers_R": ((rows,), whole),
        "tokens_RT": ((rows, length), whole),
        "labels_RT": ((rows, length), whole),
        "images_ICHW": ((plan.num_images, 3, size, size), real),
        "image_frames_I": ((plan.num_images,), whole),
        "clip_slots_R": ((rows,), whole),
        "clips_VFCHW": ((plan.num_clips, plan.clip_frames, 3, size, size), real),
        "sounds_AMF": ((plan.num_sounds, inputs.num_mel_bins, inputs.num_frames), real),
        "waveforms_AN": ((plan.num_sounds, inputs.num_samples), real),
        "masked_loss_mask_RT": ((rows, length), real),
        "masked_tokens_RT": ((rows, length), whole),
        "masked_labels_RT": ((rows, length), whole),
        "patch_noise_IP": ((plan.num_images, inputs.patches), real),
    }
    lacking = {"clip_slots_R"} if inputs.video != "clips" else set()
    lacking |= {"masked_loss_mask_RT"} if not inputs.mask_ratio else set()
    names = (ALWAYS_READ - lacking) | inputs.fields
    return {name: shape for name, shape in shapes.items() if name in names}
