"""The example of a system of one's own: layer, objective and dataset work in any layout, from outside the package."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.checks.layouts import compare, for_layout, launch, parse_layout
from megatron_mm.config.load import load_config

RECIPE = Path(__file__).parents[2] / "examples" / "own_system" / "byte-mixer.yaml"


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
