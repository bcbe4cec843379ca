"""Frozen nodes with tied weights: no copy learns, on whichever stage it is. Truth is one process.

The head of captions and of masked text is the text embedding; the layers of Transformer-XL share u and v. The cut lies
between the first two layers, so both are shared over stages.
"""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checks.layouts import for_layout, parse_layout
from megatron_mm.config.schema import NodeGroupConfig
from megatron_mm.config.section import changed
from megatron_mm.config.validate import parallel_sizes
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training.optimizer import Optimizer
from tests.support import recipes
from tests.support.programs import TORCHRUN

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = {
    "dual_encoder": (recipes.small_dual_encoder, "fusion.output"),
    "perceiver_fusion": (recipes.small_perceiver_fusion, "masked_lm.output"),
}


def config_of(system: str, layout: str, *frozen: str):
    config = for_layout(SYSTEMS[system][0](), parse_layout(layout), iterations=3, pool=4, global_batch=8)
    return changed(config, {"optimizer.groups": [NodeGroupConfig(nodes=list(frozen), frozen_iters=-1)]})


def learn(system: str, layout: str) -> dict:
    """Two steps with the text encoder and the head frozen: losses, and what of all stages moved and did not."""
    config = config_of(system, layout, "text.*", SYSTEMS[system][1])
    sizes = parallel_sizes(config, setup.world_size())
    config = changed(config, {"parallel.pipeline_cuts": ["text.layers.1"] if sizes.pp > 1 else None})
    pipeline = Assembly.of(config, sizes).build(setup.initialize(sizes, seed=1), seed=3)
    optimizer, rows = Optimizer(config, pipeline), GeneratedRows(config)

    def weights() -> dict[str, torch.Tensor]:
        return {
            f"{node.name}.{name}": parameter.detach().clone()
            for chunk in pipeline.bare_chunks
            for node, module in zip(chunk.nodes, chunk.node_modules)
            for name, parameter in module.named_parameters()
        }

    before, losses = weights(), []
    for step in range(2):
        optimizer.zero_grad()
        first = 8 * step
        batches = [rows.microbatch(range(at, at + 4), pipeline.fields()) for at in (first, first + 4)]
        losses.append(run_batch(pipeline, batches).total)
        optimizer.step(optimizer.gradient_norm(), 8)
    after = weights()
    own = {name: bool((before[name] != after[name]).any()) for name in before}
    stages: list = [None] * sizes.world
    dist.all_gather_object(stages, own)
    return {"losses": losses, "stages": stages}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_frozen_encoder_needs_its_head_frozen(system):
    """A head that would drift from its embedding is refused by name."""
    setup.apply_platform()
    config, head = config_of(system, "DP1", "text.*"), SYSTEMS[system][1]
    message = rf"'{head}' and 'text\.embedding' share .* the same frozen_iters; they have 0 and -1"
    with pytest.raises(ValueError, match=message):
        Assembly.of(config, parallel_sizes(config, 1))
    config = config_of(system, "DP1", "text.layers.*")  # u and v among themselves
    Assembly.of(config, parallel_sizes(config, 1))


@pytest.mark.slow
def test_no_copy_of_a_frozen_weight_moves(tmp_path):
    output = tmp_path / "learned.json"
    words = [*TORCHRUN, "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [*words, "-m", "tests.training.test_frozen_ties", str(output)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for system, found in json.loads(output.read_text()).items():
        one = learn(system, "DP1")
        (expected,) = one["stages"]
        first, second = found["stages"]
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5) and one["losses"][0] != one["losses"][1]
        assert first | second == expected and not first.keys() & second.keys()
        head = f"{SYSTEMS[system][1]}.output_layer.weight"
        assert "text.embedding.word_embeddings.weight" in first and head in second
        assert ("text.layers.0.self_attention.u" in first) is (system == "perceiver_fusion")
        frozen = {name for name in expected if fnmatchcase(name, "text.*") or name.startswith(SYSTEMS[system][1])}
        assert head in frozen and not any(expected[name] for name in frozen)
        assert sum(expected[name] for name in expected.keys() - frozen) > 40


if __name__ == "__main__":
    results = {system: learn(system, "PP2") for system in SYSTEMS}
    if setup.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    setup.shutdown()
