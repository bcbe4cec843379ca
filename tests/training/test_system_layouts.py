"""The layout never changes the result, for each of the four systems: small recipes against one process.

Between them the layouts have tensor, sequence, pipeline, context and data parallelism, recomputation, the distributed
optimizer, and negatives of the microbatch and of the whole batch. Bounds are those of test_layouts.py.
"""

import pytest

from megatron_mm.training.layouts import compare, for_layout, launch, parse_layout
from tests import recipes

pytestmark = pytest.mark.slow
SIZES = {"iterations": 2, "pool": 4, "global_batch": 16}
BATCH = {"embedding_size": 16, "negatives": "batch"}
CASES = {
    "avt": (lambda: recipes.small_avt(contrastive=BATCH), ("PP2", "TP2+SP+full", "CP2xDP2+distopt")),
    "vlm": (recipes.small_vlm, ("TP2xPP2+SP+full", "CP2", "DP2+distopt")),
    "perceiver_fusion": (recipes.small_perceiver_fusion, ("PP2+full", "TP2", "DP2+distopt")),
    "dual_encoder": (lambda: recipes.small_dual_encoder(contrastive=BATCH), ("PP2xDP2", "TP2+full", "CP2")),
}


@pytest.fixture(scope="module")
def one_process():
    """Figures of one process by system, measured when first asked for."""
    found: dict[str, dict] = {}

    def measured(name: str) -> dict:
        if name not in found:
            one = parse_layout("DP1")
            found[name] = launch(for_layout(CASES[name][0](), one, **SIZES), one)
        return found[name]

    return measured


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, (_, layouts) in CASES.items() for layout in layouts]
)
def test_layout_equals_one_process(one_process, name, layout):
    layout, reference = parse_layout(layout), one_process(name)
    result = compare(layout, launch(for_layout(CASES[name][0](), layout, **SIZES), layout), reference)
    assert result.passed, result
    assert len(reference["gradients"]) > 2 * 40  # every parameter, at two steps
