"""Datasets of a user's own: read like shards, and refused by name where they do not fit."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest
import torch

from megatron_mm.config.load import config_type, dump_config, load_config
from megatron_mm.config.section import changed
from megatron_mm.config.systems import section_of
from megatron_mm.data.reading.builder import CheckedSplit
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.order import TaskSchedule
from megatron_mm.media.errors import DataError

OWN = '''
    """Captions of coloured squares, made as they are read."""

    from types import SimpleNamespace

    import numpy as np
    import torch

    from megatron_mm.data.reading.rows import Document, collate


    class Squares:
        def __init__(self, config):
            self.inputs, self.length = config.model.inputs, config.data.seq_length

        def microbatch(self, index, fields, task=""):
            rows = []
            for number in index:
                tokens = np.array([2, 10 + number % 3, 20, 3])
                rows.append([Document(tokens, tokens >= 20, id=f"square-{number}", images=[number % 3], frames=[-1])])
            collated = collate(rows, self.inputs, self.length, index, task)
            batch = collated.microbatch
            if "images_ICHW" in fields:
                size = self.inputs.image_size
                batch.images_ICHW = torch.zeros(len(rows), 3, size, size)
                for image, colour in zip(batch.images_ICHW, collated.images):
                    image[colour] = 1.0
            return batch


    def build(config):
        return SimpleNamespace(train=Squares(config), valid=Squares(config))


    def nothing(config):
        return {"train": 1}


    def wordless(config):
        return SimpleNamespace(train=Squares(config), tokenizer="words")


    def numbers(config):
        return SimpleNamespace(train=[1, 2, 3])
'''


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own_squares.py").write_text(textwrap.dedent(OWN))
    config = changed(
        config_type(section_of("vlm"))(),
        {
            "model.vision.image_size": 28,
            "data.seq_length": 16,
            "data.builder": f"{tmp_path}/own_squares.py:build",
        },
    )
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_dataset_reads_like_any_other(config, workers):
    datasets = build_datasets(config)
    assert datasets.test is None and datasets.tokenizer is None
    assert datasets.report_lines() == [f"{s}: samples of {config.data.builder}" for s in ("train", "valid")]
    loader = MicrobatchLoader(datasets.train, 8, 2, 1, 2, 8, {"tokens_RT", "images_ICHW"}, workers)
    batch = next(loader)
    assert batch.sample_ids == ["square-10", "square-11"] and batch.sample_numbers_R.tolist() == [10, 11]
    assert batch.images_ICHW.sum((2, 3)).argmax(1).tolist() == [1, 2]
    assert batch.loss_mask_RT[:, :4].tolist() == [[0, 1, 0, 0]] * 2
    loader.close()


def test_a_builder_beside_its_recipe_is_found(config, tmp_path, monkeypatch):
    """From another working directory, and again in the config.yaml that a run writes elsewhere."""
    (tmp_path / "recipe.yaml").write_text("model: {system: vlm}\ndata: {builder: 'own_squares.py:build'}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = load_config(tmp_path / "recipe.yaml")
    dump_config(loaded, elsewhere / "config.yaml")
    assert load_config(elsewhere / "config.yaml").data.builder == loaded.data.builder == config.data.builder
    assert build_datasets(loaded).train.microbatch([3], {"tokens_RT"}).sample_ids == ["square-3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none.py:build", r"data\.builder: there is no file .*none\.py"),
        ("no_such_module_here:build", r"data\.builder: there is no module 'no_such_module_here'"),
        ("{folder}/own_squares.py:make", r"data\.builder: .*own_squares\.py has no function make"),
        ("{folder}/own_squares.py:wordless", r"the tokenizer of .*own_squares\.py:wordless has no vocab_size"),
        ("{folder}/own_squares.py:nothing", r"returned a dict without a split `train`"),
        ("{folder}/own_squares.py:numbers", r"gives a list as train; it needs a method microbatch\(index, fields"),
    ],
)
def test_what_is_no_builder_is_refused(config, tmp_path, name, message):
    config = changed(config, {"data.builder": name.format(folder=tmp_path)})
    with pytest.raises(ValueError, match=message):
        build_datasets(config)


class Spoilt:
    """Generated rows, changed afterwards."""

    def __init__(self, config, change) -> None:
        self.rows, self.change = GeneratedRows(config), change

    def microbatch(self, index, fields, task=""):
        batch = self.rows.microbatch(index, fields, task)
        return self.change(batch) or batch


def plan(**changes):
    def change(batch):
        batch.plan = replace(batch.plan, **changes)

    return change


def tensor(name, value):
    return lambda batch: setattr(batch, name, value(getattr(batch, name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: "a batch", "a str, not a Microbatch"),
        (plan(num_rows=3), r"plan\.num_rows is 3; it must be 4"),
        (plan(task=""), r"plan\.task is ''; it must be 'masked_lm'"),
        (plan(clip_frames=9), r"plan\.clip_frames is 9; it must be 2"),
        (plan(num_sounds=0), "must be at least 1"),
        (plan(image_slots=2), "one document a row"),
        (tensor("tokens_RT", lambda t: None), r"tokens_RT is missing; it must be torch\.int64 \[4, 16\]"),
        (tensor("waveforms_AN", lambda t: t[:, :-1]), r"waveforms_AN is torch\.float32 \[\d, 3199\]; it must be"),
        (tensor("loss_mask_RT", torch.Tensor.double), r"loss_mask_RT is torch\.float64 .* it must be torch\.float32"),
        (tensor("clip_slots_R", lambda t: t + 4), r"clip_slots_R holds \d … \d; it must lie within -1 … "),
        (tensor("tokens_RT", lambda t: t + 50176), r"tokens_RT holds 50176 … \d+; it must lie within 0 … 50175"),
        (tensor("document_ids_RT", lambda t: t + 1), r"document_ids_RT holds 0 … 1; it must lie within -1 … 0"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(change, message):
    config = changed(
        config_type(section_of("avt"))(),
        {
            "data.seq_length": 16,
            "data.frames_per_video": 2,
            "model.vision.image_size": 32,
            "model.audio.seconds": 0.2,
            "data.builder": "mine:build",
        },
    )
    fields = config.model.inputs.fields
    CheckedSplit("train", GeneratedRows(config), config).microbatch(range(4), fields, "masked_lm")
    split = CheckedSplit("train", Spoilt(config, change), config)
    with pytest.raises(DataError, match=r"data\.builder: mine:build, train samples 0 … 3: .*" + message):
        split.microbatch(range(4), fields, "masked_lm")
    loader = MicrobatchLoader(split, 0, 4, 0, 1, 4, fields, tasks=TaskSchedule((("masked_lm", 1.0),), 0))
    with pytest.raises(DataError, match=message):
        next(loader)
