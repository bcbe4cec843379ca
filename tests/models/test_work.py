"""Records of work against closed forms, and what is refused of them."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import NodeCost
from megatron_mm.models.layers.costs import StackWork
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.work import Attention, Collective, MatrixProduct, Moved, merged, share


def test_flops_of_records():
    """A multiply-add is two; attention is two products a head, counted in full."""
    assert MatrixProduct(2, 3, 5, count=7).flops == 2 * 2 * 3 * 5 * 7
    attention = Attention(2, 3, 5, 4, 2, 8, causal=True)
    assert attention.flops == 2 * 4 * (MatrixProduct(3, 5, 8).flops + MatrixProduct(3, 8, 5).flops)
    assert Moved(10).flops == Collective("all_reduce", "tp", 10).flops == 0


def test_a_causal_mask_leaves_the_triangle():
    """Truth is the mask itself."""
    assert Attention(1, 6, 6, 1, 1, 1, causal=True).visible == torch.ones(6, 6).tril().double().mean().item()
    assert Attention(1, 6, 6, 1, 1, 1).visible == 1.0


def test_products_of_the_backward_pass_have_the_shapes_of_the_gradients():
    """[m, n] is the output's gradient: with [n, k] it gives the input's [m, k]; [k, m] with it the weight's [k, n]."""
    product = MatrixProduct(2, 3, 5, what="fc1")
    assert product.during("forward") == product
    assert product.during("dgrad") == MatrixProduct(2, 5, 3, what="fc1")
    assert product.during("wgrad") == MatrixProduct(5, 3, 2, what="fc1")


def test_equal_records_are_merged():
    records = [Moved(8, 2, "norm"), MatrixProduct(1, 2, 3), Moved(8, what="norm"), Moved(8, what="gate"), Moved(9, 0)]
    assert merged(records) == (Moved(8, 3, "norm"), MatrixProduct(1, 2, 3), Moved(8, 1, "gate"))


def test_what_does_not_divide_is_named():
    assert share(12, 4, "heads") == 3
    with pytest.raises(ValueError, match="heads: 6 do not divide over 4 processes"):
        share(6, 4, "heads")


def test_linear_layers_communicate_as_megatron_core_does():
    """Its ColumnParallelLinear and RowParallelLinear, with and without sequence parallelism; bf16."""

    def collectives(sequence_parallel: bool, sharded: bool) -> set[tuple]:
        settings = LayerSettings(ParallelSizes(tp=2, sequence_parallel=sequence_parallel), dtype=torch.bfloat16)
        make = StackWork(settings, sharded)
        work = (*make.column(10, 4, 6, "in"), *make.row(10, 6, 4, "out"))
        assert [record for record in work if isinstance(record, MatrixProduct)] == [
            MatrixProduct(10, 3, 4, what="in"), MatrixProduct(10, 4, 3, what="out")
        ]  # fmt: skip
        found = [record for record in work if isinstance(record, Collective)]
        assert all((one.group, one.bytes, one.count) == ("tp", 2 * 10 * 4, 1) for one in found)
        return {(one.what, one.kind, one.runs) for one in found}

    summed = {("in", "all_reduce", "dgrad"), ("out", "all_reduce", "forward")}
    assert collectives(False, True) == collectives(True, False) == summed  # a tower is never sequence-parallel
    assert collectives(True, True) == {
        ("in", "all_gather", "forward"), ("in", "all_gather", "wgrad"), ("in", "reduce_scatter", "dgrad"),
        ("out", "reduce_scatter", "forward"), ("out", "all_gather", "dgrad"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("comm", "backend", "kinds"),
    [
        ("all_gather", "local", {("all_gather", "forward", 1, 1280), ("reduce_scatter", "dgrad", 1, 1280)}),
        ("a2a", "local", {("all_to_all", "forward", 1, 1280), ("all_to_all", "forward", 1, 640),
                          ("all_to_all", "dgrad", 1, 1280), ("all_to_all", "dgrad", 1, 640)}),
        ("p2p", "transformer_engine", {("send_receive", "forward", 1, 640), ("send_receive", "dgrad", 1, 1280)}),
    ],
)  # fmt: skip
def test_context_parallelism_exchanges_keys_or_heads(comm, backend, kinds):
    """Two rows of ten tokens on two processes, four heads of width 4 in two groups, fp32: a process has 640 bytes of
    keys and values, and as many of queries."""
    shape = StackShape(1, 16, 4, 2, 16, "RMSNorm", 1e-5)
    settings = LayerSettings(ParallelSizes(cp=2), backend=backend, cp_comm_type=comm)
    work = StackWork(settings, sharded=True).self_attention(2, 10, shape, causal=True, one_document=True)
    attention, *exchanged = work
    assert {(one.kind, one.runs, one.count, one.bytes) for one in exchanged} == kinds
    assert attention.flops == 4 * 2 * 5 * 10 * 16  # half of the queries on each, however they are exchanged


def test_a_plain_number_stands_for_work_that_is_not_told():
    number, records = NodeCost(1, 12.0, 4.0), NodeCost(2, (MatrixProduct(1, 2, 3),), 4.0, processes=2)
    assert number.forward_flops == 12.0 and number.records is None
    assert records.forward_flops == 24.0 and records.records == records.work
    both = records + records
    assert (both.parameters, both.forward_flops, both.activation_bytes, both.processes) == (4, 48.0, 8.0, 2)
    with pytest.raises(ValueError, match="both in records or both in a number"):
        number + records
    with pytest.raises(ValueError, match=r"equally many processes \(2 and 1 here\)"):
        records + NodeCost(1, (MatrixProduct(1, 2, 3),))
    idle = records + NodeCost(5, activation_bytes=1.0)  # of any number of processes: it does no work
    assert idle == NodeCost(5, activation_bytes=1.0) + records == NodeCost(7, records.work, 5.0, processes=2)
