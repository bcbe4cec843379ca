"""Signals of a training process: what each does before and after the first step, which are echoes, who ends with whom.

Programs here import nothing but the standard library, as the training program at its start.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_mm.platform import stopping
from tests.support.programs import INTERPRETER
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
INSTALL = """
import os, signal, sys, time
from megatron_mm.platform import stopping
parent = os.getppid()
stopping.install()
"""
RUNNING = f"{INSTALL}stopping.remember()\nstopping.remembered_by_all()\nprint('ready', flush=True)\n"
ASKED = "while stopping.asked() is None:\n    time.sleep(0.01)\n"


def start(program: str, **environment: str) -> subprocess.Popen:
    """A real interpreter on a program."""
    given = {"PYTHONPATH": str(ROOT), **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_RUN_ID")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([INTERPRETER, "-c", program], env={**kept, **given}, **pipes)


def ready(program: str, **environment: str) -> subprocess.Popen:
    """The same once it has said so."""
    process = start(program, **environment)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", stopping.NUMBERS)
def test_before_the_first_step_a_signal_ends_the_process_at_once(number):
    """Also while the main thread waits in a function of C, as it does in an import or in a collective."""
    process = ready(f"{INSTALL}print('ready', flush=True)\nos.read(os.pipe()[0], 1)")
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == 0
    assert said == f"stopped by {number.name} before the first step: nothing is saved\n"


def test_one_rank_says_so():
    process = ready(f"{INSTALL}print('ready', flush=True)\ntime.sleep(86400)", RANK="1", WORLD_SIZE="2")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == "" and process.returncode == 0


@pytest.mark.parametrize("number", stopping.NUMBERS)
def test_after_the_first_step_a_signal_is_remembered(number):
    process = ready(f"{RUNNING}{ASKED}print(stopping.asked().name)")
    process.send_signal(number)
    said, told = process.communicate()
    assert (process.returncode, said) == (0, f"{number.name}\n")
    assert told.startswith(f"{number.name}: the run ends when the step in hand is done and saved")


def test_a_system_that_names_no_sender_takes_signals_too():
    """macOS."""
    process = ready(f"import signal\ndel signal.sigwaitinfo\n{RUNNING}{ASKED}print(stopping.asked().name)")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "SIGINT\n" and process.returncode == 0


def test_who_waits_for_the_first_agreement_ends_when_nobody_comes():
    """Another rank was told to stop before its own first step ended."""
    alone = "stopping.AGREEMENT_SECONDS = 0.1\nstopping.remember()\nprint('ready', flush=True)\ntime.sleep(86400)"
    process = ready(INSTALL + alone)
    process.send_signal(signal.SIGTERM)
    assert "before the first step: nothing is saved" in process.communicate()[1] and process.returncode == 0


def test_who_lost_the_others_before_its_own_signal_ends_as_they_did():
    process = ready(f"{INSTALL}stopping.remember()\nprint('ready', flush=True)\nstopping.end_as_told(86400)")
    process.send_signal(signal.SIGTERM)
    assert "before the first step: nothing is saved" in process.communicate()[1] and process.returncode == 0
    assert start(f"{INSTALL}stopping.end_as_told(0.0)\nsys.exit(5)").wait() == 5
    assert start("from megatron_mm.platform import stopping\nstopping.end_as_told(86400)").wait() == 0


@pytest.mark.slow
def test_who_was_told_to_end_joins_no_agreement():
    """The others must not save without it."""
    slow, agrees = "stopping.TOGETHER_SECONDS = 2.0\n", "stopping.remember()\nprint('agreed', flush=True)"
    process = ready(f"{INSTALL}{slow}print('ready', flush=True)\n{ASKED}{agrees}", WORLD_SIZE="2")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert (process.returncode, said) == (0, "")


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
LAUNCHER, SLURM, SHELL = 7, 8, 9


@pytest.mark.parametrize(
    ("came", "ends"),
    [
        ([(0, TERM, SLURM)], None),
        ([(0, TERM, SLURM), (0.1, TERM, LAUNCHER)], None),  # every process of a node, and the launcher's own
        ([(0, TERM, SLURM), (9, TERM, LAUNCHER)], None),  # which is late on a machine under load
        ([(0, TERM, LAUNCHER), (0.1, TERM, SLURM)], None),
        ([(0, TERM, None), (0.1, TERM, None)], None),  # macOS
        ([(0, TERM, None), (9, TERM, None)], TERM),
        ([(0, TERM, SLURM), (9, TERM, SLURM)], TERM),
        ([(0, INT, SHELL), (1, INT, SHELL), (3, INT, SHELL)], INT),
        ([(0, INT, LAUNCHER), (9, TERM, LAUNCHER)], TERM),  # Ctrl-C twice to torchrun
        ([(0, TERM, LAUNCHER), (9, INT, SHELL)], INT),
        ([(0, USR1, SLURM), (300, TERM, SLURM), (300.1, TERM, LAUNCHER)], None),  # notice and time limit
        ([(0, USR1, SLURM), (9, USR1, SLURM), (18, USR1, LAUNCHER)], None),
        ([(0, USR1, SLURM), (300, TERM, SLURM), (309, TERM, SLURM)], TERM),
        ([(0, TERM, SLURM), (9, USR1, SLURM)], None),
    ],
)
def test_echoes_are_no_second_signals(came, ends, monkeypatch):
    """(seconds, signal, sender); the status is that of a shell for what a signal has ended."""

    def exit_at_once(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(stopping, "exit_at_once", exit_at_once)
    monkeypatch.setattr(stopping, "say", lambda line: None)
    signals = stopping._Signals(set(stopping.NUMBERS), LAUNCHER)
    signals.stage = stopping._Stage.RUNNING
    for place, (at, number, sender) in enumerate(came):
        monkeypatch.setattr(stopping.time, "monotonic", lambda at=at: 1000.0 + at)
        if ends and place == len(came) - 1:
            with pytest.raises(SystemExit) as end:
                signals._take(number, sender)
            assert end.value.code == 128 + ends
        else:
            signals._take(number, sender)
    assert signals.asked == came[0][1]


FORKING = f"""{INSTALL}stopping.ECHO_SECONDS = -1.0
stopping.remember()
import subprocess
started = [subprocess.Popen(["sleep", "86400"]).pid]
if not (forked := os.fork()):
    time.sleep(86400)
