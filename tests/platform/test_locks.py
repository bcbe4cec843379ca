"""locks/: each file is exact releases alone, within the bounds of setup.py; what renews them says what changed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_mm.platform.megatron_versions import KNOWN_RELEASES
from tests.support.programs import INTERPRETER
from tools import locks
from tools.requirements import requirements

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "locks"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FILES = sorted(path.name for path in LOCKS.iterdir())
#: Lock file, its Python and the extras of setup.py that it covers.
ENVIRONMENTS = [
    *((f"python-{release}.txt", release, ["test", "quickstart"]) for release in PYTHONS),
    ("lowest.txt", "3.11", ["test", "quickstart"]),
    ("docker.txt", "3.12", ["evaluation", "plot"]),
]


def releases(name: str) -> dict[str, str]:
    return locks.read_file(LOCKS / name)


def asked(python: str, extras: list[str]) -> list[Requirement]:
    """What setup.py asks for on this Python, torch apart."""
    found = [Requirement(line) for line in requirements(*extras)]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return [each for each in found if each.name != "torch" and (not each.marker or each.marker.evaluate(environment))]


def lowest_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    return bound


def test_the_files_are_those_of_every_environment():
    each = [f"{kind}-{release}.txt" for kind in ("python", "gpu-stack", "peers") for release in PYTHONS]
    each += ["releases-between.txt", "releases-oldest.txt"]
    assert sorted([*each, "docker.txt", "lowest.txt", "torch.txt"]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_sorted_lines_of_name_and_version(name):
    lines = (LOCKS / name).read_text().splitlines()
    for line in lines:
        pinned, version = line.split("==")
        assert pinned == canonicalize_name(pinned) and str(Version(version)) == version
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", [name for name in FILES if name != "torch.txt"])
def test_torch_and_what_its_builds_bring_are_in_no_file_but_their_own(name):
    brought = [each for each in releases(name) if re.match(r"(torch|triton|nvidia-|cuda-|pytorch)", each)]
    assert brought == (["triton"] if name.startswith("gpu-stack") else [])
    assert list(releases("torch.txt")) == ["torch"]


@pytest.mark.parametrize(("name", "python", "extras"), ENVIRONMENTS)
def test_a_lock_holds_what_setup_py_asks_for(name, python, extras):
    pinned = releases(name)
    wanted = asked(python, extras)
    assert {"transformers", "megatron-core", "backports.zstd"} <= {each.name for each in wanted}
    for requirement in wanted:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version}"
    backend = Requirement(re.search(r'^requires = \["(.+?)"\]', (ROOT / "pyproject.toml").read_text(), re.M)[1])
    assert backend.specifier.contains(pinned[backend.name])


def test_torch_is_within_bounds():
    (torch,) = (Requirement(line) for line in requirements() if Requirement(line).name == "torch")
    assert torch.specifier.contains(releases("torch.txt")["torch"])


def test_every_requirement_has_a_lower_bound_and_lowest_holds_it():
    pinned = releases("lowest.txt")
    for requirement in asked("3.11", ["test", "quickstart"]):
        assert Version(pinned[canonicalize_name(requirement.name)]) == lowest_bound(requirement), requirement
    for extra in ("gpu", "wandb"):
        assert all(lowest_bound(requirement) for requirement in asked("3.11", [extra]))


@pytest.mark.parametrize(("python", "core"), zip(PYTHONS, ("0.16", "0.16", "0.19", "0.19"), strict=True))
def test_megatron_core_is_the_release_that_is_known_on_each_python(python, core):
    assert releases(f"python-{python}.txt")["megatron-core"] == KNOWN_RELEASES[core]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_stack_lies_over_the_packages_of_its_python(python):
    over, under = releases(f"gpu-stack-{python}.txt"), releases(f"python-{python}.txt")
    assert not over.keys() & under.keys()
    # stand_in.py has the enumerations of this release's compiled module.
    assert (over["transformer-engine"], over["flash-attn"]) == ("2.20.2", "2.8.3")
    assert {"onnxscript", "einops", "nvdlfw-inspect", "triton"} <= over.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_peers_are_those_that_the_benchmark_names(python):
    pinned = releases(f"peers-{python}.txt")
    assert (pinned["webdataset"], pinned["megatron-energon"]) == ("1.0.2", "7.4.1") and "pillow" in pinned


@pytest.mark.parametrize("line", ["a>=1", "a==1; python_version<'3.12'", "a==1 --hash=b", "-r other", "a @ b", "# a"])
def test_what_is_no_lock_is_refused_by_line(line):
    with pytest.raises(locks.LockError, match=r"^here, line 2: .* is not name==version"):
        locks.read(["b==1.0", line], "here")
    with pytest.raises(locks.LockError, match=r"^here, line 2: a-b is named twice"):
        locks.read(["a-b==1.0", "A_b==1.0"], "here")


def run(*words: str, given: str = "") -> str:
    command = [INTERPRETER, "tools/locks.py", *words]
    return subprocess.run(command, input=given, capture_output=True, encoding="utf-8", cwd=ROOT, check=True).stdout


def test_clean_leaves_out_torch_and_another_lock_and_sorts(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("shared==1.0\nb==1.9\n")
    resolved = "b==2.0\nA==1.0\nshared==1.0\ntorch==2.0\ntriton==3.0\nnvidia-nccl-cu13==2.0\ncuda-toolkit==13.0\n"
    assert run("clean", given=resolved) == "a==1.0\nb==2.0\nshared==1.0\n"
    assert run("clean", "--keep", "triton", "--without", str(other), given=resolved) == "a==1.0\nb==2.0\ntriton==3.0\n"


def test_changes_are_printed_old_to_new(tmp_path):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("a==1.0\nb==1.0\nc==1.0\n")
    new.write_text("a==1.0\nc==1.1\nd==1.0\n")
    assert run("changes", str(old), str(new)).splitlines() == [
        f"{old}: 3 changes",
        "    b 1.0 (removed)",
        "    c 1.0 -> 1.1",
        "    d 1.0 (added)",
    ]
    assert run("changes", str(old), str(old)) == f"{old}: no changes\n"


def test_what_is_installed_is_compared_with_a_lock(tmp_path):
    lock = tmp_path / "lock.txt"
    present = dict(line.split()[:2] for line in run("installed", os.devnull).splitlines()[1:])
    assert {"pytest", "numpy"} <= present.keys() and not {"torch", "pip", "megatron-mm"} & present.keys()
    lines = [f"{name}=={version}" for name, version in present.items() if name not in ("pytest", "numpy")]
    lock.write_text("\n".join([*lines, "numpy==1.0", "not-there==1.0"]))
    assert run("installed", str(lock)).splitlines() == [
        f"{lock} -> installed: 3 changes",
        "    not-there 1.0 (removed)",
        f"    numpy 1.0 -> {present['numpy']}",
        f"    pytest {present['pytest']} (added)",
    ]


#: Stands in for uv: notes its words, and resolves to what it was asked for, in release 9.0, and a library of torch's.
RESOLVER = """#!/usr/bin/env bash
echo "$*" >>{notes}
if [ -e {broken} ]; then echo "no solution found" >&2; exit 1; fi
sed -E 's/^([A-Za-z0-9._-]+)==([0-9.]+)$/\\1==\\2/; t; s/^([A-Za-z0-9._-]+).*/\\1==9.0/' | awk -F== '!seen[$1]++'
echo nvidia-nccl-cu13==2.0
"""


@pytest.fixture
def update(tmp_path):
    """Runs a copy of update_locks.sh with a stand-in for its resolver. Returns exit status and what it said."""
    for name in ("locks", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    wanted = re.search(r'^resolver=(\S+) wanted="(.+)"$', (ROOT / "tools" / "update_locks.sh").read_text(), re.M)
    binaries = tmp_path / wanted[1] / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / wanted[1] / "installed").write_text(wanted[2] + "\n")
    (binaries / "python").symlink_to(INTERPRETER)
    (binaries / "uv").write_text(RESOLVER.format(notes=tmp_path / "notes", broken=tmp_path / "broken"))
    (binaries / "uv").chmod(0o755)

    def run_script(*words: str) -> tuple[int, str]:
        command = [str(tmp_path / "tools" / "update_locks.sh"), *words]
        # Not through the link, which would be taken for an environment of its own without setuptools.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run_script


@pytest.mark.slow
def test_update_writes_every_file_says_what_changed_and_what_must_pass(update, tmp_path):
    before = releases("python-3.12.txt")["numpy"]
    status, said = update("--dry-run")
    assert status == 0, said
    assert f"    numpy {before} -> 9.0" in said and "must pass" not in said
    assert locks.read_file(tmp_path / "locks" / "python-3.12.txt")["numpy"] == before
    (tmp_path / "notes").unlink()

    status, said = update()
    assert status == 0
    files = re.findall(r"^(locks/\S+): \d+ changes?$", said, re.M)
    assert files == sorted(f"locks/{name}" for name in FILES if name != "torch.txt")
    of_3_12 = said.split("locks/python-3.12.txt:")[1].split("locks/python-3.13.txt:")[0]
    assert f"    numpy {before} -> 9.0\n" in of_3_12
    for words in ("tests/run.sh --newest", "tests/run.sh --lowest", "tests/releases/run.sh", "benchmarks/data.py"):
        assert words in said.split("What must pass before this is committed:")[1]
    written = locks.read_file(tmp_path / "locks" / "python-3.12.txt")
    assert written["numpy"] == "9.0" and not {"torch", "nvidia-nccl-cu13"} & written.keys()
    assert locks.read_file(tmp_path / "locks" / "docker.txt")["megatron-core"] == "0.16.1"
    calls = (tmp_path / "notes").read_text().splitlines()
    assert {re.search(r"--python-version (\S+)", call)[1] for call in calls} == set(PYTHONS)
    assert sum("--resolution lowest-direct" in call for call in calls) == 1

    status, said = update()
    assert status == 0 and re.findall(r": (\w+) changes", said) == ["no"] * len(files)


def test_update_that_fails_writes_nothing(update, tmp_path):
    (tmp_path / "broken").touch()
    status, said = update()
    assert status != 0 and "no solution found" in said and "must pass" not in said
    for name in FILES:
        assert (tmp_path / "locks" / name).read_bytes() == (LOCKS / name).read_bytes()
    assert update("--other")[0] == 2


def peers(folder: Path, tmp_path: Path, minor: int) -> subprocess.CompletedProcess:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] && echo 3.{minor} || exit 9\n")
    python.chmod(0o755)
    command = [str(ROOT / "benchmarks" / "peers.sh"), str(folder)]
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)


def test_peers_are_not_installed_over_something_else(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "work.txt").touch()
    done = peers(folder, tmp_path, 11)
    assert done.returncode == 2 and f"{folder} is not empty and was not made by the scripts here" in done.stderr
    assert (folder / "work.txt").exists()
    done = peers(tmp_path / "new", tmp_path, 14)
    assert done.returncode == 1 and "is Python 3.14, for which there is no locks/peers-3.14.txt" in done.stderr
    done = peers(tmp_path / "new", tmp_path, 11)
    assert done.returncode == 9 and "the releases of locks/peers-3.11.txt" in done.stdout
