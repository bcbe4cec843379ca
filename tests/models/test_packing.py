"""Segments for variable-length kernels, run through a plain loop over segments, against attention under masks."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_mm.models.layers.attention import document_mask
from megatron_mm.models.layers.media_attention import MediaAttention, seen_slots
from megatron_mm.models.layers.packing import Segments, document_segments, media_keys
from megatron_mm.models.layers.settings import LayerSettings, layer_config
from megatron_mm.models.layers.sharding import zigzag_slice
from megatron_mm.parts.decoder.nodes import decoder_shape
from tests.models import synapse_case as case


def variable_length(query, key, value, call: Segments, causal: bool) -> torch.Tensor:
    """What a kernel computes: each segment alone, its causal mask aligned at the bottom right."""
    outputs = []
    bounds = list(zip(call.query_bounds.tolist(), call.key_bounds.tolist()))
    assert bounds[-1] == (len(query), len(key))
    for (q0, k0), (q1, k1) in itertools.pairwise(bounds):
        assert 0 <= q1 - q0 <= call.longest_query and 0 <= k1 - k0 <= call.longest_key
        if q1 == q0:
            continue
        scores = query[q0:q1] @ key[k0:k1].T
        if causal:
            scores = scores + torch.full(scores.shape, float("-inf")).triu(1 + (k1 - k0) - (q1 - q0))
        outputs.append(scores.softmax(-1) @ value[k0:k1])
    return torch.cat(outputs)


def packed_batch(counted: bool):
    batch = case.make_batch(case.tiny_config())
    if counted:
        batch.plan = type(batch.plan)(**{**batch.plan.__dict__, "max_documents_per_row": 3})
    return batch


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_documents(cp_size: int, counted: bool, causal: bool):
    batch = packed_batch(counted)
    rows, length = batch.tokens_RT.shape
    query, key, value = torch.randn(3, rows, length, 8)
    expected = (query @ key.transpose(1, 2) + document_mask(batch, torch.float32, causal)[:, 0]).softmax(-1) @ value
    for rank in range(cp_size):
        local = zigzag_slice(query, cp_size, rank)
        calls = document_segments(batch, cp_size, rank, causal)
        assert len(calls) == (1 if cp_size == 1 else 2)
        pieces = [
            variable_length(
                local[:, call.begin : call.end].flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), call, causal
            ).view(rows, -1, 8)
            for call in calls
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), zigzag_slice(expected, cp_size, rank))


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("counted", [True, False])
def test_media_of_documents(cp_size: int, counted: bool):
    batch, config = packed_batch(counted), case.tiny_config()
    rows, length = batch.tokens_RT.shape
    images, sounds = config.vision.tokens_per_image, config.audio.tokens_per_sound
    query = torch.randn(rows, length, 1, 8)
    image_key, image_value = torch.randn(2, batch.plan.num_images, images, 1, 8)
    sound_key, sound_value = torch.randn(2, batch.plan.num_sounds, sounds, 1, 8)
    media = (("image", images), ("sound", sounds))
    core = MediaAttention(layer_config(LayerSettings(), decoder_shape(config.decoder, config.init_std), sharded=True))
    expected = core(
        query,
        ((image_key, image_value), (sound_key, sound_value)),
        core.keys(batch, media, torch.float32, 1, 0),
    )
    expected = expected * seen_slots(batch, ("image", "sound")).any(-1, keepdim=True)
    for rank in range(cp_size):
        keys = media_keys(batch, media, cp_size, rank)
        key, value = (
            torch.cat((image.flatten(0, 2), sound.flatten(0, 2), torch.zeros(1, 8)))[keys.order]
            for image, sound in ((image_key, sound_key), (image_value, sound_value))
        )
        local = zigzag_slice(query, cp_size, rank)[:, :, 0] / 8**0.5
        pieces = [
            variable_length(local[:, call.begin : call.end].flatten(0, 1), key, value, call, False).view(rows, -1, 8)
            for call in keys.calls
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), zigzag_slice(expected, cp_size, rank))
