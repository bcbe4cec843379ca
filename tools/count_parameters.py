"""Parameters of recipes, part by part, from the nodes' own figures.

    python tools/count_parameters.py [--config RECIPE.yaml …] [--json FILE]

Without --config: every recipe that the package has. Counts are those of the whole model in the recipe's phase; a part
is what stands before the first number of a node's name (`decoder.layers.0` … are one part). Nothing is built.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.load import RECIPES, load_config
from megatron_mm.config.outputs import Kind, check_file, read_figures
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """What to count."""

    config: tuple[Path, ...] = ()
    """Recipes; none: all of the package's."""
    json: Path | None = None
    """File for the figures."""


def count(recipe: Path) -> dict[str, int]:
    """Parameters of each part of a recipe's model."""
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.planner.assembly import full_plan, layer_settings
    from megatron_mm.systems.graph import build_graph

    config = load_config(recipe)
    graph = build_graph(config.model, layer_settings(config, ParallelSizes(), "cpu"))
    plan = full_plan(config)
    parts: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        parts[re.split(r"\.\d", node.name)[0]] += node.cost(plan).parameters
    return dict(parts)


def _holds_counts(path: str) -> bool:
    return all(isinstance(n, int) for parts in read_figures(path).values() for n in parts.values())


def main() -> None:
    """Prints the parameters of each recipe."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from megatron_mm.platform.setup import apply_platform

    check_file(arguments.json, "--json", Kind("parameters of recipes as JSON", _holds_counts))
    apply_platform()
    figures = {}
    for recipe in arguments.config or sorted(RECIPES.glob("*.yaml")):
        parts = figures[recipe.stem] = count(recipe)
        print(f"{recipe.stem}: {sum(parts.values()):,}")
        for name, number in parts.items():
            if number:
                print(f"  {name:<28}{number:>16,}")
    write_figures(arguments.json, figures)


if __name__ == "__main__":
    run_tool(main, left="")
