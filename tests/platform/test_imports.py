"""What is imported when: `--help` answers without megatron-core, and media need nothing of the package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import INTERPRETER

ROOT = Path(__file__).resolve().parents[2]
#: Prints the modules that a program has imported when it has printed its help.
HELP = """
import contextlib, io, json, os, runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # as Python has it of a program
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps(sorted(sys.modules)))
"""
PROGRAMS = ["pretrain_multimodal.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))]
PROGRAMS = [program for program in PROGRAMS if "megatron_mm" in (ROOT / program).read_text()]


def imported(*words: str) -> set[str]:
    done = subprocess.run([INTERPRETER, "-c", *words], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_megatron_core(program):
    modules = imported(HELP, program)
    assert "tyro" in modules
    assert not {name for name in modules if name.partition(".")[0] in ("megatron", "transformers")}


@pytest.mark.slow
def test_what_reads_a_graph_leaves_megatron_core_to_the_platform():
    """The platform redirects it and silences its notices, so that it comes first."""
    rooms = ("config", "conversion", "evaluation", "generation")
    names = [f"{room}.{path.stem}" for room in rooms for path in sorted((ROOT / "megatron_mm" / room).glob("*.py"))]
    names = [name for name in names if not name.endswith(".__init__")]
    assert len(names) > 15
    lines = [f"import megatron_mm.{name}" for name in ("models.graph", *names)]
    modules = imported("\n".join(["import json, sys", *lines, "print(json.dumps(sorted(sys.modules)))"]))
    assert "torch" in modules and not {name for name in modules if name.startswith("megatron.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoding", "encoding", "errors", "files", "transforms"])
def test_media_need_nothing_of_the_package(name):
    modules = imported(f"import json, sys, megatron_mm.media.{name}; print(json.dumps(sorted(sys.modules)))")
    own = {module for module in modules if module.startswith("megatron_mm.")}
    assert own <= {"megatron_mm.media", *(f"megatron_mm.media.{n}" for n in ("decoding", "encoding", "errors", name))}
    assert ("torch" in modules) == (name == "transforms")
    assert not {"av", "soundfile", "soxr", "simplejpeg"} & modules
