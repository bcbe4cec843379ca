"""The Dockerfile as far as it goes without Docker: what it names exists, and its last lines test what was built."""

import ast
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

from megatron_mm.config.load import parse_command_line
from megatron_mm.config.validate import check, parallel_sizes
from megatron_mm.platform import megatron_versions, setup
from tools import locks

ROOT = Path(__file__).resolve().parent.parent
#: What only the image has.
COMPILED = {"transformer_engine", "flash_attn", "apex"}


def instructions() -> list[tuple[str, str]]:
    """Instruction and its words, of each; comments and line breaks are gone."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_and_is_the_only_one():
    images = [words for name, words in instructions() if name == "FROM"]
    assert len(images) == 1 and re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", images[0])


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, words in instructions():
        if name == "COPY":
            for source in shlex.split(words)[:-1]:
                assert (ROOT / source).exists() and source not in ignored, source
    assert {".git", "outputs", ".venv*"} <= set(ignored)


def pip_lines() -> list[list[str]]:
    """Words of each pip install."""
    lines = [shlex.split(words) for name, words in instructions() if name == "RUN"]
    return [line for line in lines if line[:2] == ["pip", "install"]]


def test_what_is_installed_is_the_lock_and_this_package_with_nothing_looked_for():
    lock, package = pip_lines()
    assert all("--no-deps" in line for line in (lock, package))
    assert lock[lock.index("--requirement") + 1] == "locks/docker.txt"
    # Without its own environment for building, which would fetch a setuptools that nobody pinned.
    assert package[-1] == "." and "--no-build-isolation" in package
    assert sum("pip install" in words for name, words in instructions() if name == "RUN") == 2


def test_the_lock_leaves_what_the_image_compiled_as_it_is():
    pinned = locks.read_file(ROOT / "locks" / "docker.txt")
    compiled = {name.replace("_", "-") for name in COMPILED} | {"torch", "triton", "pytorch-triton", "flash-attn"}
    assert not compiled & pinned.keys()
    assert "setuptools" in pinned  # builds the package


def test_megatron_core_is_the_release_that_the_image_was_chosen_for():
    release = locks.read_file(ROOT / "locks" / "docker.txt")["megatron-core"]
    assert release in megatron_versions.KNOWN_RELEASES.values()
    assert f"megatron-core {release} is tested" in (ROOT / "Dockerfile").read_text()


def test_shell_lines_parse():
    for name, words in instructions():
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", words], check=True)


def test_the_last_lines_import_what_was_compiled_and_dry_run_a_full_recipe():
    import_line, dry_run = [shlex.split(words) for name, words in instructions() if name == "RUN"][-2:]
    assert import_line[:2] == ["python", "-c"]
    tree = ast.parse(" ".join(import_line[2].split()))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in names} >= COMPILED
    for name in names:
        assert name.partition(".")[0] in COMPILED or importlib.util.find_spec(name), name
    assert dry_run[:2] == ["python", "pretrain_multimodal.py"]
    setup.apply_platform()
    config, verbs = parse_command_line(dry_run[2:])
    assert verbs.dry_run
    check(config, parallel_sizes(config, config.parallel.world_size))
