"""tools/pip_install.sh and tools/half_installed.py with pip itself, a wheel made here and no network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.programs import INTERPRETER
from tools.half_installed import forget, is_complete

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheels(tmp_path) -> Path:
    """A folder with the wheel of a package `tiny` 1.0, which has a module and a script."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {
        "tiny/__init__.py": "number = 1\n",
        "tiny/more.py": "number = 2\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    files["tiny-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files) + "tiny-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return folder


def install(what: str, *words: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "tools" / "pip_install.sh"), INTERPRETER, what, "--isolated", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture
def site(tmp_path, wheels) -> Path:
    """The site-packages of an environment in which pip installed `tiny`."""
    done = install("tiny", "--no-index", "--find-links", str(wheels), "--prefix", str(tmp_path / "env"), "tiny==1.0")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (folder,) = (tmp_path / "env").glob("lib/python*/site-packages")
    return folder


@pytest.mark.slow
def test_a_release_that_is_not_there_is_named(wheels, tmp_path):
    offline = ["--no-index", "--find-links", str(wheels), "--target", str(tmp_path / "site")]
    version = f"Python {sys.version.split()[0]}"
    done = install("what some.txt names", *offline, "tiny==2.0")
    line = f"error: could not install what some.txt names: the package index has no tiny==2.0 for {version}"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == line
    last = install("it", *offline, "other==1.0").stderr.splitlines()[-1]
    assert last.endswith(f"the package index could not be reached, or has no other==1.0 for {version}")


def test_an_index_that_does_not_answer_is_told_from_one_that_lacks_it(tmp_path):
    # Port 9 of this machine: nothing listens there.
    words = ["--index-url", "http://127.0.0.1:9/simple", "--retries", "1", "--target", str(tmp_path / "site")]
    done = install("tiny (locks/some.txt)", *words, "tiny==1.0")
    line = "error: could not install tiny (locks/some.txt): the package index could not be reached"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == line
    assert "Connection refused" in done.stderr  # pip's own words are not hidden


def test_another_failure_is_left_to_pip(tmp_path):
    done = install("it", "--no-index", "--target", str(tmp_path / "site"), "--requirement", str(tmp_path / "none.txt"))
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: could not install it: pip says why above"
    assert "none.txt" in done.stderr.splitlines()[-2]


def test_a_complete_package_stays(site):
    assert list(forget(site)) == []
    assert is_complete(site / "tiny-1.0.dist-info" / "RECORD")
    for compiled in site.rglob("*.pyc"):
        compiled.unlink()
    (site / "tiny" / "more.py").write_text("number = 1234\n")  # changed by someone afterwards
    assert list(forget(site)) == []


def remove_module(site: Path) -> None:
    (site / "tiny" / "more.py").unlink()


def remove_script(site: Path) -> None:
    (site.parents[2] / "bin" / "tiny").unlink()


def remove_record(site: Path) -> None:
    (site / "tiny-1.0.dist-info" / "RECORD").unlink()


def record_of_the_wheel(site: Path) -> None:
    """As it lies there until pip writes its own at the end."""
    record = site / "tiny-1.0.dist-info" / "RECORD"
    record.write_text("\n".join(line for line in record.read_text().splitlines() if "INSTALLER" not in line))


DAMAGES = [remove_module, remove_script, remove_record, record_of_the_wheel]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_an_interrupted_installation_left_is_forgotten_so_that_pip_installs_it(site, damage):
    damage(site)
    assert list(forget(site)) == ["tiny-1.0"]
    assert not list(site.glob("*.dist-info"))


def test_what_pip_had_set_aside_is_removed(site):
    (site / "~iny").mkdir()
    (site / "~iny" / "old.py").touch()
    assert list(forget(site)) == ["~iny"] and not (site / "~iny").exists()
    assert (site / "tiny" / "more.py").exists()
