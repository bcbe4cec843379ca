"""One split of a blend of shards: sample number → documents → microbatch, without any state.

    sample number ─ Blend ─ epoch, place ─ Permutation ─ row ─ pieces ─ collate ─ Microbatch
                                                                  └──── MediaReader ──┘

The plan and the fields that every stage has come from tables and tokens; images and sounds are decoded only where a
field that needs them is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.config.inputs import InputFormat, Limits
from megatron_mm.data.reading.masking import Masking
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.reading.order import Blend, Permutation, Purpose, epoch_and_place
from megatron_mm.data.reading.packing import Packing
from megatron_mm.data.reading.records import MediaReader, Piece, media_of
from megatron_mm.data.reading.rows import Collated, Document, collate
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import Tokenizer
from megatron_mm.media.errors import DataError


@dataclass
class Source:
    """One dataset's part of a split."""

    shard: Shard
    packing: Packing
    weight: float
    name: str


class BlendedDataset:
    """One split of the blend, addressed by global sample number (endless: epochs follow one another).

    Args:
        split: "train", "valid" or "test".
        sources: datasets that have rows in this split.
        tokenizer: None where only text shards are read without one.
        inputs: what the system asks of a sample.
        limits: of one row.
        media: reads images, videos and sounds.
        masking: how tokens are hidden; None where the format does not mask.
        seed: of the order.
        shuffle: visit rows in a keyed order, another each epoch; else in the order of packing.
    """

    def __init__(
        self,
        split: str,
        sources: list[Source],
        tokenizer: Tokenizer | None,
        inputs: InputFormat,
        limits: Limits,
        media: MediaReader,
        masking: Masking | None,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.split, self.sources, self.tokenizer = split, sources, tokenizer
        self.inputs, self.limits, self.media, self.masking = inputs, limits, media, masking
        self.seed, self.shuffle = seed, shuffle
        self.blend = Blend([source.weight for source in sources])
        self._vocab_size = min(inputs.vocab_size, tokenizer.vocab_size if tokenizer else inputs.vocab_size)
        self._unlearned = np.array(tokenizer.unlearned_ids if tokenizer else [], dtype=np.int64)
        self._pad = tokenizer.pad_id if tokenizer is not None and tokenizer.pad_id is not None else 0

    @property
    def num_rows(self) -> int:
        """Rows of all datasets: samples of one pass over everything."""
        return sum(len(source.packing) for source in self.sources)

    def report(self) -> dict[str, dict[str, int]]:
        """What packing did, for each dataset (`Packing.report`)."""
        return {source.name: dict(source.packing.report) for source in self.sources}

    def report_lines(self) -> list[str]:
        """What will be read, one line a dataset, for the console."""
        with_media = "with media longer than a row" if self.inputs.packed else "longer than a row"
        lines = []
        for name, r in self.report().items():
            padding = r["padding"] / max(1, r["padding"] + r["tokens"])
            line = f"{self.split} {name}: {r['documents']:,} documents, {r['tokens']:,} tokens in {r['rows']:,} rows "
            line += f"({padding:.1%} padding)"
            notes = {
                "documents_split": "longer than a row, split",
                "documents_truncated": f"{with_media}, truncated by {r['tokens_cut']:,} tokens",
                "documents_too_short": "shorter than two tokens, left out",
                "media_dropped": "images, frames or sounds without a place in a row of this system, not read",
            }
            lines.append(line + "".join(f"; {r[key]:,} {note}" for key, note in notes.items() if r[key]))
        return lines

    def locate(self, index: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, epoch and row of each global sample number; int64 arrays."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and index.min() < 0:
            raise ValueError(f"negative sample number {int(index.min())}")
        which, within = self.blend.locate(index)
        epochs, rows = np.zeros_like(index), np.zeros_like(index)
        for number in np.unique(which):
            here = which == number
            num_rows = len(self.sources[number].packing)
            epoch, place = epoch_and_place(within[here], num_rows)
            if self.shuffle:
                row = np.empty_like(place)
                for e in np.unique(epoch):
                    of_epoch = epoch == e
                    permutation = Permutation(num_rows, [self.seed, Purpose.VISIT, int(number), int(e)])
                    row[of_epoch] = permutation(place[of_epoch])
            else:
                row = place
            epochs[here], rows[here] = epoch, row
        return which, epochs, rows

    def pieces(self, index: Sequence[int]) -> list[list[Piece]]:
        """The documents of each sample, in the order in which they stand in the row."""
        samples = []
        for source, epoch, row in zip(*(column.tolist() for column in self.locate(index))):
            packing = self.sources[source].packing
            samples.append([Piece(source, epoch, *piece) for piece in packing.row(row)])
        return samples

    def sample_id(self, piece: Piece) -> str:
        """ "dataset/id", with "@offset" for a later piece of a long document."""
        source = self.sources[piece.source]
        name = f"{source.name}/{source.shard.document_id(piece.document)}"
        return f"{name}@{piece.offset}" if piece.offset else name

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """Reads and collates samples.

        Args:
            index: global sample numbers, one a row.
            fields: names of optional fields to read; plan and always-read fields do not depend on it.
            task: what the microbatch learns, for its plan.

        Raises:
            ValueError: a field that this system's samples do not have.
            DataError: a medium does not decode and may not be stood in for, or a token is outside the vocabulary;
                dataset, record and cause are named.
        """
        unknown = set(fields) - self.inputs.fields - self.inputs.always_read
        if unknown:
            known = sorted(self.inputs.fields)
            raise ValueError(f"unknown fields {sorted(unknown)}; samples of this system have {known}")
        collated = collate(
            [[self._document(piece) for piece in row] for row in self.pieces(index)],
            self.inputs,
            self.limits.seq_length,
            index,
            task,
            self.limits.frames_per_video if self.inputs.video == "clips" else 0,
            self._pad,
        )
        for name in self.inputs.fields - set(fields):
            setattr(collated.microbatch, name, None)
        self._read(collated, self.inputs.fields & set(fields))
        collated.microbatch.corrupt_media = self.media.take_corrupt()
        return collated.microbatch

    def _read(self, collated: Collated, fields: Collection[str]) -> None:
        """Fills in the fields that need media."""
        readers = {
            "images_ICHW": (self.media.images, collated.images),
            "clips_VFCHW": (self.media.clips, collated.clips),
            "sounds_AMF": (self.media.spectrograms, collated.sounds),
            "waveforms_AN": (self.media.waveforms, collated.sounds),
            "patch_noise_IP": (self.media.noise, collated.images),
        }
        for name, (read, media) in readers.items():  # in this order: the first corrupt medium is always the same
            if name in fields:
                setattr(collated.microbatch, name, read(media))

    def _document(self, piece: Piece) -> Document:
        shard = self.sources[piece.source].shard
        tokens = shard.text.document(piece.document, piece.offset, piece.length).astype(np.int64)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise DataError(
                f"{shard.path}, document {piece.document} ({shard.document_id(piece.document)}): token ids from "
                f"{int(tokens.min())} to {int(tokens.max())}; the vocabulary has {self._vocab_size}: made with another "
                "tokenizer, or damaged"
            )
        learned = piece.offset + np.arange(piece.length) >= shard.prompt_length(piece.document)
        learned &= ~np.isin(tokens, self._unlearned)
        if not self.inputs.packed and piece.length < shard.document_length(piece.document):
            self._end_early(tokens, learned, shard, piece)
        images, clips, sounds = media_of(shard, piece, self.inputs, self.limits)
        document = Document(
            tokens=tokens,
            learned=learned,
            id=self.sample_id(piece),
            images=images,
            frames=[image.frame for image in images],
            clips=clips,
            sounds=sounds,
        )
        if self.masking is not None:
            name = [piece.epoch, piece.source, piece.document, piece.offset]
            document.shown, document.hidden = self.masking(tokens, self.media.key(Purpose.HIDE, name))
        return document

    def _end_early(self, tokens: np.ndarray, learned: np.ndarray, shard: Shard, piece: Piece) -> None:
        """Lets a truncated text end as the whole one does; nobody learns that it ends there."""
        last = int(shard.text.document(piece.document, shard.document_length(piece.document) - 1, 1)[0])
        if self.tokenizer is not None and last == self.tokenizer.eos_id:
            tokens[-1], learned[-1] = last, False
