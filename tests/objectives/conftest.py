"""Every test of objectives runs in a process group of one, with megatron-core's groups of size 1."""

import pytest

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import setup


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)


@pytest.fixture(scope="session")
def in_four_processes(tmp_path_factory):
    """Steps of the objectives in layouts of four processes, by (case, layout)."""
    from tests.support.graph_layouts import steps_in_processes

    runs = [
        ("contrastive", "DP4", 8),
        ("contrastive", "DP2xPP2", 8),
        ("contrastive_over_batch", "DP4", 8),
        ("contrastive_over_batch", "DP2xPP2", 4),
        ("contrastive_over_batch", "CP2xDP2", 4),
        ("matching", "DP4", 8),
        ("matching", "CP2xDP2", 8),
    ]
    wanted = [(f"tests.objectives.cases:{case}", layout, pool, 16) for case, layout, pool in runs]
    results = steps_in_processes(wanted, tmp_path_factory.mktemp("objectives"))
    return {(case, layout): result for (case, layout, _), result in zip(runs, results, strict=True)}
