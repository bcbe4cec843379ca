"""Checkpoints of one backend loaded by the other, at tiny size: every weight must be the same to the last bit.

    python -m tests.gpu_stack.checkpoints [--recipes synapse-tiny …]

One process with real weights on the CPU. The first model is initialised by its seed, the second by none; both then say
what they hold by checkpoint key. So is the seeded initialisation itself: both backends must draw the same weights.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tests.gpu_stack import stand_in

stand_in.install()

import torch  # noqa: E402
import tyro  # noqa: E402

from megatron_mm.checkpoints import checkpoint  # noqa: E402
from megatron_mm.checkpoints.save import save  # noqa: E402
from megatron_mm.config.load import load_config  # noqa: E402
from megatron_mm.config.schema import Config  # noqa: E402
from megatron_mm.config.section import changed  # noqa: E402
from megatron_mm.config.sizes import ParallelSizes  # noqa: E402
from megatron_mm.pipeline.schedule import Pipeline  # noqa: E402
from megatron_mm.planner.assembly import Assembly  # noqa: E402
from megatron_mm.platform import setup  # noqa: E402
from megatron_mm.training.optimizer import Optimizer  # noqa: E402

RECIPES = Path(__file__).resolve().parents[2] / "megatron_mm" / "recipes"
BACKENDS = ("local", "transformer_engine")


@dataclass
class Arguments:
    """What to compare."""

    recipes: tuple[str, ...] = tuple(sorted(path.stem for path in RECIPES.glob("*-tiny.yaml")))
    """Tiny recipes."""


def model(config: Config, backend: str, seed: int | None) -> Pipeline:
    """The whole model on the CPU."""
    config = replace(config, model=replace(config.model, backend=backend))
    with stand_in.cuda_available():
        return Assembly.of(config, ParallelSizes()).build(torch.device("cpu"), seed)


def weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """What a model holds, by checkpoint key."""
    return {weight.key: weight.parameter.detach().clone() for weight in checkpoint.weights_of(pipeline)}


def differing(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Keys that only one has, or that differ."""
    keys = wanted.keys() & found.keys()
    return sorted(wanted.keys() ^ found.keys()) + sorted(
        key for key in keys if not torch.equal(wanted[key], found[key])
    )


def compare(config: Config) -> tuple[int, list[str]]:
    """Weights of a recipe, and what differs after either way."""
    problems, drawn = [], {}
    for backend, other in (BACKENDS, BACKENDS[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            first = model(config, backend, config.training.seed)
            drawn[backend] = weights(first)
            saved = save(config, Path(folder), first, Optimizer(config, first), checkpoint.Position())
            second = model(config, other, None)
            checkpoint.load_weights(saved, second)
            problems += [f"{backend} to {other}: {key}" for key in differing(drawn[backend], weights(second))]
    problems += [f"initial weights: {key}" for key in differing(*drawn.values())]
    return len(drawn["local"]), problems


def main() -> int:
    """Compares and prints counts."""
    arguments = tyro.cli(Arguments, description=__doc__)
    setup.initialize(ParallelSizes(), seed=1)
    failed, total = False, 0
    for name in arguments.recipes:
        config = changed(load_config(RECIPES / f"{name}.yaml"), {"data.tokenizer": None})
        count, problems = compare(config)
        total += 2 * count
        failed |= bool(problems) or not count
        print(f"{name:22} {count:4} weights, saved and loaded both ways: {len(problems)} differ", flush=True)
        for problem in problems[:20]:
            print(f"    {problem}", flush=True)
    print(f"{total} weights compared: {'DIFFERENCES' if failed else 'all equal'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
