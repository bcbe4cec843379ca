"""The exported modelling file against transformers' own Llama, CLIP, Whisper and Mllama, and against itself.

Oracles have random weights; the modelling file loads them under its own names. Then: padding on the left, the cache and
beams must not change what a row alone, without a cache, would say.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from megatron_mm.config.section import changed
from megatron_mm.hf.modeling_synapse import MemoryCache
from tests.conversion.export_case import hf_model, media_batch, one_row, tiny_recipe

pytestmark = pytest.mark.interface


@pytest.fixture(scope="module")
def model():
    return hf_model(tiny_recipe())


def randomize(module: nn.Module) -> nn.Module:
    """Random weights in every parameter: default initialisation leaves biases at zero and norms at one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_positions" not in name:  # Whisper's sinusoids are fixed
                parameter.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def test_decoder_without_gates_is_llama():
    model = hf_model(tiny_recipe())
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    ).eval()  # fmt: skip
    ours = model.state_dict()
    llama.load_state_dict({name: ours[name] for name in llama.state_dict()})
    batch = media_batch(model)
    for layer in model.model.cross_layers:
        nn.init.zeros_(layer.gate)
    real = batch["attention_mask"].bool()
    theirs = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                   position_ids=(real.long().cumsum(1) - 1).clamp(min=0)).logits  # fmt: skip
    close(model(**batch).logits[real], theirs[real])
    (model(**batch).logits[real] ** 2).mean().backward()
    (theirs[real] ** 2).mean().backward()
    wanted = dict(llama.named_parameters())
    for name, parameter in model.named_parameters():
        if name in wanted:
            close(parameter.grad, wanted[name].grad)


def test_image_tower_is_clip(model):
    c = model.config
    clip = randomize(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=c.vision_hidden_size, intermediate_size=c.vision_intermediate_size,
                num_hidden_layers=c.vision_num_hidden_layers, num_attention_heads=c.vision_num_attention_heads,
                image_size=c.vision_image_size, patch_size=c.vision_patch_size,
            )
        )
    )  # fmt: skip
    tower = hf_model(tiny_recipe()).model.vision_tower
    state = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    wanted = {name: state[name] for name in tower.state_dict() if name != "temporal_embedding.weight"}
    tower.load_state_dict(wanted, strict=False)
    images = torch.randn(3, 3, c.vision_image_size, c.vision_image_size)
    stills = tower(images, torch.tensor([-1, -1, -1]))
    close(stills, clip(images).last_hidden_state)
    frames = tower(images, torch.tensor([0, -1, 2]))
    table = tower.temporal_embedding.weight
    close(frames - stills, torch.stack([table[0], 0 * table[0], table[2]])[:, None].expand_as(stills))


def test_audio_tower_is_whisper(model):
    c = model.config
    whisper = randomize(
        WhisperEncoder(
            WhisperConfig(
                d_model=c.audio_hidden_size, encoder_layers=c.audio_num_hidden_layers,
                encoder_attention_heads=c.audio_num_attention_heads, encoder_ffn_dim=c.audio_intermediate_size,
                num_mel_bins=c.audio_num_mel_bins, max_source_positions=c.audio_tokens,
            )
        )
    )  # fmt: skip
    tower = hf_model(tiny_recipe()).model.audio_tower
    state = whisper.state_dict()
    state.pop("embed_positions.weight")
    tower.load_state_dict(state, strict=True)
    sounds = torch.randn(2, c.audio_num_mel_bins, c.audio_frames)
    close(tower(sounds), whisper(sounds).last_hidden_state)


def test_cross_attention_is_mllamas():
    recipe = tiny_recipe()
    recipe = changed(
        recipe,
        {
            "model.vision.hidden_size": recipe.model.decoder.hidden_size,  # Mllama reads memory of the decoder's width
        },
    )
    model = hf_model(recipe)
    c, ours = model.config, model.model.cross_layers[1].cross_attn
    config = MllamaTextConfig(
        hidden_size=c.hidden_size, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.cross_attention_num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = MllamaTextCrossAttention(config, layer_idx=0)
    names = {"k_proj": "k_proj_image", "v_proj": "v_proj_image"}
    state = {
        name: ours.get_parameter(f"{names.get(name.split('.')[0], name.split('.')[0])}.weight")
        for name in theirs.state_dict()
    }
    theirs.load_state_dict(state)
    text, memory = torch.randn(2, 5, c.hidden_size), torch.randn(2, 7, c.hidden_size)
    wanted, _ = theirs(text, cross_attention_states=memory)
    close(ours(text, *ours.project_memory(memory, None), None), wanted)


def test_rows_without_media_get_exactly_zero(model):
    batch = media_batch(model)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, number=number: seen.update({number: out - args[0]}))
        for number, layer in enumerate(model.model.cross_layers)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    has_media = torch.tensor([True, False, True, True])
    assert len(seen) == 2
    for change in seen.values():
        assert (change[1] == 0).all()
        assert (change[~real] == 0).all()
        assert (change[has_media][real[has_media]].abs().sum(-1) > 0).all()


