"""What the scripts that run an example from nothing share (examples/common.sh): options, and whose folders they touch.

They run in a copy of examples/, where Python and torchrun are stand-ins in PATH that say how they were called, and no
environment is made. Truth: the files of a folder are the same before and after a script that refuses it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.waiting import HANG_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]
MARKER = ".megatron_mm-output"
#: What each script makes anew on each run, of the names that a user may have used as well.
ITEMS = {
    "quickstart/run.sh": ("shards", "run", "untrained", "exported", "results.json"),
    "avt_33b/tiny.sh": ("shards", "run", "tokenizer.model", "results.json"),
    "vlm_14b/tiny.sh": ("shards", "run", "mae", "results.json"),
    "perceiver_fusion_xl/tiny.sh": ("shards", "run", "tokenizer.model", "results.json"),
    "dual_encoder/tiny.sh": ("shards", "run", "mae", "results.json"),
    "own_system/run.sh": ("run", "exported", "scores.json"),
}
#: Of the scripts of which there were earlier versions that left no marker.
SYSTEMS = dict(zip(ITEMS, ("synapse", "avt", "vlm", "perceiver_fusion", "dual_encoder")))


def executable(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


class Checkout:
    """A copy of the examples, and stand-ins for what they call.

    Args:
        folder: an empty one.
        torchrun: lines of its stand-in.
    """

    def __init__(self, folder: Path, *torchrun: str) -> None:
        self.root, self.bin, self.home, self.calls = (folder / n for n in ("tree", "bin", "home", "calls"))
        shutil.copytree(ROOT / "examples", self.root / "examples")
        shutil.copytree(ROOT / "megatron_mm/recipes", self.root / "megatron_mm/recipes")
        (self.root / "tools").mkdir()
        (self.root / "tools/setup_env.sh").write_text("")
        self.bin.mkdir(), self.home.mkdir()
        executable(self.bin / "python", f'echo "python $*" >>{self.calls}', "echo 10")  # iterations of the recipe
        executable(self.bin / "torchrun", f'echo "torchrun $*" >>{self.calls}', *torchrun)

    def start(self, script: str, *options: str, **variables: str) -> subprocess.Popen:
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.home), **variables}
        return subprocess.Popen(
            ["bash", str(self.root / "examples" / script), *options], cwd=self.home, env=environment, encoding="utf-8",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # What a shell started in the background ignores the signal, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, script: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(script, *options, **variables)
        out, err = process.communicate(timeout=HANG_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def called(self) -> list[str]:
        """Commands so far."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def fill(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder in which each name is a folder with a file."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").write_text(name)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", ITEMS)
def test_help_names_every_option_and_runs_nothing(checkout, script):
    done = checkout.run(script, "--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count(script) == 2
    words = ("--smoke", "--output", "--recipe", "--cache", "--seed")
    assert all(word in done.stdout for word in words) and "==" not in done.stdout
    assert "common.sh" not in done.stdout and checkout.called() == []


@pytest.mark.parametrize("script", ITEMS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smok"], "unknown option --smok"),
        (["--output"], "--output needs a value"),
        (["--output", "--smoke"], "--output needs a value, and --smoke is none"),
        (["--recipe", ""], "--recipe is empty"),
        (["--recipe", "none.yaml"], "--recipe none.yaml: there is no such file"),
        (["--cache", ""], "--cache is empty"),
        (["--cache", "//"], "--cache /: the root"),
        (["--cache", "megatron_mm/recipes/avt-tiny.yaml/"], "--cache megatron_mm/recipes/avt-tiny.yaml: it is no fold"),
        *((["--seed", seed], f"--seed {seed}: it must be a whole number from 0 to 2147483647")
          for seed in ("x", "-1", "1.5", "2147483648", "99999999999999999999", "--smoke")),
        (["--seed", ""], "--seed is empty"),
    ],
)  # fmt: skip
def test_mistakes_are_named(checkout, script, options, message):
    done = checkout.run(script, *options)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr and done.stderr.startswith(script.split("/")[1])
    assert checkout.called() == [] and not (checkout.root / "outputs").exists()


@pytest.mark.parametrize("script", ITEMS)
def test_a_seed_reaches_every_run(checkout, script):
    assert checkout.run(script).returncode == 0
    assert checkout.run(script, "--seed", "007").returncode == 0
    runs = [call for call in checkout.called() if call.startswith("torchrun")]
    half = len(runs) // 2
    assert half >= 1 and not any("--training.seed" in call for call in runs[:half])
    assert all(" --training.seed 7 " in f"{call} " for call in runs[half:]) and len(runs) == 2 * half