print("ready", flush=True)
print(forked, *started, flush=True)
time.sleep(86400)
"""


@pytest.mark.slow
def test_children_outlive_a_first_signal_and_end_with_a_second():
    process = ready(FORKING)
    children = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    for each in (process, *children):
        each.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: the run ends")
    assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == "rank 0: a second signal, SIGTERM: it ends at once\n"
    assert process.returncode == 128 + signal.SIGTERM
    psutil.wait_procs(children)


def test_a_signal_that_is_ignored_stays_ignored():
    program = f"{RUNNING}{ASKED}print(stopping.asked().name)"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", INTERPRETER, "-c", program]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, encoding="utf-8", stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == "SIGUSR1\n"


def test_a_signal_that_a_library_unblocks_is_taken():
    program = f"{RUNNING}{ASKED}print(stopping.asked().name)"
    unblocked = program.replace("print", "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\nprint", 1)
    process = ready(unblocked)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "SIGTERM\n" and process.returncode == 0


TRACKED = f"""{INSTALL}from multiprocessing import resource_tracker
resource_tracker.ensure_running()
if not (child := os.fork()):
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_children_do_not_see_signals_where_multiprocessing_has_unblocked_them():
    """Its resource tracker does so in the thread that starts it, for ever."""
    assert start(TRACKED).communicate() == ("7\n", "")


#: Starts the program that follows it, says its number, and waits to be killed.
LAUNCH = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stderr=open(sys.argv[2], "w"), start_new_session=True)
print(process.pid, flush=True)
time.sleep(86400)
"""


def orphan(tmp_path: Path, program: str, told: bool = False, **environment: str) -> str:
    """Standard error of a program whose launcher was killed when it was ready, once it has ended."""
    said, there = tmp_path / "said", tmp_path / "there"
    program = program.replace("print('ready', flush=True)", f"open({str(there)!r}, 'w').close()")
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [INTERPRETER, "-c", LAUNCH, program, str(said)]
    launcher = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, encoding="utf-8")
    process = psutil.Process(int(launcher.stdout.readline()))
    wait_until(there.exists, "the program is ready", launcher)
    if told:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "the run ends" in said.read_text(), "the program is told")
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the program ends")
    return said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("begins", [INSTALL + "print('ready', flush=True)\n", RUNNING])
def test_a_process_whose_launcher_is_gone_ends(tmp_path, begins):
    said = orphan(tmp_path, f"{begins}time.sleep(86400)", TORCHELASTIC_RUN_ID="of a test")
    assert said.startswith("error: rank 0: its launcher (process ") and "is gone" in said and said.count("\n") == 1


@pytest.mark.slow
def test_what_was_asked_for_is_saved_first_though_the_launcher_is_gone(tmp_path):
    saving = "while os.getppid() == parent:\n    time.sleep(0.1)\ntime.sleep(2.5)\nstopping.say('saved')\n"
    said = orphan(tmp_path, f"{RUNNING}{saving}", told=True, TORCHELASTIC_RUN_ID="of a test")
    assert said.endswith("saved\n") and "it ends when it has saved, within 120 s" in said


@pytest.mark.slow
def test_a_process_that_nobody_launched_outlives_its_shell(tmp_path):
    program = f"{RUNNING}while os.getppid() == parent:\n    time.sleep(0.1)\ntime.sleep(2.5)\n"
    assert orphan(tmp_path, f"{program}stopping.say('still there')") == "still there\n"
