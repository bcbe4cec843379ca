"""Every script of the repository parses, and every launch script of a full recipe makes its dry run, phase by phase."""

import subprocess

import pytest

from megatron_mm.config.load import RECIPES, load_config, parse_command_line
from megatron_mm.config.validate import check, parallel_sizes
from tests.support.full_recipes import PHASES, ROOT, dry_run, estimates, launched, words

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
    done = subprocess.run(["bash", "-n", ROOT / path], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_what_a_script_launches_is_sound_at_its_number_of_gpus(name, phase):
    """The words of a real run, with what both phases may be started from."""
    world = load_config(RECIPES / f"{name}.yaml").parallel.world_size
    config, verbs = parse_command_line(words(name, PHASE=phase, INIT="a", LM="b", CLIP="c", OUTPUT="o"))
    check(config, parallel_sizes(config, world))
    assert not verbs.dry_run and config.parallel.world_size == world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase"), [of for of in PHASES if of[0] != "synapse-70b"])  # planner/test_dry_run.py
def test_a_script_makes_its_dry_run(name, phase, tmp_path):
    """By the script itself, at the number of GPUs of its recipe: every stage, under 80 GB, near the estimate."""
    result = dry_run(name, phase, tmp_path / "dry.json")
    config, sizes = launched(name, phase)
    found = result["sizes"]
    assert found["tp"] * found["pp"] * found["cp"] * found["dp"] == config.parallel.world_size
    memory = [stage["memory_bytes"] for stage in result["stages"]]
    assert max(memory) < 80e9
    assert memory == pytest.approx(estimates(config, sizes), rel=0.15)