@pytest.mark.parametrize("script", ITEMS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--output is empty"),
        *((path, "the root is no place") for path in ("/", "//", "///", "/.", "//.")),
        *((path, "the repository itself is no place") for path in (".", "./", "examples/..")),
        *((path, "the home folder is no place") for path in ("{home}", "{home}/", "{link}")),
        ("..", "it is not empty"),
        ("examples", "it is not empty"),
    ],
)
def test_what_is_no_place_for_an_output_is_refused(checkout, tmp_path, script, value, message):
    """An unset variable of the caller's leaves an empty path, or the root of a longer one."""
    fill(checkout.root, ("run", "shards", "mae")), fill(tmp_path, ("run", "shards", "mae"))
    (tmp_path / "link").symlink_to(checkout.home)
    executable(checkout.bin / "rm", f'echo "$*" >>{tmp_path}/removed')  # the root of this machine is real
    executable(checkout.bin / "mkdir", "exit 9")
    before = contents(tmp_path)
    done = checkout.run(script, "--smoke", "--output", value.format(home=checkout.home, link=tmp_path / "link"))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert contents(tmp_path) == before and checkout.called() == []


@pytest.mark.parametrize("words", ['"$NOT_SET"', '"$NOT_SET/"', '"$NOT_SET/./"', "$NOT_SET --smoke"])
def test_an_unset_variable_is_refused(checkout, words):
    """As a caller's shell makes the words."""
    command = f"exec bash {checkout.root}/examples/avt_33b/tiny.sh --output {words}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, encoding="utf-8", timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 2 and "--output" in done.stderr and done.stderr.count("\n") == 1
    assert checkout.called() == []


def test_a_path_that_leads_back_is_refused_once_it_exists(checkout):
    """`new/..` is no folder until `new` is made; then it is the repository."""
    fill(checkout.root, ("run", "shards"))
    done = checkout.run("avt_33b/tiny.sh", "--output", "new/../")
    assert done.returncode == 2 and "the repository itself" in done.stderr
    assert (checkout.root / "run/mine.txt").exists() and not (checkout.root / MARKER).exists()


