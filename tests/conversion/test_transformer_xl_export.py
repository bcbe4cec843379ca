"""The plain Transformer-XL of exported folders against the training nodes, weights carried over by the entries."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.hf.transformer_xl import TransformerXLTower
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.transformer_xl.nodes import transformer_xl_nodes
from megatron_mm.platform import setup
from tests.models import test_transformer_xl as case


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)


def exported() -> tuple[TransformerXLTower, torch.Tensor, dict[str, torch.Tensor]]:
    """The plain tower, what the training nodes make of the batch, and the exported tensors; both ways are checked."""
    text, batch = case.tiny(), case.text_batch()
    graph, modules = case.encoder(text)
    tied = {f"{node.name}.{name}" for node in graph.nodes for name in node.ties}
    ours = {name.replace("/", "."): parameter.detach() for name, parameter in modules.named_parameters()}
    entries = names_of(transformer_xl_nodes(text, LayerSettings(), 0.02, ("tokens_RT",), "tower"))
    assert {entry.training for entry in entries} == ours.keys() - tied
    tensors = dict(pair for entry in entries for pair in entry.split(ours[entry.training]))
    for entry in entries:
        back = torch.full(entry.shape, float("nan"))
        for part in entry.parts:
            entry.fill(back, part, tensors[part.name])
        assert torch.equal(back, ours[entry.training]), entry.training
    tower = TransformerXLTower(**asdict(text))
    tensors = {name.removeprefix("tower."): tensor for name, tensor in tensors.items()}
    tower.load_state_dict(tensors)
    with torch.no_grad():
        return tower, case.encode(graph, modules, batch), tensors


def test_plain_tower_is_the_training_nodes():
    tower, expected, _ = exported()
    batch = case.text_batch()
    real = (batch.document_ids_RT >= 0).repeat(2, 1)
    found = tower(torch.cat((batch.tokens_RT, batch.masked_tokens_RT)), real.long())
    case.assert_close(found[real], expected[real])
    found.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters())


def test_padding_is_not_needed():
    """A text alone, of any length, is what it is in a padded batch."""
    tower, expected, _ = exported()
    batch = case.text_batch()
    for row, length in enumerate(case.LENGTHS):
        if length:
            case.assert_close(tower(batch.tokens_RT[row : row + 1, :length])[0], expected[row, :length])


def test_a_tower_made_on_meta_is_whole_after_loading():
    """transformers builds a model on meta and fills its weights; nothing else may be needed."""
    tower, _, tensors = exported()
    with torch.device("meta"):
        made = TransformerXLTower(**asdict(case.tiny()))
    made.to_empty(device="cpu").load_state_dict(tensors)
    tokens = case.text_batch().tokens_RT
    assert torch.equal(made(tokens), tower(tokens))
    assert torch.isfinite(made.to(torch.bfloat16)(tokens)).all()