def test_left_padding_and_company_change_nothing(model):
    batch = media_batch(model)
    logits = model(**batch).logits
    for row in range(4):
        alone = model(**one_row(batch, row)).logits[0]
        close(logits[row, -alone.shape[0] :], alone)


def test_rows_see_their_own_media_only(model):
    batch = media_batch(model)
    before = model(**batch).logits
    changed = dict(batch, pixel_values=batch["pixel_values"].clone())
    changed["pixel_values"][0, 0] += 1
    changed["pixel_values"][1:][~batch["image_mask"][1:]] += 1  # empty slots are never looked at
    after = model(**changed).logits
    assert (after[0] - before[0]).abs().max() > 1e-3
    close(after[1:], before[1:])


@pytest.mark.parametrize(
    "arguments",
    [{"do_sample": False}, {"do_sample": True, "top_p": 0.9, "top_k": 0}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "top-p", "beam"],
)
def test_cached_generation_is_uncached_generation(model, arguments):
    batch = media_batch(model)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(model.generate(**batch, max_new_tokens=12, use_cache=use_cache, eos_token_id=None, **arguments))
    assert outputs[0].shape == (4, 21)
    assert outputs[0].tolist() == outputs[1].tolist()


def test_greedy_generation_is_repeated_argmax_of_a_row_alone(model):
    batch = media_batch(model)
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 9:]
    for row in range(4):
        alone = one_row(batch, row)
        for step in range(6):
            token = model(**alone, use_cache=False).logits[0, -1].argmax()
            assert token == out[row, step]
            alone["input_ids"] = torch.cat([alone["input_ids"], token[None, None]], dim=1)


def test_beam_search_finds_what_exhaustive_scoring_ranks_first(model):
    """With as many beams as tokens, two steps of beam search see every pair: the best pair must come out."""
    batch = one_row(media_batch(model), 0)
    vocabulary = model.config.vocab_size
    first = model(**batch).logits[0, -1].log_softmax(-1)
    pairs = torch.cat([batch["input_ids"].expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
    media = {k: v.expand(vocabulary, *v.shape[1:]) for k, v in batch.items() if k != "input_ids"}
    second = model(pairs, **media).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax()
    out = model.generate(**batch, max_new_tokens=2, num_beams=vocabulary, do_sample=False, eos_token_id=None)
    assert out[0, -2:].tolist() == [best // vocabulary, best % vocabulary]


def test_cache_reorders_text_and_media_together(model):
    """Beams permuted across rows continue as the rows they came from, mask of the media included."""
    batch = media_batch(model)
    cache = model(**batch, use_cache=True).past_key_values
    assert isinstance(cache, MemoryCache)
    order = torch.tensor([2, 3, 0, 1])
    token = torch.tensor([[7], [8], [9], [10]])
    cache.reorder_cache(order)
    longer = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    continued = model(token, attention_mask=longer[order], past_key_values=cache).logits[:, -1]
    whole = {name: value[order] for name, value in batch.items()}
    whole["input_ids"] = torch.cat([whole["input_ids"], token], dim=1)
    whole["attention_mask"] = longer[order]
    close(continued, model(**whole).logits[:, -1])


def test_media_are_encoded_once(model):
    batch = media_batch(model)
    calls = {"vision": 0, "keys": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    cross = model.model.cross_layers[0].cross_attn
    hooks = [model.model.vision_tower.register_forward_hook(count("vision")),
             cross.k_proj_image.register_forward_hook(count("keys"))]  # fmt: skip
    model.generate(**batch, max_new_tokens=8, num_beams=2, do_sample=False, eos_token_id=None)
    for hook in hooks:
        hook.remove()
    assert calls == {"vision": 1, "keys": 1}


def test_training_reaches_every_parameter():
    model = hf_model(tiny_recipe()).train()
    batch = media_batch(model)
    batch["image_frames"] = torch.tensor([[-1, -1], [-1, -1], [0, 1], [2, 3]])
    batch["image_mask"][3] = True
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of the keys adds the same to every score of a query: softmax does not see it.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_loss_counts_next_tokens_only(model):
    batch = media_batch(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    terms = [
        -output.logits[row, t].log_softmax(-1)[labels[row, t + 1]]
        for row in range(4)
        for t in range(8)
        if labels[row, t + 1] >= 0
    ]
    close(output.loss, torch.stack(terms).mean())


def test_wrong_masks_are_refused(model):
    batch = media_batch(model)
    with pytest.raises(ValueError, match=r"image_mask has shape \[4, 1\]; the media have slots \[4, 2\]"):
        model(**dict(batch, image_mask=batch["image_mask"][:, :1]))