@pytest.mark.parametrize("script", ITEMS)
@pytest.mark.parametrize("ending", ["", "/", "//"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_users_folder_is_refused(checkout, tmp_path, script, ending, linked):
    mine = fill(tmp_path / "mine", ITEMS[script])
    before, path = contents(mine), mine
    if linked:
        path = tmp_path / "link"
        path.symlink_to(mine)
    done = checkout.run(script, "--output", f"{path}{ending}")
    assert done.returncode == 2 and f"--output {path}: it is not empty, and no output folder of" in done.stderr
    assert contents(mine) == before and checkout.called() == []


def test_files_and_dangling_links_are_refused(checkout, tmp_path):
    (tmp_path / "file").write_text("x"), (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in ("file", "file/", "link"):
        done = checkout.run("avt_33b/tiny.sh", "--output", str(tmp_path / path) + "/" * path.endswith("/"))
        assert done.returncode == 2 and "it is no folder" in done.stderr
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("script", ITEMS)
def test_of_its_own_folder_a_script_removes_what_it_makes(checkout, tmp_path, script):
    out = tmp_path / "a folder"
    assert checkout.run(script, "--output", str(out)).returncode == 0
    assert (out / MARKER).read_text() == f"examples/{script}\n"
    fill(out, ("data", "notes", *ITEMS[script]))
    (tmp_path / "link").symlink_to(out)
    (out / "kept").symlink_to(fill(tmp_path / "elsewhere", ("run",)))
    done = checkout.run(script, "--output", f"{tmp_path / 'link'}/")
    assert done.returncode == 0, done.stderr
    left, removed = contents(out), {f"{name}/mine.txt" for name in ITEMS[script]}
    assert {"data/mine.txt", "notes/mine.txt"} <= left.keys() and not removed & left.keys()
    assert contents(tmp_path / "elsewhere") == {"run/mine.txt": "run"}


def test_a_link_in_its_folder_is_removed_not_followed(checkout, tmp_path):
    out, mine = tmp_path / "out", fill(tmp_path / "mine", ("shards",))
    assert checkout.run("avt_33b/tiny.sh", "--output", str(out)).returncode == 0
    (out / "run").symlink_to(mine)
    assert checkout.run("avt_33b/tiny.sh", "--output", str(out)).returncode == 0
    assert contents(mine) == {"shards/mine.txt": "shards"} and not (out / "run").is_symlink()


@pytest.mark.parametrize("other", ["vlm_14b/tiny.sh", "quickstart/run.sh"])
def test_the_folder_of_another_script_is_refused(checkout, tmp_path, other):
    out = tmp_path / "out"
    assert checkout.run("avt_33b/tiny.sh", "--output", str(out)).returncode == 0
    fill(out, ITEMS["avt_33b/tiny.sh"])
    before = contents(out)
    done = checkout.run(other, "--output", str(out))
    assert done.returncode == 2 and "it is the output folder of examples/avt_33b/tiny.sh" in done.stderr
    assert contents(out) == before


def test_an_empty_folder_and_one_whose_marker_was_cut_off_are_taken(checkout, tmp_path):
    for name in ("empty", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / MARKER).write_text("")
    for name in ("empty", "killed"):
        assert checkout.run("avt_33b/tiny.sh", "--output", str(tmp_path / name)).returncode == 0
        assert (tmp_path / name / MARKER).read_text() == "examples/avt_33b/tiny.sh\n"


def earlier(folder: Path, system: str | None, phase: str = "run") -> Path:
    """An output folder as scripts left it before they marked them."""
    fill(folder, ("data/packages", "shards", phase))
    (folder / "data/LICENCES.txt").write_text("emoji-datasource-google 16.0.0 (npm): Noto Emoji art\n")
    line = f"  system: {system}\n" if system else ""
    (folder / phase / "config.yaml").write_text(f"model:\n{line}  init_std: 0.02\n")
    return folder


@pytest.mark.parametrize("script", SYSTEMS)
def test_a_folder_of_an_earlier_version_goes_on(checkout, tmp_path, script):
    out = earlier(tmp_path / "out", SYSTEMS[script])
    done = checkout.run(script, "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / MARKER).exists() and not (out / "run").exists() and not (out / "shards").exists()
    assert (out / "data/packages/mine.txt").exists()


def test_a_quick_start_from_before_there_were_systems_goes_on(checkout, tmp_path):
    out = earlier(tmp_path / "out", None)
    assert checkout.run("quickstart/run.sh", "--output", str(out)).returncode == 0


@pytest.mark.parametrize("phase", ["run", "mae"])
def test_a_folder_of_an_earlier_version_of_another_script_is_refused(checkout, tmp_path, phase):
    out = earlier(tmp_path / "out", "avt", phase)
    before = contents(out)
    for script in ("vlm_14b/tiny.sh", "quickstart/run.sh"):
        done = checkout.run(script, "--output", str(out))
        assert done.returncode == 2 and contents(out) == before


def test_data_alone_are_taken_up_only_if_they_were_prepared_here(checkout, tmp_path):
    ours, mine = fill(tmp_path / "ours", ("data/packages", "data/images")), fill(tmp_path / "mine", ("data/photos",))
    assert checkout.run("avt_33b/tiny.sh", "--output", str(ours)).returncode == 0
    assert {"data/packages/mine.txt", "data/images/mine.txt", MARKER} <= contents(ours).keys()
    assert checkout.run("avt_33b/tiny.sh", "--output", str(mine)).returncode == 2
    assert contents(mine) == {"data/photos/mine.txt": "data/photos"}


@pytest.mark.parametrize("script", ["quickstart/run.sh", "avt_33b/tiny.sh", "vlm_14b/tiny.sh"])
def test_an_interrupted_run_is_started_again(tmp_path, script):
    """Ctrl-C while it trains: the terminal interrupts all processes of the script."""
    once = tmp_path / "interrupted"
    begun = f"mkdir -p {tmp_path}/out/run; touch {tmp_path}/out/run/half {once}"
    checkout = Checkout(tmp_path, f"[ -e {once} ] && exit 0", begun, "sleep 86400")
    process = checkout.start(script, "--output", str(tmp_path / "out"))
    wait_until(once.exists, "the first training", process)
    while process.poll() is None:  # a shell between two commands may go on after one
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    assert process.returncode != 0 and (tmp_path / "out/run/half").exists()
    done = checkout.run(script, "--output", str(tmp_path / "out"))
    assert done.returncode == 0 and "Done in" in done.stdout and not (tmp_path / "out/run").exists()
