"""Initial weights: every tensor-parallel slice is the slice of one process's weight, and none is ever whole."""

import pytest
import torch
from torch import nn

from megatron_mm.models import initialization
from megatron_mm.models.initialization import Init, initialize_module, initialize_parameter
from megatron_mm.models.layers.parameters import describe


def slices(full_shape, init: Init, tp: int) -> list[torch.Tensor]:
    made = []
    for rank in range(tp):
        shape = list(full_shape)
        shape[init.dim] //= tp
        parameter = nn.Parameter(torch.full(shape, float("nan")))
        parameter.tensor_model_parallel = True
        initialize_parameter(parameter, init, "node.weight", seed=7, tp_rank=rank, tp_size=tp)
        made.append(parameter.detach())
    return made


@pytest.mark.parametrize("init", [Init(), Init(dim=1), Init(units=6), Init(units=4)])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_slices_are_those_of_one_process(init, tp):
    shape = (24, 36)
    whole = slices(shape, init, 1)[0]
    assert torch.equal(torch.cat(slices(shape, init, tp), dim=init.dim), whole)
    assert abs(float(whole.std()) - 0.02) < 2e-3 and abs(float(whole.mean())) < 2e-3


def test_fused_parts_are_drawn_as_their_logical_matrices():
    """[gate; up] under TP2 holds half of gate, then half of up, of the same logical matrices as in one process."""
    gate, up = slices((16, 5), Init(parts=2), 1)[0].chunk(2)
    halves = [piece.chunk(2) for piece in slices((16, 5), Init(parts=2), 2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), gate)
    assert torch.equal(torch.cat([half[1] for half in halves]), up)
    assert not torch.equal(gate, up)


def test_no_process_draws_a_full_matrix(monkeypatch):
    drawn = []
    plain = torch.empty

    def recording(*args, **kwargs):
        result = plain(*args, **kwargs)
        drawn.append(result.numel())
        return result

    monkeypatch.setattr(initialization.torch, "empty", recording)
    parameter = nn.Parameter(torch.zeros(64, 10))
    parameter.tensor_model_parallel = True
    initialize_parameter(parameter, Init(), "w", 0, tp_rank=1, tp_size=2)
    assert max(drawn) == 2 * 10  # 128 rows in 64 blocks


def test_names_and_seeds_give_different_numbers():
    made = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        parameter = nn.Parameter(torch.zeros(8, 8))
        initialize_parameter(parameter, Init(), name, seed)
        made.append(parameter.detach().clone())
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_constants():
    for init, value in ((Init("zeros"), 0.0), (Init("ones"), 1.0), (Init("constant", value=0.5), 0.5)):
        parameter = nn.Parameter(torch.full((3,), 9.0))
        initialize_parameter(parameter, init, "x", 0)
        assert parameter.tolist() == [value] * 3


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"parameter tower\.weight does not say"):
        initialize_module(nn.Linear(2, 2), "tower", seed=0)


@pytest.mark.parametrize("words", [{"column": {"wieght": None}}, {"row": {"linear": 2}}, {"constants": {"gate": 0.0}}])
def test_a_description_of_a_parameter_that_is_not_there_is_refused(words):
    """It would be a weight that is whole on every process, or that begins otherwise."""
    name = next(iter(next(iter(words.values()))))
    with pytest.raises(ValueError, match=f"Linear has no parameter of {name}"):
        describe(nn.Linear(2, 2), init_std=0.02, **words)
