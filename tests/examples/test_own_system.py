"""The example of a system of one's own: layer, objective and dataset work in any layout, from outside the package."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from megatron_mm.config.load import load_config
from megatron_mm.config.systems import SYSTEMS
from megatron_mm.data.tokens.tokenizer import open_tokenizer

RECIPE = Path(__file__).parents[2] / "examples" / "own_system" / "byte-mixer.yaml"


def plugin():
    """The example's file, as the recipe's plugin that it is: imported again by its name, it would register twice."""
    return sys.modules[type(load_config(RECIPE).model).__module__]


@pytest.mark.slow
def test_it_is_the_same_in_a_pipeline():
    """One process is the truth; two stages and two data-parallel processes must give its losses and gradients."""
    config = load_config(RECIPE)
    measured = {}
    for name in ("", "PP2xDP2+distopt"):
        layout = parse_layout(name)
        measured[name] = launch(for_layout(config, layout, iterations=2, pool=4, global_batch=8), layout)
    result = compare(parse_layout("PP2xDP2+distopt"), measured["PP2xDP2+distopt"], measured[""])
    assert result.passed, result
    losses = measured[""]["losses"]
    assert losses[1] < losses[0]


def test_a_row_is_a_paragraph_from_its_beginning_to_its_end():
    config = load_config(RECIPE)
    datasets, tokenizer = plugin().build_datasets(config), open_tokenizer(RECIPE.with_name("bytes.json"))
    assert datasets.tokenizer.identity == tokenizer.identity and config.model.inputs.vocab_size == tokenizer.vocab_size
    known, ended = set(plugin().paragraphs(plugin().modules()[0])), 0
    batch = datasets.train.microbatch(range(64), frozenset({"tokens_RT", "labels_RT"}))
    for tokens, labels, mask in zip(batch.tokens_RT.tolist(), batch.labels_RT, batch.loss_mask_RT):
        assert tokens[0] == tokenizer.bos_id and labels[mask.bool()].tolist() == tokens[1 : 1 + int(mask.sum())]
        if tokenizer.eos_id in tokens:
            end = tokens.index(tokenizer.eos_id)
            assert tokenizer.decode(tokens[1:end]) in known and int(mask.sum()) == end
            assert set(tokens[end + 1 :]) <= {tokenizer.pad_id}
            ended += 1
    assert 0 < ended < 64  # the others are cut


def test_a_placeholder_in_a_text_is_read_and_not_learned():
    datasets = plugin().build_datasets(load_config(RECIPE))
    datasets.train.texts = [np.array(datasets.tokenizer.encode("a<image>b"))]
    batch = datasets.train.microbatch([0], frozenset({"tokens_RT"}))
    assert batch.loss_mask_RT[0].nonzero().flatten().tolist() == [0, 2, 3]  # a, b and the end


def test_without_a_tokenizer_there_is_no_dataset():
    config = load_config(RECIPE)
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set; name .*bytes\.json"):
        plugin().build_datasets(replace(config, data=replace(config.data, tokenizer=None)))


def test_held_out_samples_are_of_modules_that_are_not_learned(monkeypatch):
    plugin()  # so that it is registered, and is again after this test
    monkeypatch.delitem(SYSTEMS, "byte_mixer")  # the program is to import its own
    samples = importlib.import_module("examples.own_system.held_out").samples
    monkeypatch.undo()
    found, held_out = samples(16, seed=0), set(plugin().paragraphs(plugin().modules()[1]))
    assert len(found) == 16 and all(sample["prompt"] + sample["text"] in held_out for sample in found)
    assert found == samples(16, seed=0) != samples(16, seed=1)
