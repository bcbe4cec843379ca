"""Every script of the repository parses, and every launch script of a full recipe makes its dry run, phase by phase."""

import json
import os
import subprocess

import pytest

from megatron_mm.config.load import RECIPES, load_config, parse_command_line
from megatron_mm.config.validate import check, parallel_sizes
from tests.full_recipes import PHASES, ROOT, script, words

SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("examples", "tools", "tests", "benchmarks")
    for pattern in ("*.sh", "*.slurm")
    for path in (ROOT / folder).rglob(pattern)
)


def test_no_script_is_missed():
    assert len([path for path in SCRIPTS if path.name == "pretrain.sh"]) == 5
    assert len([path for path in SCRIPTS if path.name == "pretrain.slurm"]) == 5


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_bash_can_read_it(path):
    done = subprocess.run(["bash", "-n", ROOT / path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_what_a_script_launches_is_sound_at_its_number_of_gpus(name, phase):
    """The words of a real run, with what both phases may be started from."""
    world = load_config(RECIPES / f"{name}.yaml").parallel.world_size
    config = parse_command_line(words(name, PHASE=phase, INIT="a", LM="b", CLIP="c", OUTPUT="o"))
    check(config, parallel_sizes(config, world))
    assert not config.dry_run and config.parallel.world_size == world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_a_script_makes_its_dry_run(name, phase, tmp_path):
    """By the script itself, at the number of GPUs of its recipe: every stage, under 80 GB."""
    output = tmp_path / "dry.json"
    done = subprocess.run(
        [script(name), "--dry-run", "--dry-run-json", output],
        capture_output=True,
        text=True,
        env={**os.environ, "PHASE": phase},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result, wanted = json.loads(output.read_text()), load_config(RECIPES / f"{name}.yaml").parallel
    sizes = result["sizes"]
    assert sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"] == wanted.world_size
    assert len(result["stages"]) == sizes["pp"]
    assert max(stage["memory_bytes"] for stage in result["stages"]) < 80e9
