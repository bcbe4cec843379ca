"""What exported models do with arguments, caches and vocabularies that they do not know: they raise, or never use them.

Truth: a model's own answer without a cache; what Trainer, PEFT and generate of every tried release send
(tests/releases), and nothing else, is harmless.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from megatron_mm.config.systems import exported
from megatron_mm.conversion.hf_folder import TRANSFORMERS_RELEASES, write_code
from megatron_mm.hf import exported_model
from megatron_mm.hf.exported_model import CACHE, ExportedModel
from megatron_mm.systems.export import adapter_of
from tests.conversion import system_case as case
from tests.conversion.export_case import hf_model, media_batch, one_row, tiny_recipe, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["synapse", "vlm", "dual_encoder", "avt"])
def model(request, tmp_path_factory):
    if request.param == "synapse":
        return hf_model(tiny_recipe())
    root = tmp_path_factory.mktemp(request.param)
    return case.Work(request.param, root, train_tokenizer(root / "spm.model")).model


TOKENS = torch.tensor([[2, 50, 60, 70]])


def test_the_cache_is_taken_and_given_under_either_name(model):
    with torch.no_grad():
        wanted = model(TOKENS).logits[:, -1]
        for name in ("cache", "past_key_values"):
            out = model(TOKENS[:, :3], use_cache=True)
            assert CACHE in out and out[CACHE].get_seq_length() == 3
            found = model(TOKENS[:, 3:], **{name: out[CACHE]}).logits[:, -1]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(TOKENS, cache=model(TOKENS)[CACHE], past_key_values=model(TOKENS)[CACHE])


def test_a_cache_of_another_kind_is_refused_even_when_it_is_empty(model):
    for cache in (DynamicCache(), StaticCache(config=model.config.get_text_config(), max_cache_len=8)):
        for name in ("cache", "past_key_values"):
            with pytest.raises(ValueError, match=f"the cache is a {type(cache).__name__}"):
                model(TOKENS, **{name: cache})


@pytest.mark.parametrize("mask", [True, False])
def test_a_token_whose_past_is_missing_is_refused(model, mask):
    """As generate calls a model whose cache was lost on the way: the last token, its position, a mask or none."""
    given = {"attention_mask": torch.ones_like(TOKENS)} if mask else {}
    with pytest.raises(ValueError, match=r"the cache holds 0 tokens and the input 1"):
        model(TOKENS[:, 3:], position_ids=torch.tensor([[3]]), **given)
    with pytest.raises(ValueError, match="cache_position reach 3"):
        model(TOKENS[:, 3:], cache_position=torch.tensor([3]))


def test_generation_raises_where_the_cache_is_handed_on_under_a_name_of_tomorrow(model, monkeypatch):
    """A release that knows neither name: the output's field is not found, so the next call has no past."""
    real = type(model).forward

    @functools.wraps(real)
    def forgets(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        dict.pop(out, CACHE, None)
        return out

    monkeypatch.setattr(type(model), "forward", forgets)
    for given in ({}, {"attention_mask": torch.ones_like(TOKENS)}):
        with pytest.raises(ValueError, match="what came before is missing"):
            model.generate(TOKENS, **given, max_new_tokens=3, do_sample=False, eos_token_id=None)


def test_arguments_that_would_be_ignored_are_refused(model):
    for name, value in (
        ("kv_cache", object()),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("inputs_embeds", torch.zeros(1, 4, 8)),
        ("token_type_ids", torch.ones_like(TOKENS)),
        ("cu_seq_lens_q", torch.tensor([0, 4])),
    ):
        with pytest.raises(TypeError, match=name):
            model(TOKENS, **{name: value})
    harmless = {"output_hidden_states": False, "output_attentions": False, "inputs_embeds": None}
    harmless |= {"token_type_ids": torch.zeros_like(TOKENS), "task_ids": None}
    with torch.no_grad():
        assert torch.equal(model(TOKENS, **harmless).logits, model(TOKENS).logits)


def test_features_take_a_processors_whole_output_and_nothing_else(model):
    if not hasattr(model, "get_image_features"):
        return
    pixels = torch.zeros(1, 3, model.config.vision["image_size"], model.config.vision["image_size"])
    model.get_image_features(pixels, input_ids=TOKENS, attention_mask=None)
    with pytest.raises(TypeError, match="does not know the argument pixels"):
        model.get_image_features(pixels, pixels=pixels)


def test_trainers_count_of_tokens_divides_the_loss(model):
    """Trainer sends the tokens of all accumulated batches, and then does not divide by the number of batches."""
    with torch.no_grad():
        mean = model(TOKENS, labels=TOKENS).loss
        torch.testing.assert_close(model(TOKENS, labels=TOKENS, num_items_in_batch=12).loss, mean * 3 / 12)


def test_padded_rows_of_the_vocabulary_are_never_chosen(model):
    """An untrained head prefers them as often as any: 2,000 samples and beams would show one."""
    size = 40
    model.config.tokenizer_size = size
    try:
        prompts = TOKENS[:, :1].expand(200, 1)
        torch.manual_seed(0)
        how = {"max_new_tokens": 10, "eos_token_id": None, "attention_mask": torch.ones_like(prompts)}
        for more in ({"do_sample": True, "top_k": 0, "temperature": 2.0}, {"do_sample": False, "num_beams": 2}):
            found = model.generate(prompts, **how, **more)[:, 1:]
            assert found.max() < size
    finally:
        del model.config.tokenizer_size
    assert model.generate(prompts, **how, do_sample=True, top_k=0, temperature=2.0)[:, 1:].max() >= size


def test_a_release_that_was_not_tried_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(exported_model.logger, "warning", said.append)
    model = hf_model(tiny_recipe())
    for releases, expected in ((("5.0.0", "99.0"), 0), (("4.0", "5.0.0rc1"), 1), (("98.0", "99.0"), 2)):
        model.config.transformers_releases = list(releases)
        ExportedModel.__init__(model, model.config)
        assert len(said) == expected
    assert "was made for transformers 98.0 to 99.0" in said[-1]


@pytest.mark.parametrize("system", exported())
def test_a_modelling_file_imports_itself_what_its_imports_import(system, tmp_path):
    """transformers before 5.6 copies the files that the loaded file names, and no others, out of a local folder."""
    adapter = adapter_of(system, "")
    for name, source in adapter.files.items():
        write_code(tmp_path, name, source)

    def imports(module: str) -> set[str]:
        code = (tmp_path / f"{module}.py").read_text()
        return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", code, flags=re.MULTILINE))  # as transformers finds them

    copied: set[str] = set()
    for loaded in (adapter.config_class, adapter.model_class, "processing_mm."):  # the configuration is loaded first
        module = loaded.partition(".")[0]
        copied |= {module, *imports(module)}
        for module in copied:
            assert imports(module) <= copied, module
    assert copied == {name.removesuffix(".py") for name in adapter.files}


def test_folders_name_the_releases_in_which_they_are_tried():
    """The lowest that setup.py allows, and the newest of the locks; tests/releases tries both."""
    locked = {path.name: path.read_text() for path in (ROOT / "locks").glob("*.txt")}
    found = {name: re.search(r"^transformers==(\S+)$", text, re.MULTILINE) for name, text in locked.items()}
    newest = max(Version(match[1]) for name, match in found.items() if name.startswith("python-"))
    assert (found["releases-oldest.txt"][1], str(newest)) == TRANSFORMERS_RELEASES
    lowest = re.search(r'"transformers>=([\d.]+),<6"', (ROOT / "setup.py").read_text())[1]
    assert Version(lowest) == Version(TRANSFORMERS_RELEASES[0])
    assert f"oldest={TRANSFORMERS_RELEASES[0]}" in (ROOT / "tools" / "update_locks.sh").read_text()


def test_one_row_of_media_is_what_it_was(model):
    """The guard lets every ordinary call through: a row with media continues from its cache."""
    if "input_features" not in type(model).forward.__code__.co_varnames:
        return
    batch = one_row(media_batch(model), 0)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **how), model.generate(**batch, **how, use_cache=False))
