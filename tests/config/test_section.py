"""Sections are values: another layout is another one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import pytest

from megatron_mm.config.section import changed
from tests.support.recipes import small_config, small_vlm


def test_fields_are_changed_in_another_value():
    """All others, at any depth, are as they were, and so is the first value."""
    config = small_config()
    before = asdict(config)
    other = changed(config, {"training.seed": 7, "model.decoder.num_layers": 2, "model.decoder.vocab_size": 256})
    assert asdict(config) == before and type(other) is type(config)
    expected = asdict(config)
    expected["training"]["seed"] = 7
    expected["model"]["decoder"] |= {"num_layers": 2, "vocab_size": 256}
    assert asdict(other) == expected
    assert other.data is config.data


def test_a_section_and_one_of_its_fields_are_changed_together():
    performance = small_vlm().performance
    other = changed(small_config(), {"performance.ddp_bucket_size": 5, "performance": performance})
    assert other.performance == changed(performance, {"ddp_bucket_size": 5})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.sead", 7, "^training.sead: TrainingConfig has no field 'sead'"),
        ("trainer.seed", 7, "trainer.seed: Config has no field 'trainer'"),
        ("training.seed.low", 7, "^training.seed.low: int has no field 'low'"),
        ("training.seed", "many", "many"),
        ("parallel.cp_comm_type", "post", "post"),
    ],
)
def test_a_wrong_path_or_value_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        changed(small_config(), {path: value})


def test_no_field_of_a_section_is_assigned():
    config = small_config()
    for section, field in ((config, "training"), (config.training, "seed"), (config.model.decoder, "num_layers")):
        with pytest.raises(FrozenInstanceError):
            setattr(section, field, 1)
