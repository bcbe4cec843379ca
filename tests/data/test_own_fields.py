"""Fields of a system's own: declared, collated, generated, held and checked like those of the package."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm.config.fields import Field, Listed
from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from megatron_mm.data.reading.builder import CheckedSplit
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.microbatch import field_shapes
from megatron_mm.data.reading.rows import Document, collate
from megatron_mm.evaluation.export_proof import exported_inputs
from megatron_mm.media.errors import DataError
from megatron_mm.planner.assembly import full_plan
from megatron_mm.planner.dry_run import meta_microbatch
from tests.support.programs import PYTHON
from tests.support.recipes import small_sensor

ROOT = Path(__file__).parents[2]
PULSE = Listed("pulse", "S", most=2)


def own(*fields: Field, lists: tuple[Listed, ...] = (PULSE,), **format) -> InputFormat:
    return InputFormat(64, own_fields=fields, own_lists=lists, **format)


@pytest.mark.parametrize(
    ("fields", "lists", "format", "message"),
    [
        ([Field("tokens_RT", ("R", "T"))], (), {}, "field 'tokens_RT': the name is taken"),
        ([Field("sounds_AMF", ("A", 2, 3))], (), {}, "field 'sounds_AMF': the name is taken"),
        ([Field("a_S", ("S",)), Field("a_S", ("S",))], (PULSE,), {}, "field 'a_S': the name is taken"),
        ([Field("pulses", ("S", 4))], (PULSE,), {}, "its name must be words, `_` and a capital for each dimension"),
        ([Field("pulses_S", ("S", 4))], (PULSE,), {}, "the capitals of its name are not the dimensions"),
        ([Field("pulses_ZN", ("Z", 4))], (), {}, r"its shape \('Z', 4\) must begin with one of R, I, A$"),
        ([Field("pulses_ST", ("S", "T"))], (PULSE,), {}, "must have numbers after S"),
        ([Field("pulses_SN", ("S", 0))], (PULSE,), {}, "must have numbers after S"),
        ([Field("depth_RHW", ("R", 4, 4))], (), {}, "a row of packed documents has no place for one value a row"),
        ([Field("kinds_S", ("S",), "int64")], (PULSE,), {}, "a field of whole numbers needs its range"),
        ([Field("kinds_S", ("S",), "int64", 0, "S")], (PULSE,), {}, "high is 'S'; it must be a number, or 'T'"),
        ([Field("pulses_S", ("S",), low=2, high=1)], (PULSE,), {}, "low must not be above high"),
        ([Field("pulses_S", ("S",), "float64")], (PULSE,), {}, "its dtype is 'float64'; it must be one of int64"),
        ([Field("kinds_S", ("S",), "uint8", 0, 300)], (PULSE,), {}, "high is 300, which uint8 does not hold"),
        ([Field("kinds_S", ("S",), "int64", 0.5, 3)], (PULSE,), {}, "low is 0.5, which int64 does not hold"),
        ([Field("kinds_S", ("S",), "uint8", 0, 3, pad=-1)], (PULSE,), {}, "pad is -1, which uint8 does not hold"),
        ([Field("pulses_S", ("S",), pad=float("nan"))], (PULSE,), {}, "pad is nan; it must be a number that equals"),
        ([Field("pulses_S", ("S",), always=True)], (PULSE,), {}, "always is for fields of the package"),
        ([Field("depths_IHW", ("I", 4, 4))], (), {}, "a value for each I, which are not read"),
        ([], (PULSE,), {}, "Listed 'pulse': no field begins with its letter S"),
        ([Field("a_S", ("S",))], (Listed("image", "S"),), {}, "its name must be a word of its own"),
        ([Field("a_I", ("I",))], (Listed("pulse", "I"),), {}, "its letter is 'I'; it must be a capital of its own"),
        ([Field("a_S", ("S",))], (Listed("pulse", "S", most=0),), {}, "most is 0; it must be at least 1"),
    ],
)
def test_declarations_that_nothing_could_be_read_by_are_refused(fields, lists, format, message):
    with pytest.raises(ValueError, match=message):
        own(*fields, lists=lists, **format)


def test_a_declared_field_has_its_place_beside_the_packages():
    inputs = small_sensor().model.inputs
    assert {"pulses_SNC", "weights_RT"} <= inputs.fields
    assert {"pulse_slots_RK", "pulse_slot_documents_RK"} <= inputs.always_read
    plan = full_plan(small_sensor())
    shapes = field_shapes(inputs, plan)
    assert shapes["pulses_SNC"] == ((3 * plan.num_rows, 4, 3), torch.float32)
    assert shapes["pulse_slots_RK"] == ((plan.num_rows, 3), torch.int64)
    assert meta_microbatch(small_sensor(), plan).pulses_SNC.shape == shapes["pulses_SNC"][0]


def document(length: int, pulses: list, **fields: object) -> Document:
    return Document(np.arange(8, 8 + length), np.ones(length, bool), listed={"pulse": pulses}, own=fields)


def test_rows_are_collated_with_slots_documents_and_padding():
    inputs = own(
        Field("pulses_SN", ("S", 3), pad=-1),
        Field("kinds_S", ("S",), "int32", 0, 9),
        Field("loud_RT", ("R", "T"), "bool"),
    )
    rows = [
        [document(3, ["a"], loud_RT=np.array([True, False, True])), document(2, [])],
        [document(2, []), document(2, ["b", "c"], loud_RT=np.array([False, True]))],
    ]
    collated = collate(rows, inputs, 6, [0, 1])
    batch = collated.microbatch
    assert collated.listed == {"pulse": ["a", "b", "c"]} and batch.pulses_SN is None
    assert batch.plan.number("pulse") == 3 and batch.plan.slots("pulse") == 2
    assert batch.pulse_slots_RK.tolist() == [[0, -1], [1, 2]]
    assert batch.pulse_slot_documents_RK.tolist() == [[0, -2], [1, 1]]
    assert batch.slots("pulse")[0] is batch.pulse_slots_RK
    assert batch.loud_RT.int().tolist() == [[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    collated.fill("pulses_SN", [np.ones(3), [2.0], np.zeros(2)])
    assert batch.pulses_SN.tolist() == [[1, 1, 1], [2, -1, -1], [0, 0, -1]]
    collated.fill("kinds_S", [1, 2, 3])
    assert batch.kinds_S.dtype == torch.int32 and batch.kinds_S.tolist() == [1, 2, 3]
    empty = collate([[document(3, [])]], inputs, 6, [0])
    empty.fill("pulses_SN", [])
    assert empty.microbatch.pulses_SN.tolist() == [[-1, -1, -1]], "a stand-in"
    for name, values, message in [
        ("pulses_SN", [1], "1 values for 3 things"),
        ("pulses_SN", [np.ones(4)] * 3, r"a value of shape \[4\]; it must fit \[3\]"),
        ("kinds_S", [0.5] * 3, "values of torch.float32 that torch.int32 does not hold"),
        ("nothing_S", [1] * 3, "'nothing_S' is no field of this system's own"),
    ]:
        with pytest.raises(ValueError, match=message):
            collated.fill(name, values)
    for row, message in [
        ([document(2, ["a", "b", "c"])], "a row has 3 of 'pulse', at most 2 are declared"),
        ([document(2, [], loud_RT=np.ones(3, bool))], r"loud_RT has shape \[3\]; it must be \[2\]"),
        ([document(2, [], quiet_RT=np.ones(2))], "which this system does not declare"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate([row], inputs, 6, [0])


def test_a_row_of_one_document_has_a_value_of_its_own():
    inputs = own(Field("depth_RHW", ("R", 2, 2), pad=7), lists=(), packed=False)
    rows = [[Document(np.array([2, 3]), np.ones(2, bool), own={"depth_RHW": np.ones((2, 2))})]]
    rows.append([Document(np.array([2, 3]), np.ones(2, bool))])
    assert collate(rows, inputs, 4, [0, 1]).microbatch.depth_RHW.flatten(1).tolist() == [[1] * 4, [7] * 4]
    alone = collate(rows[1:], inputs, 4, [1]).microbatch
    assert alone.depth_RHW.flatten(1).tolist() == [[7] * 4], "padded as in the company of others"


def test_a_microbatch_holds_moves_and_sends_them():
    batch = GeneratedRows(small_sensor()).microbatch(range(4))
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.tensors.keys() == batch.tensors.keys() >= {"pulses_SNC", "pulse_slots_RK", "weights_RT", "tokens_RT"}
    assert all(torch.equal(copy.tensors[name], value) for name, value in batch.tensors.items())
    assert {value.device.type for value in batch.to("meta").tensors.values()} == {"meta"}
    kept = batch.only(frozenset({"weights_RT"}))
    assert kept.pulses_SNC is None and kept.tokens_RT is None
    assert kept.weights_RT is batch.weights_RT and kept.pulse_slots_RK is batch.pulse_slots_RK
    batch.weights_RT = batch.weights_RT + 1
    assert batch.own["weights_RT"].min() >= 1
    for act in (lambda: batch.wights_RT, lambda: setattr(batch, "wights_RT", 1)):
        with pytest.raises(AttributeError, match=r"no field 'wights_RT'; fields of its own: .*weights_RT"):
            act()
    with pytest.raises(ValueError, match="no list of 'puls' in this microbatch; there are image, sound, pulse"):
        batch.slots("puls")


def test_generated_rows_follow_the_declaration():
    made = GeneratedRows(small_sensor()).microbatch(range(32))
    config = small_sensor()
    CheckedSplit("train", GeneratedRows(config), config).microbatch(range(32), config.model.inputs.fields)
    counts = (made.pulse_slots_RK >= 0).sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3} and made.plan.number("pulse") == int(counts.sum())
    assert made.pulses_SNC.min() < -6 and made.pulses_SNC.max() > 6
    for number in range(8):
        alone = GeneratedRows(small_sensor()).microbatch([number])
        assert torch.equal(alone.weights_RT[0], made.weights_RT[number])
        mine, theirs = (slots[slots >= 0] for slots in (alone.pulse_slots_RK[0], made.pulse_slots_RK[number]))
        assert torch.equal(alone.pulses_SNC[mine], made.pulses_SNC[theirs])


class Spoilt:
    def __init__(self, change) -> None:
        self.rows, self.change = GeneratedRows(small_sensor()), change

    def microbatch(self, index, fields, task=""):
        batch = self.rows.microbatch(index, fields, task)
        self.change(batch)
        return batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: setattr(batch, "pulses_SNC", None), r"pulses_SNC is missing; it must be torch\.float32"),
        (lambda batch: setattr(batch, "weights_RT", batch.weights_RT[:, 1:]), r"weights_RT is torch.float32 \[4, 23\]"),
        (lambda batch: batch.pulses_SNC.view(-1)[0].fill_(9), r"pulses_SNC holds .* … 9; it must lie within -8"),
        (lambda batch: batch.pulses_SNC.view(-1)[0].fill_(torch.nan), r"pulses_SNC holds nan … nan; it must lie"),
        (lambda batch: batch.pulse_slots_RK.add_(90), r"pulse_slots_RK holds \d+ … \d+; it must lie within -1 …"),
        (lambda batch: batch.own.update(a_R=torch.zeros(4)), "a_R: a field that this system does not declare"),
        (
            lambda batch: object.__setattr__(batch.plan, "own_lists", ()),
            "plan.own_lists has none; it must have pulse",
        ),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(change, message):
    fields = small_sensor().model.inputs.fields
    with pytest.raises(DataError, match=message):
        CheckedSplit("train", Spoilt(change), small_sensor()).microbatch(range(4), fields)


@pytest.mark.parametrize("workers", [0, 1])
def test_they_come_through_the_loader_where_they_are_asked_for(workers):
    train = build_datasets(small_sensor()).train
    loader = MicrobatchLoader(train, 0, 2, 0, 1, 4, {"tokens_RT", "pulses_SNC"}, workers)
    batch = next(loader)
    loader.close()
    first = batch.pulse_slots_RK[0][batch.pulse_slot_documents_RK[0] == 1]
    assert (batch.tokens_RT[0][batch.document_ids_RT[0] == 1][1:] == 8 + 8 * batch.pulses_SNC[first, 0, 0]).all()
    without = train.microbatch(range(2), {"tokens_RT"})
    assert without.pulses_SNC is None and torch.equal(without.pulse_slots_RK, batch.pulse_slots_RK)


def test_the_proof_of_an_export_gives_them_to_the_exported_model():
    """Rows of one document, the left of which is padded: what a token, a row and a slot has is where it was."""
    batch = GeneratedRows(small_sensor(), documents=1).microbatch(range(6))
    batch.document_ids_RT[0, 10:] = -1
    batch.weights_RT[0, 10:] = 0
    inputs = exported_inputs(batch)
    assert inputs.keys() == {"input_ids", "attention_mask", "weights", "pulses", "pulse_mask"}
    assert torch.equal(inputs["weights"][0, -10:], batch.weights_RT[0, :10]) and not inputs["weights"][0, :-10].any()
    assert torch.equal(inputs["weights"][1], batch.weights_RT[1]) and inputs["attention_mask"][0].sum() == 10
    assert torch.equal(inputs["input_ids"][0, -10:], batch.tokens_RT[0, :10])
    assert torch.equal(inputs["pulse_mask"], batch.pulse_slots_RK >= 0) and inputs["pulses"].shape == (6, 3, 4, 3)
    row, slot = (batch.pulse_slots_RK >= 0).nonzero()[-1].tolist()
    assert torch.equal(inputs["pulses"][row, slot], batch.pulses_SNC[batch.pulse_slots_RK[row, slot]])
    assert not inputs["pulses"][~inputs["pulse_mask"]].any()
    assert torch.equal(exported_inputs(batch, left=False)["weights"], batch.weights_RT)


@pytest.mark.slow
def test_a_dry_run_plans_a_system_that_has_them(tmp_path):
    planned = changed(small_sensor(), {"parallel.pipeline_model_parallel_size": 2})
    dump_config(planned, tmp_path / "r.yaml")
    words = [PYTHON, "pretrain_multimodal.py", "--config", str(tmp_path / "r.yaml"), "--dry-run", "--world-size", "2"]
    words += ["--global-batch-size", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tower …" in done.stdout


def test_shards_have_none():
    reading = changed(small_sensor(), {"data.builder": None})
    with pytest.raises(ValueError, match=r"data\.builder: not set; shards have no pulses_SNC, weights_RT"):
        build_datasets(reading)
