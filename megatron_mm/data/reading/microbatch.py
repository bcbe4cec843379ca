"""What one microbatch is: Python values that every pipeline stage knows, and tensors that only some stages read.

A microbatch is `num_rows` samples of `row_length` tokens. A sample (row) is a pack of whole documents, or one document
where the system does not pack (InputFormat.packed); a document is a text with its media. Text attends to its own
document and that document's media only, and no document crosses a row. Media of the whole microbatch are listed once,
in order of rows, and rows name them by slot.

A system may declare fields of its own (config/fields.py). They are held, moved, sent and checked like the others.

Shape suffixes: R rows, T tokens of a row, I images and frames of the microbatch, K image slots of a row, V video clips,
F frames of a clip, A sounds of the microbatch, J sound slots of a row, N samples of a waveform, P patches of an image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from megatron_mm.config.fields import Field, Listed
from megatron_mm.config.inputs import InputFormat

#: Fields of the package that every stage has, over all formats; the others are read only by the chunks whose nodes
#: consume them.
ALWAYS_READ = InputFormat(1, packed=False, image_size=1, video="clips", mask_ratio=0.5).always_read


@dataclass(frozen=True)
class ListedPlan:
    """How many things of a system's own a microbatch lists."""

    listed: Listed
    number: int
    """At least 1: zeros stand in where there are none."""
    slots: int
    """Slots of a row: the largest number of any row, at least 1."""


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
    own_lists: tuple[ListedPlan, ...] = ()
    """Of InputFormat.own_lists, in their order."""

    def number(self, name: str) -> int:
        """How many are listed of "image", "sound", or a system's own.

        Raises:
            ValueError: nothing of that name is listed.
        """
        return self._of_list(name)[0]

    def slots(self, name: str) -> int:
        """Slots of a row of "image", "sound", or a system's own; raises as `number`."""
        return self._of_list(name)[1]

    def _of_list(self, name: str) -> tuple[int, int]:
        known = {"image": (self.num_images, self.image_slots), "sound": (self.num_sounds, self.sound_slots)}
        known |= {own.listed.name: (own.number, own.slots) for own in self.own_lists}
        if name not in known:
            raise ValueError(f"no list of {name!r} in this microbatch; there are {', '.join(known)}")
        return known[name]

    @property
    def always_read(self) -> frozenset[str]:
        """Fields that every stage has, whether this format fills them or not."""
        return ALWAYS_READ | {field.name for own in self.own_lists for field in own.listed.fields()}

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the letters of config/fields.py."""
        built_in = {
            "R": self.num_rows,
            "T": self.row_length,
            "D": self.max_documents_per_row or self.row_length,
            "I": self.num_images,
            "A": self.num_sounds,
            "V": self.num_clips,
            "F": self.clip_frames,
            "K": self.image_slots,
            "J": self.sound_slots,
        }
        own = {own.listed.letter: own.number for own in self.own_lists}
        return built_in | own | {own.listed.slots_size: own.slots for own in self.own_lists}


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
    own: dict[str, torch.Tensor | None] = field(default_factory=dict)
    """Fields of the system's own, by name; each is read and set as an attribute too, like the others."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name.startswith("__") or name not in self.__dict__.get("own", {}):
            raise self._no_field(name)
        return self.own[name]

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dataclass_fields__:
            object.__setattr__(self, name, value)
        elif name in self.own:
            self.own[name] = value
        else:
            raise self._no_field(name)

    def _no_field(self, name: str) -> AttributeError:
        known = ", ".join(self.__dict__.get("own", {})) or "none"
        return AttributeError(f"a microbatch of this system has no field {name!r}; fields of its own: {known}")

    @classmethod
    def of(cls, plan: MicrobatchPlan, tensors: Mapping[str, torch.Tensor]) -> Microbatch:
        """A microbatch of these fields; what the package does not know is the system's own."""
        built_in = {name: value for name, value in tensors.items() if name in cls.__dataclass_fields__}
        return cls(plan, **built_in, own={name: value for name, value in tensors.items() if name not in built_in})

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every field that this process has, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)} | self.own
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}

    def with_fields(self, values: Mapping[str, torch.Tensor | None]) -> Microbatch:
        """The same microbatch with other fields, those of the system's own among them."""
        built_in = {name: value for name, value in values.items() if name in self.__dataclass_fields__}
        own = {name: value for name, value in values.items() if name not in built_in}
        return replace(self, **built_in, own=self.own | own)

    def only(self, names: Collection[str]) -> Microbatch:
        """The same microbatch without the fields that are neither named nor had by every stage."""
        kept = self.plan.always_read.union(names)
        return self.with_fields({name: None for name in self.tensors if name not in kept})

    def slots(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of rows of "image", "sound", or a system's own list: its index [R, K], the slots' documents [R, K]."""
        if name == "sound":
            return self.sound_slots_RJ, self.sound_slot_documents_RJ
        self.plan.slots(name)  # refuses what is not listed
        return getattr(self, f"{name}_slots_RK"), getattr(self, f"{name}_slot_documents_RK")

    def to(self, device: torch.device | str) -> Microbatch:
        """The same microbatch with its tensors on `device`."""
        return self.with_fields({name: value.to(device, non_blocking=True) for name, value in self.tensors.items()})


def field_shapes(inputs: InputFormat, plan: MicrobatchPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a microbatch of a format has: those always read and `inputs.fields`."""
    sizes = plan.sizes
    return {
        field.name: (
            tuple(sizes[size] if isinstance(size, str) else size for size in field.shape),
            getattr(torch, field.dtype),
        )
        for field in inputs.declared
    }


def range_problem(field: Field, value: torch.Tensor, plan: MicrobatchPlan) -> str | None:
    """What is wrong with the values of a field, or None: all lie in its range, or are its padding."""
    low = -math.inf if field.low is None else field.low
    high = math.inf if field.high is None else field.high
    high = plan.sizes[high] - 1 if isinstance(high, str) else high
    if not value.numel() or (low, high) == (-math.inf, math.inf):
        return None
    if bool((((value >= low) & (value <= high)) | (value == field.pad)).all()):
        return None
    least, largest, low, high = (
        f"{number:g}" if isinstance(number, float) else number
        for number in (value.min().item(), value.max().item(), low, high)
    )
    return f"{field.name} holds {least} … {largest}; it must lie within {low} … {high}"
