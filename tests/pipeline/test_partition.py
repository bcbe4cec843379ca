"""Cuts against exhaustive search, and the user's own cut."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from megatron_mm.config.load import RECIPES, load_config
from megatron_mm.config.section import changed
from megatron_mm.config.validate import parallel_sizes
from megatron_mm.models.graph import Graph, Kind, Node, NodeCost, Stream
from megatron_mm.pipeline.partition import balance, bottleneck, cuts_by_name
from tests.support.balance import slowest, slowest_over_mean


def exhaustive(costs, chunks) -> float:
    count = len(costs)
    return min(slowest(costs, (0, *middle, count)) for middle in combinations(range(1, count), chunks - 1))


@pytest.mark.parametrize("seed", range(20))
def test_the_slowest_chunk_is_the_best_possible(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = (torch.rand(11, generator=generator) ** 3).tolist()
    for chunks in (1, 2, 3, 4, 8):
        cuts = balance(costs, chunks)
        assert len(cuts) == chunks + 1 and all(low < high for low, high in pairwise(cuts))
        assert slowest(costs, cuts) == pytest.approx(exhaustive(costs, chunks), rel=1e-9)


def test_memory_limits_move_the_cut():
    costs = [1.0] * 6
    assert balance(costs, 2) == [0, 3, 6]
    assert balance(costs, 2, fits=lambda chunk, low, high: chunk > 0 or high - low <= 2) == [0, 2, 6]
    with pytest.raises(ValueError, match="no cut into 2 chunks fits"):
        balance(costs, 2, fits=lambda chunk, low, high: high - low <= 2)


def test_more_chunks_than_nodes_is_refused():
    with pytest.raises(ValueError, match="3 nodes cannot fill 4 pipeline chunks"):
        balance([1, 1, 1], 4)


def test_synapse_70b_is_cut_as_well_as_whole_nodes_allow():
    """No cut into 8 keeps every chunk faster (an independent feasibility test), and it is within 1.10 x the mean."""
    pytest.importorskip("megatron.core")
    from megatron_mm.platform import setup

    setup.apply_platform()
    from megatron_mm.planner.assembly import Assembly

    config = load_config(RECIPES / "synapse-70b.yaml")
    sizes = parallel_sizes(config, 256)
    assembly = Assembly.of(config, sizes)
    times, cuts = assembly.times, assembly.cuts
    assert slowest_over_mean(times, cuts) <= 1.10
    assert not can_do_better(times, 8, slowest(times, cuts) * (1 - 1e-9))


@pytest.mark.slow
def test_a_memory_limit_in_the_recipe_moves_the_cut_or_is_refused():
    """The balanced cut's first stage holds most (towers, embedding, eight microbatches in flight)."""
    pytest.importorskip("megatron.core")
    from megatron_mm.platform import setup

    setup.apply_platform()
    from megatron_mm.planner.assembly import Assembly

    config = load_config(RECIPES / "synapse-70b.yaml")
    sizes = parallel_sizes(config, 256)
    memory = Assembly.of(config, sizes).memory

    def held(cuts) -> list[float]:
        return [memory(chunk, *cuts[chunk : chunk + 2]) / 2**30 for chunk in range(sizes.chunks)]

    free = Assembly.of(config, sizes).cuts
    config = changed(config, {"parallel.memory_limit_gb": max(held(free)) * 0.95})
    bound = Assembly.of(config, sizes).cuts
    assert bound != free and max(held(bound)) <= config.parallel.memory_limit_gb
    config = changed(config, {"parallel.memory_limit_gb": max(held(free)) * 0.5})
    with pytest.raises(ValueError, match=r"parallel\.memory_limit_gb is .*: no cut into 8 chunks keeps it"):
        _ = Assembly.of(config, sizes).cuts


def can_do_better(times, chunks, limit) -> bool:
    """Whether some contiguous cut keeps every chunk under the limit: filling greedily is optimal for that question."""
    used, load = 1, 0.0
    for time in times:
        if time > limit:
            return False
        if load + time > limit:
            used, load = used + 1, 0.0
        load += time
    return used <= chunks


def test_the_bottleneck_is_explained():
    text = bottleneck(["a", "b", "c"], [1.0, 3.0, 1.0], [0, 1, 3])
    assert "chunk 1 (b … c) takes 1.600 x the mean" in text and "b in chunk 0 would make that 1.600" in text


def named_graph() -> Graph:
    x = Stream("x", lambda plan: (1,))
    nodes = [Node(name, Kind(nn.Identity, lambda plan: NodeCost(1)), (), (x,)) for name in "abcd"]
    return Graph(nodes, [])


def test_the_users_cut():
    assert cuts_by_name(named_graph(), ["b", "d"], 3) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="names 1 nodes; 3 chunks need 2"):
        cuts_by_name(named_graph(), ["b"], 3)
    with pytest.raises(ValueError, match="there is no node 'z'; the nodes are a, b, c, d"):
        cuts_by_name(named_graph(), ["b", "z"], 3)
    with pytest.raises(ValueError, match="must follow the order"):
        cuts_by_name(named_graph(), ["d", "b"], 3)
