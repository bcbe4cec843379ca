"""Gated cross-attention reads whatever memories it is given: one, the package's two, or three with a system's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mm.config.fields import Field, Listed
from megatron_mm.config.inputs import InputFormat
from megatron_mm.data.reading.microbatch import ListedPlan
from megatron_mm.data.reading.rows import Document, collate
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.cross_attention import GatedCrossAttentionKind, MediaMemory
from megatron_mm.models.layers.packing import media_keys
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.decoder.nodes import decoder_shape
from tests.models import synapse_case as case

IMAGES, SOUNDS, PULSES = (
    MediaMemory("image", "image", 32, 5),
    MediaMemory("audio", "sound", 48, 6),
    MediaMemory("pulse", "pulse", 24, 4),
)


def kind(*memories: MediaMemory) -> GatedCrossAttentionKind:
    shape = replace(decoder_shape(case.tiny_config().decoder, 0.02), num_query_groups=2)
    return GatedCrossAttentionKind(LayerSettings(), shape, memories, qk_layernorm=True, gate_init=0.5)


def batch_of(images: bool, sounds: bool, pulses: bool):
    """The case's rows, of whose media some kinds are taken away; pulses are the images' slots again."""
    batch = case.make_batch(case.tiny_config())
    listed = Listed("pulse", "S", most=3)
    slots, documents = batch.image_slots_RK.clone(), batch.image_slot_documents_RK.clone()
    tables = ["image_slots_RK"] * (not images) + ["sound_slots_RJ"] * (not sounds)
    for name in tables:
        getattr(batch, name)[:] = -1
        getattr(batch, name.replace("slots", "slot_documents"))[:] = -2
    batch.plan = replace(batch.plan, own_lists=(ListedPlan(listed, 4, 3),))
    empty = (torch.full_like(slots, -1), torch.full_like(documents, -2))
    found, owners = (slots, documents) if pulses else empty
    return batch.with_fields({"pulse_slots_RK": found, "pulse_slot_documents_RK": owners})


def run(module, batch, *memories):
    text = torch.randn(batch.tokens_RT.numel(), 1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module(text, *memories, ForwardContext(batch)) - text


@pytest.mark.parametrize("only", [IMAGES, SOUNDS, PULSES], ids=lambda one: one.name)
def test_one_memory_is_read_as_it_is_among_three(only):
    """Truth: a sublayer of three memories, of which two have nothing in any slot, with the same weights."""
    three = case.fill(kind(IMAGES, SOUNDS, PULSES).build())
    one = kind(only).build()
    weights = dict(three.named_parameters())
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(weights[name])
    batch = batch_of(*(only is memory for memory in (IMAGES, SOUNDS, PULSES)))
    memories = [torch.randn(4, memory.tokens, memory.width) for memory in (IMAGES, SOUNDS, PULSES)]
    expected = run(three, batch, *memories)
    found = run(one, batch, memories[(IMAGES, SOUNDS, PULSES).index(only)])
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0


def test_every_one_of_three_memories_is_seen():
    module, batch = case.fill(kind(IMAGES, SOUNDS, PULSES).build()), batch_of(True, True, True)
    memories = [torch.randn(4, memory.tokens, memory.width) for memory in (IMAGES, SOUNDS, PULSES)]
    whole = run(module, batch, *memories)
    for at in range(3):
        changed = [memory + (place == at) for place, memory in enumerate(memories)]
        assert (run(module, batch, *changed) - whole).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"zip\(\)"):
        run(module, batch, *memories[:2])


@pytest.mark.parametrize("memories", [(IMAGES,), (PULSES,), (IMAGES, SOUNDS, PULSES)], ids=len)
def test_cost_and_names_are_those_of_the_module(memories):
    made, plan = kind(*memories), batch_of(True, True, True).plan
    own = dict(made.build().named_parameters())
    assert made.cost(plan).parameters == sum(parameter.numel() for parameter in own.values())
    assert {entry.training for entry in made.names("n", "e")} == {f"n.{name}" for name in own}


@pytest.mark.parametrize("memories", [(), (IMAGES, IMAGES)])
def test_no_memory_or_one_name_twice_is_refused(memories):
    with pytest.raises(ValueError, match="at least one memory, each of another name; it was given"):
        kind(*memories)


def test_kernels_of_packed_documents_find_the_positions_of_a_list_of_ones_own():
    listed = Listed("pulse", "S", most=2)
    inputs = InputFormat(64, own_fields=(Field("pulses_SN", ("S", 2)),), own_lists=(listed,))
    rows = [[Document(torch.arange(3).numpy(), torch.ones(3).bool().numpy(), listed={"pulse": [0] * number})
             for number in numbers] for numbers in ((1, 0), (0, 2))]  # fmt: skip
    batch = collate(rows, inputs, 6, [0, 1]).microbatch
    keys = media_keys(batch, (("pulse", 2),), 1, 0)
    nothing = 3 * 2  # positions of three pulses, then one of zeros
    assert keys.order[:3].tolist() == [0, 1, nothing], "the first row's first document, then one without"
    bounds = keys.calls[0].key_bounds.tolist()
    second = keys.order[bounds[4] : bounds[6]].tolist()
    assert second == [nothing, 2, 3, 4, 5]
