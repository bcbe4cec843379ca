"""Records of work against what runs: the dry run counts the bytes of every collective on its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.platform import setup

RECIPES = ("synapse-tiny", "avt-tiny", "vlm-tiny", "dual-encoder-tiny", "perceiver-fusion-tiny")
#: torch's names of the collectives.
_CALLED = {
    "all_reduce": "allreduce",
    "all_gather": "allgather_base",
    "reduce_scatter": "reduce_scatter_base",
    "all_to_all": "alltoall_base",
}


def small(recipe: str, layout: dict[str, int | str]) -> tuple[Config, int]:
    """A recipe in a layout of one microbatch a pipeline stage, and its processes."""
    setup.apply_platform()
    config = load_config(f"megatron_mm/recipes/{recipe}.yaml")
    tp, pp, cp, dp = (layout.get(name, 1) for name in ("tp", "pp", "cp", "dp"))
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "cp_comm_type": layout.get("exchange", "all_gather"),
        "sequence_parallel": bool(layout.get("sp", 0)),
        "recompute_granularity": layout.get("recompute", "none"),
        "pipeline_cuts": None,
    }
    changes = {f"parallel.{name}": value for name, value in parallel.items()}
    changes["training.global_batch_size"] = config.training.micro_batch_size * dp * pp
    return changed(config, changes), tp * pp * cp * dp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        *((recipe, {"tp": 2, "dp": 2}) for recipe in RECIPES),
        *((recipe, {"tp": 2, "sp": 1, "cp": 2}) for recipe in RECIPES),
        ("synapse-tiny", {"cp": 2, "exchange": "a2a"}),
        ("synapse-tiny", {"tp": 2, "sp": 1, "pp": 2, "recompute": "full"}),
        ("avt-tiny", {"tp": 2, "pp": 2, "recompute": "full"}),
    ],
    ids=str,
)
def test_records_communicate_what_the_dry_run_counts(recipe, layout):
    """To the byte, in every stage, forward and backward, by kind of collective."""
    config, processes = small(recipe, layout)
    from megatron_mm.planner import dry_run as planner

    for stage in planner.dry_run(config, processes).stages:
        said: Counter[str] = Counter()
        for record in stage.work["collectives"]:
            said[_CALLED[record["kind"]]] += record["bytes"] * record["count"]
        ran = {kind: size for kind, size in stage.communicated.items() if "(" not in kind}  # the pipeline's own
        assert said == ran
        assert stage.work["not_stated"] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_records_of_all_passes_add_up_to_the_times_of_nodes(recipe):
    config, _ = small(recipe, {"tp": 2})
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.planner.costs import executed, node_passes, node_times

    sizes = ParallelSizes(tp=2)
    for iteration in (0, float("inf")):
        assembly = Assembly.of(config, sizes, iteration=iteration)
        graph, plan = assembly.graph, assembly.plan
        for recompute in (False, True):
            for cached in (False, True):
                runs = node_passes(graph, recompute, cached)
                costs = [node.cost(plan) for node in graph.nodes]
                times = [
                    cost.processes * sum(record.flops for record in executed(cost.records, of))
                    for cost, of in zip(costs, runs)
                ]
                assert times == node_times(graph, plan, recompute, cached)


def test_passes_that_run():
    """Trainable and reached: all; frozen and reached: no gradient of the weights; frozen and not reached: forward."""
    from megatron_mm.models.work import Collective, MatrixProduct, Moved
    from megatron_mm.planner.costs import executed

    collectives = [Collective("all_reduce", "tp", 4, runs=of) for of in ("dgrad", "wgrad")]
    records = [MatrixProduct(2, 3, 5), Moved(8), *collectives]

    def of(forward: int, dgrad: int, wgrad: int) -> list:
        return list(executed(records, {"forward": forward, "dgrad": dgrad, "wgrad": wgrad}))

    product, moved, of_input, of_weight = records
    backward = [product.during("dgrad"), product.during("wgrad")]
    assert of(1, 1, 1) == [product, *backward, replace(moved, count=2), of_input, of_weight]
    assert of(2, 1, 0) == [replace(product, count=2), backward[0], replace(moved, count=3), of_input]
    assert of(1, 0, 0) == [product, moved]


def test_a_loss_over_the_whole_batch_compares_all_its_samples():
    """Once a step: rows of all microbatches of a process with those of all processes; in one microbatch, its own."""
    config, _ = small("perceiver-fusion-tiny", {})
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.models.work import Collective, MatrixProduct
    from megatron_mm.objectives.contrastive import image_text_loss
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.planner.costs import chunk_work, loss_work

    sizes = ParallelSizes(dp=4)
    assembly = Assembly.of(config, sizes)
    contrastive = replace(config.model.contrastive, negatives="batch")
    loss = image_text_loss(contrastive, 1.0)
    graph, plan = replace(assembly.graph, losses=[loss]), assembly.plan
    rows, width = plan.num_rows, contrastive.embedding_size
    work = loss_work(graph, loss, plan, sizes, microbatches=3)
    assert MatrixProduct(3 * rows, 12 * rows, width, 2, "similarities") in work
    assert Collective("all_gather", "dp", 4 * 12 * rows * width, 2, what="embeddings") in work
    for cached in (False, True):
        records, _ = chunk_work(graph, 0, len(graph.nodes), plan, sizes, recompute=False, cached=cached)
        assert any(record.what == "cross-entropy of similarities" for record in records) is not cached


def test_nodes_and_losses_that_state_no_work_are_named():
    """They count by the number that stands for it."""
    config, _ = small("synapse-tiny", {})
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.models.graph import Kind, NodeCost
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.planner.costs import chunk_work, node_times

    sizes = ParallelSizes()
    assembly = Assembly.of(config, sizes)
    graph, plan = assembly.graph, assembly.plan
    nodes = list(graph.nodes)
    nodes[-1] = replace(nodes[-1], kind=Kind(nodes[-1].build, lambda plan: NodeCost(7, 1e6, 8.0)))
    silent = replace(graph, nodes=nodes, losses=[replace(loss, work=None) for loss in graph.losses])
    assert node_times(silent, plan, recompute=False)[-1] == 3e6
    names = chunk_work(silent, 0, len(nodes), plan, sizes, recompute=False)[1]
    assert names == [nodes[-1].name, *(loss.name for loss in graph.losses)]
