"""Every command of the README runs, in its order, in one folder; what takes long runs through its `--smoke` option."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: A command that is replaced by a shorter form of itself, or (None) is what runs this very test, or has one of its own.
SHORTER = {
    "examples/quickstart/run.sh": ["examples/quickstart/run.sh", "--smoke"],
    "tests/run.sh": None,
    **{f"examples/{name}/tiny.sh": None for name in ("avt_33b", "vlm_14b", "perceiver_fusion_xl", "dual_encoder")},
}
#: Options that make a command shorter.
SMALLER = {"tools/verify_layouts.py": ["--iterations", "2", "--global-batch-size", "4"]}


def commands() -> list[str]:
    """Lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """Outputs go to a temporary folder in place of `outputs/`, so that nothing of the user's is touched."""
    lines = commands()
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)
        if words[0] in SHORTER:
            if SHORTER[words[0]] is None:
                continue
            words = [*SHORTER[words[0]], "--output", "outputs/quickstart"]
        words = [str(tmp_path / word) if word.startswith("outputs/") else word for word in words]
        words += next((extra for name, extra in SMALLER.items() if name in words), [])
        if words[0] == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        elif words[0] == "python":
            words[0] = sys.executable
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # scripts call plain `python`
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:megatron_mm|tools|examples|tests|docs|models|pipeline|platform)/[\w./-]+)`", text):
        assert (ROOT / name).exists() or (ROOT / "megatron_mm" / name).exists(), name
