"""Generated rows of every format: what `InputFormat` promises, and that a row depends on its number alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_mm.config.load import config_type
from megatron_mm.config.section import changed
from megatron_mm.config.systems import SYSTEMS, section_of
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.microbatch import ALWAYS_READ, field_shapes
from megatron_mm.planner.assembly import full_plan
from megatron_mm.planner.dry_run import meta_microbatch


def small(system: str):
    """The system with small media and short rows; tasks, masks and noise as in its defaults."""
    config = changed(
        config_type(section_of(system))(),
        {
            "data.seq_length": 48,
            "data.frames_per_video": 2,
            "model.vision.image_size": 32 if system in ("avt", "dual_encoder") else 28,
        },
    )
    if hasattr(config.model, "audio"):
        config = changed(config, {"model.audio.seconds": 0.2})
    if system == "dual_encoder":
        config = changed(config, {"model.mae_weight": 1.0})
    return config


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_rows_have_every_field_of_their_format(system):
    config = small(system)
    inputs = config.model.inputs
    batch = GeneratedRows(config).microbatch(range(24), task="some")
    assert batch.plan.task == "some"
    shapes = field_shapes(inputs, batch.plan)
    assert shapes.keys() >= inputs.fields
    for f in dataclasses.fields(batch):
        value, planned = getattr(batch, f.name), getattr(meta_microbatch(config, batch.plan), f.name)
        assert isinstance(value, torch.Tensor) == isinstance(planned, torch.Tensor) == (f.name in shapes), f.name
        if f.name in shapes:
            assert (tuple(value.shape), value.dtype) == (tuple(planned.shape), planned.dtype) == shapes[f.name], f.name
    assert batch.sample_numbers_R.tolist() == list(range(24))
    images, sounds = batch.image_slots_RK[batch.image_slots_RK >= 0], batch.sound_slots_RJ[batch.sound_slots_RJ >= 0]
    assert images.tolist() == list(range(images.numel())) and sounds.tolist() == list(range(sounds.numel()))
    assert batch.plan.num_images == max(1, images.numel()) and batch.plan.num_sounds == max(1, sounds.numel())
    lengths = (batch.document_ids_RT >= 0).sum(1)
    assert torch.equal(batch.loss_mask_RT.bool() & (batch.labels_RT < 2), torch.zeros_like(batch.loss_mask_RT).bool())
    if inputs.packed:
        return
    assert batch.plan.one_document_per_row and int(batch.document_ids_RT.max()) == 0
    assert len(set(lengths.tolist())) > 8 and batch.plan.max_document_length == int(lengths.max())
    last = batch.tokens_RT.gather(1, lengths[:, None] - 1)[:, 0]
    assert (batch.tokens_RT[:, 0] == 2).all() and (last == 3).all()
    assert (batch.tokens_RT[batch.document_ids_RT < 0] == 0).all()
    has_image = batch.image_slots_RK[:, 0] >= 0
    assert 0 < has_image.sum() < 24
    if inputs.video == "clips":
        has_clip = batch.clip_slots_R >= 0
        assert 0 < has_clip.sum() < 24 and not (has_clip & has_image).any() and not (has_clip | has_image).all()
        assert batch.clip_slots_R[has_clip].tolist() == list(range(batch.plan.num_clips))
    if inputs.sound == "waveform":
        assert 0 < sounds.numel() < 24


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_row_does_not_depend_on_its_company(system):
    """Row 5 alone, and among others: data-parallel ranks and other batch sizes see the same."""
    config = small(system)
    rows = GeneratedRows(config)
    together = rows.microbatch(range(8))
    for number in range(8):
        alone = rows.microbatch([number])
        for name in alone.__dataclass_fields__:
            value, other = getattr(alone, name), getattr(together, name)
            if name.endswith(("_RT", "_R")) and value is not None and name != "clip_slots_R":
                assert torch.equal(value[0], other[number]), name
        for slots, names in {
            "image_slots_RK": ("images_ICHW", "patch_noise_IP"),
            "sound_slots_RJ": ("sounds_AMF", "waveforms_AN"),
        }.items():
            mine, theirs = getattr(alone, slots)[0], getattr(together, slots)[number]
            assert (mine >= 0).sum() == (theirs >= 0).sum()
            for name in names:
                own, all_rows = getattr(alone, name), getattr(together, name)
                if own is not None:
                    assert torch.equal(own[mine[mine >= 0]], all_rows[theirs[theirs >= 0]])
        if alone.clips_VFCHW is not None and alone.clip_slots_R[0] >= 0:
            assert torch.equal(alone.clips_VFCHW[0], together.clips_VFCHW[together.clip_slots_R[number]])


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_the_full_plan_bounds_every_microbatch(system):
    config = changed(small(system), {"training.micro_batch_size": 6})
    full = full_plan(config)
    plans = [GeneratedRows(config).microbatch(range(n, n + 6)).plan for n in range(0, 60, 6)]
    inputs = config.model.inputs
    per_image, per_clip = 3 * inputs.image_size**2, 3 * inputs.image_size**2 * full.clip_frames

    def pixels(plan):
        return plan.num_images * per_image + plan.num_clips * per_clip

    assert max(map(pixels, plans)) <= pixels(full)
    for name in ("num_rows", "num_sounds", "num_clips", "image_slots", "sound_slots", "max_document_length"):
        assert max(getattr(plan, name) for plan in plans) <= getattr(full, name), name
    assert full.clip_frames == (2 if inputs.video == "clips" else 0)
    assert full.one_document_per_row is not inputs.packed
    assert full.task == ("masked_lm" if system == "avt" else "")


def test_what_is_always_read_is_listed():
    """A field that every stage has must have a shape in some format."""
    config = small("avt")
    shapes = field_shapes(config.model.inputs, full_plan(config))
    assert shapes.keys() >= ALWAYS_READ
    assert np.prod(shapes["waveforms_AN"][0]) == 3200
