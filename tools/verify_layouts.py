"""Shows that the layout does not change the result: trains a recipe in each layout and compares with one process.

    python tools/verify_layouts.py --config megatron_mm/recipes/synapse-tiny.yaml
    python tools/verify_layouts.py --config … --layouts TP2xPP2+SP DP4+distopt --iterations 10

Rows are generated (random tokens, images and sounds; some samples without, some with several), so no corpus is needed.
Passes if every step's loss agrees to 1e-5 and every parameter's gradient to 1e-4, relative, in fp32.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.checks.layouts import (
    DEFAULT_LAYOUTS,
    Comparison,
    compare,
    for_layout,
    launch,
    notes,
    parse_layout,
    to_json,
)
from megatron_mm.config.load import load_config
from megatron_mm.config.outputs import UsageError, check_file, figures
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """Compares layouts with one process."""

    config: Path
    """Recipe (YAML)."""
    layouts: list[str] = field(default_factory=lambda: list(DEFAULT_LAYOUTS))
    """Layouts, such as TP2xCP2xPP2+SP or TP2xPP2xDP2+SP+distopt+full."""
    iterations: int = 10
    """Training steps in each."""
    pool: int = 4
    """Samples of a microbatch over all data-parallel processes."""
    global_batch_size: int = 16
    """Samples of a step."""
    json: Path | None = None
    """Also write the table to this file."""


def main() -> int:
    """Prints a table; 1 if a layout fails."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        check_file(arguments.json, "--json", figures("layout", "passed"))
        config = load_config(arguments.config)
        layouts = [parse_layout(name) for name in arguments.layouts]
        sizes = (arguments.iterations, arguments.pool, arguments.global_batch_size)
        configs = [for_layout(config, layout, *sizes) for layout in layouts]
        one = parse_layout("DP1")
        began = time.monotonic()
        reference = launch(for_layout(config, one, *sizes), one)
    except ValueError as error:  # before there is anything to compare, what was asked for is wrong
        raise UsageError(str(error)) from error
    print(f"one process: loss {reference['losses'][0]:.6f} → {reference['losses'][-1]:.6f} in {sizes[0]} steps, "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    print(f"{'layout':34} {'processes':>9} {'loss':>9} {'gradient':>9}  worst parameter", flush=True)
    comparisons = []
    for layout, changed in zip(layouts, configs):
        try:
            result = compare(layout, launch(changed, layout), reference)
        except ValueError as error:
            result = Comparison(layout.name, layout.world_size, float("nan"), float("nan"), "", str(error))
        result = replace(result, notes=notes(changed, layout))
        comparisons.append(result)
        verdict = "pass" if result.passed else "FAIL"
        print(f"{result.layout:34} {result.processes:9} {result.loss:9.1e} {result.gradient:9.1e}  {result.parameter} "
              f"{verdict}{': ' + result.error if result.error else ''}", flush=True)  # fmt: skip
        for note in result.notes:
            print(f"  {note}", flush=True)
    write_figures(arguments.json, to_json(comparisons))
    failed = [result.layout for result in comparisons if not result.passed]
    print(f"{len(comparisons) - len(failed)} of {len(comparisons)} layouts agree with one process "
          f"({time.monotonic() - began:.0f} s)")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main, left="")
