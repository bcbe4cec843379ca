"""The layout never changes the result, for each of the four systems: small recipes against one process.

Between them the layouts have tensor, sequence, pipeline, context and data parallelism, recomputation, the distributed
optimizer, overlapped reduction and gather, the phase of masked autoencoding, and negatives of the microbatch or of the
whole batch, as the full recipe has them. Bounds are those of test_layouts.py.
"""

import pytest

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from tests.support import one_process, recipes

pytestmark = pytest.mark.slow
SIZES = {"iterations": 2, "pool": 4, "global_batch": 16}
BATCH = {"embedding_size": 16, "negatives": "batch"}
CASES = {
    "avt": (
        lambda: recipes.small_avt(contrastive=BATCH),
        ("PP2", "TP2+SP+full", "CP2xDP2+distopt+reduce+gather", "CP2+a2a+selective"),
    ),
    "vlm": (recipes.small_vlm, ("TP2xPP2+SP+full", "CP2", "DP2+distopt+reduce+gather")),
    "vlm_mae": (lambda: recipes.small_vlm(phase="mae"), ("PP2+full", "DP2+distopt+reduce+gather")),
    "perceiver_fusion": (
        lambda: recipes.small_perceiver_fusion(contrastive=BATCH),
        ("PP2+full", "TP2", "DP2+distopt+reduce+gather"),
    ),
    "dual_encoder": (recipes.small_dual_encoder, ("PP2xDP2+reduce", "TP2+full", "CP2")),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Figures of one process by system, measured when first asked for."""
    found: dict[str, dict] = {}

    def measured(name: str) -> dict:
        if name not in found:
            found[name] = one_process.measured(CASES[name][0](), tmp_path_factory.mktemp(name), **SIZES)
        return found[name]

    return measured


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, (_, layouts) in CASES.items() for layout in layouts]
)
def test_layout_equals_one_process(reference, name, layout):
    layout = parse_layout(layout)
    result = compare(layout, launch(for_layout(CASES[name][0](), layout, **SIZES), layout), reference(name))
    assert result.passed, result


@pytest.mark.parametrize("name", CASES)
def test_every_weight_that_learns_is_compared(reference, name):
    one_process.assert_every_weight_is_compared(reference(name), CASES[name][0](), SIZES["iterations"])
