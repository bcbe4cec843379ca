"""The datasets of a run: shards that `data.datasets` names, or what a function of the user's own makes.

    config ─ open ─ split by documents ─ pack into rows ─ BlendedDataset of each split      (data/reading/blend.py)
    config ─ data.builder, "module:function" or "file.py:function" ─ CheckedSplit of each   (data/reading/builder.py)

A builder's file is looked up from the working directory, then from the recipe's folder. The function is called with the
resolved Config and returns an object with
- `train`, and `valid` and `test` (None, or not there, where there is none): splits;
- `tokenizer` (None, or not there, where there is none), whose `vocab_size` must fit the model's.

A split has one method, `microbatch(index, fields, task="")`, and may have `report_lines()`, what the console is told.
`index` holds global sample numbers, consecutive, from 0 and without end: which sample a number is, is the split's to
say, as a pure function of the number, so that every layout and a resumed run read the same. The result is a Microbatch
(data/reading/microbatch.py) whose row i is sample index[i], with
- the fields of `microbatch.field_shapes(config.model.inputs, plan)` that are always read or in `fields`;
- `plan.task` = `task`, where the system divides microbatches among tasks;
- `plan.own_lists`, how many things of its own it lists, where the system declares any (InputFormat.own_lists).
`rows.collate` makes all of it but pixels and samples from lists of documents, and may be used. Reader processes hold
copies of the split, so it must not depend on the order of its calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mm.config.inputs import Limits
from megatron_mm.config.schema import Config
from megatron_mm.config.validate import check_data
from megatron_mm.data.reading.augmentation import Augmentation
from megatron_mm.data.reading.blend import BlendedDataset, Source
from megatron_mm.data.reading.builder import CheckedSplit, call_builder
from megatron_mm.data.reading.masking import Masking
from megatron_mm.data.reading.order import Purpose, split_documents
from megatron_mm.data.reading.plans import plan
from megatron_mm.data.reading.records import MediaReader
from megatron_mm.data.store.remote import localize
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer

Split = BlendedDataset | CheckedSplit


@dataclass(frozen=True)
class Datasets:
    """The three splits; a split without documents is None."""

    train: Split
    valid: Split | None
    test: Split | None
    tokenizer: Tokenizer | None

    def report_lines(self) -> list[str]:
        """What will be read, for the console."""
        splits = (self.train, self.valid, self.test)
        return [line for split in splits if split is not None for line in split.report_lines()]


def build_datasets(config: Config) -> Datasets:
    """Opens, checks, splits and packs everything that `config.data` names, or calls `data.builder`.

    Args:
        config: the resolved tree; `data`, `model.inputs` and `training.seed` are read.

    Raises:
        ValueError: a field of `config.data` cannot be used, or a dataset is damaged; field or file are named.
    """
    check_data(config)
    return _own(config) if config.data.builder else _shards(config)


def _own(config: Config) -> Datasets:
    made = call_builder(config)
    if getattr(made, "train", None) is None:
        raise ValueError(
            f"data.builder: {config.data.builder} returned a {type(made).__name__} without a split `train` (see "
            "data/reading/dataset.py)"
        )
    splits = {name: getattr(made, name, None) for name in ("train", "valid", "test")}
    checked = {name: CheckedSplit(name, own, config) for name, own in splits.items() if own is not None}
    tokenizer = getattr(made, "tokenizer", None)
    if tokenizer is not None and not isinstance(getattr(tokenizer, "vocab_size", None), int):
        raise ValueError(f"data.builder: the tokenizer of {config.data.builder} has no vocab_size; give None instead")
    return Datasets(checked["train"], checked.get("valid"), checked.get("test"), tokenizer)


def whole_dataset(config: Config) -> BlendedDataset:
    """Every document of the recipe's shards once, in order, read as validation reads them: to score a model on.

    A corrupt medium always ends a scoring: grey in its place would be scored as if it were the picture.

    Raises:
        ValueError: as `build_datasets`.
    """
    check_data(config)
    whole = _shards(replace(config, data=replace(config.data, split="0,1,0", on_corrupt="stop")), trains=False).valid
    if whole is None:
        raise ValueError("data.datasets: no document has the two tokens of a row")
    return whole


def _shards(config: Config, trains: bool = True) -> Datasets:
    data, inputs, seed = config.data, config.model.inputs, config.training.seed
    if inputs.own_fields:
        names = ", ".join(field.name for field in inputs.own_fields)
        raise ValueError(f"data.builder: not set; shards have no {names} of this system, so a builder must make them")
    if not data.datasets:
        raise ValueError("data.datasets: empty; name at least one dataset, such as {path: data/emoji}")
    tokenizer = open_tokenizer(data.tokenizer, require_media=False) if data.tokenizer else None
    shards = [Shard(localize(entry.path, data.cache_folder), tokenizer) for entry in data.datasets]
    if inputs.mask_ratio or any(shard.is_multimodal for shard in shards):
        if tokenizer is None:
            raise ValueError("data.tokenizer: not set; multimodal datasets need the model that made the shards")
        tokenizer = open_tokenizer(data.tokenizer)
    for entry, shard in zip(data.datasets, shards):
        if inputs.video == "frames" and "videos" in shard.media:
            _check_frames(config, entry.path)
    limits = Limits.of(data, inputs)
    masking = Masking(inputs.mask_ratio, tokenizer.mask_id, tokenizer.is_ordinary()) if inputs.mask_ratio else None
    names = _unique_names([os.path.normpath(entry.path) for entry in data.datasets])
    splits: dict[str, BlendedDataset] = {}
    for split, part in zip(("train", "valid", "test"), range(3)):
        train, sources = split == "train", []
        for i, (entry, shard) in enumerate(zip(data.datasets, shards)):
            documents = split_documents(data.split, len(shard))[part]
            key = [seed, Purpose.PACK, i] if train else None
            packing = plan(shard, documents, limits, key, inputs.packed, data.plan_folder)
            if len(packing):
                sources.append(Source(shard, packing, entry.weight, names[i]))
            elif train and trains:
                raise ValueError(f'data.split: "{data.split}" leaves no training documents of {entry.path}')
        augmentation = Augmentation(data.random_crop, data.horizontal_flip, data.color_jitter)
        media = MediaReader(
            inputs,
            data.frames_per_video,
            data.image_mean,
            data.image_std,
            augmentation if train else Augmentation(),
            seed,
            fixed=not train,
            tokenizer=tokenizer,
            skip_corrupt=data.on_corrupt == "skip",
        )
        if sources:
            args = (split, sources, tokenizer, inputs, limits, media, masking, seed)
            splits[split] = BlendedDataset(*args, shuffle=train)
    return Datasets(splits.get("train"), splits.get("valid"), splits.get("test"), tokenizer)


def _check_frames(config: Config, path: str) -> None:
    """Refuses settings under which a video would never fit among the images of a row."""
    frames, most = config.data.frames_per_video, config.data.max_images_per_sample
    if frames > most:
        raise ValueError(
            f"data.frames_per_video: {frames}, but data.max_images_per_sample is {most}; a video of {path} must fit in "
            "a row"
        )


def _unique_names(paths: Sequence[str]) -> list[str]:
    """The last component of each path; where two agree, as many components as tell them apart, then a number."""
    parts = [path.strip("/").split("/") for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
