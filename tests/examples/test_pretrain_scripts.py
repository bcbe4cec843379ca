"""Launch scripts of the full recipes: machines, phases, environment, and what those of Slurm do at the time limit.

Python, srun and the other commands of Slurm are scripts here that say how they were called.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_mm.config.load import RECIPES, load_config, parse_command_line
from tests.support.full_recipes import FULL, ROOT, launched, script, words
from tests.support.waiting import wait_until

TWO_PHASES = {"vlm-14b": "decoder.*", "dual-encoder": "text.*"}


@pytest.mark.parametrize("name", FULL)
def test_nodes_are_those_of_the_recipe(name):
    wanted = load_config(RECIPES / f"{name}.yaml").parallel.world_size
    assert launched(name)[1].world == wanted
    batch = script(name, "slurm").read_text()
    nodes, tasks, gpus = (
        int(re.search(rf"^#SBATCH --{option}=(\d+)$", batch, re.MULTILINE).group(1))
        for option in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert nodes * tasks == nodes * gpus == wanted
    assert batch.endswith(f'run_and_requeue {script(name).relative_to(ROOT)} "$@"\n')


@pytest.mark.parametrize("name", TWO_PHASES)
def test_each_phase_has_an_output_of_its_own(name):
    joint, mae = (parse_command_line(words(name, PHASE=phase)).config for phase in ("joint", "mae"))
    assert (joint.model.phase, joint.logging.output) == ("joint", f"outputs/{name}")
    assert (mae.model.phase, mae.logging.output) == ("mae", f"outputs/{name}-mae")
    assert parse_command_line(words(name, PHASE="mae", OUTPUT="o")).config.logging.output == "o"


@pytest.mark.parametrize(("name", "text"), TWO_PHASES.items())
def test_the_joint_phase_starts_from_a_tower_and_a_language_model(name, text):
    def start(**given: str) -> tuple:
        checkpoint = parse_command_line(words(name, **given)).config.checkpoint
        return checkpoint.init_from, checkpoint.init_nodes

    assert start() == (None, None)
    assert start(INIT="a b") == (["a b"], ["vision.*"])
    assert start(LM="b") == (["b"], [text])
    assert start(INIT="a", LM="b") == (["a", "b"], ["vision.*", text])
    assert start(INIT="a", LM="b", PHASE="mae") == (None, None)


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def test_the_environment_is_that_at_hand_or_the_repositorys(tmp_path):
    executable(tmp_path / "bare" / "python", '[ "$1" != -c ] && echo bare')
    executable(tmp_path / "container" / "python", '[ "$1" = -c ] || echo container')
    executable(tmp_path / "venv" / "bin" / "python", '[ "$1" = -c ] || echo venv')

    def python(at_hand: str, venv: str) -> str:
        path = f"{tmp_path / at_hand}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "MEGATRON_MM_VENV": str(tmp_path / venv)}
        command = [script("synapse-70b"), "--dry-run"]
        return subprocess.run(command, env=given, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    assert python("bare", "venv") == "venv"
    assert python("container", "venv") == "container"
    assert python("bare", "none") == "bare"


class Job:
    """A batch script in this process's place, with Slurm's commands replaced."""

    def __init__(self, folder: Path, srun: str, check: str = "exit 0", **given: str) -> None:
        self.folder = folder
        srun = f'case "$*" in *--check) {check} ;; esac\n{srun}'
        executable(folder / "bin" / "scontrol", f'[ "$1" = show ] && echo node0 || echo "scontrol $*" >>{folder}/said')
        executable(folder / "bin" / "scancel", f'echo "scancel $*" >>{folder}/said', f"kill -TERM $(cat {folder}/pid)")
        executable(folder / "bin" / "srun", f'echo "srun $MASTER_ADDR $*" >>{folder}/said', srun)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]", **given}
        self.process = subprocess.Popen(["bash", script("vlm-14b", "slurm"), "--lr", "1"], cwd=ROOT, env=environment)

    def warn(self) -> None:
        """The signal before the time limit, once the processes run."""
        wait_until((self.folder / "pid").exists, "the processes run", self.process)
        self.process.send_signal(signal.SIGUSR1)

    def end(self, checked: bool = True, trained: bool = True) -> tuple[int, list[str]]:
        """Exit status, and the commands that were called after the pre-flight and the run."""
        status = self.process.wait()
        said = (self.folder / "said").read_text().splitlines()
        step = "srun node0 --kill-on-bad-exit=1 --export=ALL examples/vlm_14b/pretrain.sh --lr 1"
        steps = [f"{step} --check"] * checked + [step] * trained
        assert said[: len(steps)] == steps
        return status, said[len(steps) :]


def running(folder: Path, on_term: str) -> str:
    """A run that does something on SIGTERM."""
    ready = f"echo $$ >{folder}/new && mv {folder}/new {folder}/pid"
    return f"trap '{on_term}' TERM\n{ready}\nwhile :; do sleep 0.05; done"


def test_a_job_whose_time_runs_out_is_queued_again_once_it_has_saved(tmp_path):
    job = Job(tmp_path, running(tmp_path, f"sleep 0.3; echo saved >>{tmp_path}/said; exit 0"))
    job.warn()
    assert job.end() == (0, ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"])


def test_a_job_that_cannot_save_is_not_queued_again(tmp_path):
    job = Job(tmp_path, running(tmp_path, "exit 3"))
    job.warn()
    assert job.end() == (3, ["scancel --signal=TERM 7"])


@pytest.mark.parametrize("status", [0, 5])
def test_a_job_that_ends_by_itself_stays_ended(status, tmp_path):
    assert Job(tmp_path, f"exit {status}").end() == (status, [])


def test_a_job_whose_machines_are_not_in_order_does_not_train(tmp_path):
    assert Job(tmp_path, "exit 0", check="exit 1").end(trained=False) == (1, [])


def test_a_job_may_go_without_the_check(tmp_path):
    assert Job(tmp_path, "exit 0", check="exit 1", CHECK="0").end(checked=False) == (0, [])


def test_a_check_is_launched_like_the_run():
    with_check, without = words("avt-33b", "--check"), words("avt-33b")
    assert with_check == [*without, "--check"]
    assert parse_command_line(with_check).verbs.check and not parse_command_line(without).verbs.check


def facts(**given: str) -> dict[str, str]:
    """The environment that examples/cluster.sh leaves."""
    command = ["bash", "-euc", ". examples/cluster.sh; env -0"]
    given = {"PATH": os.environ["PATH"], **given}
    said = subprocess.run(command, cwd=ROOT, env=given, check=True, capture_output=True, encoding="utf-8").stdout
    return dict(line.split("=", 1) for line in said.split("\0") if line)


def test_facts_of_the_cluster_can_be_given_and_are_not_guessed():
    plain = facts()
    assert plain["NCCL_DEBUG"] == "WARN" and plain["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert plain["MASTER_ADDR"] == "localhost" and plain["OMP_NUM_THREADS"] == "8"
    assert not {name for name in plain if "IFNAME" in name or "_IB_" in name}
    given = facts(INTERFACE="ib0", ADAPTERS="=mlx5_0", NCCL_DEBUG="INFO", MASTER_ADDR="node7", SLURM_CPUS_PER_TASK="4")
    assert (given["NCCL_SOCKET_IFNAME"], given["GLOO_SOCKET_IFNAME"]) == ("=ib0", "ib0")
    assert (given["NCCL_IB_HCA"], given["NCCL_DEBUG"], given["MASTER_ADDR"]) == ("=mlx5_0", "INFO", "node7")
    assert given["OMP_NUM_THREADS"] == "4"
    assert facts(INTERFACE="ib0", NCCL_SOCKET_IFNAME="eth")["NCCL_SOCKET_IFNAME"] == "eth"


def test_the_commands_for_owners_of_gpus_take_the_facts_of_the_cluster(tmp_path):
    """Under srun with a task a node, each task is a node, and they meet at the first."""
    executable(tmp_path / "python", f'[ "$1" = -c ] || echo "$NCCL_DEBUG $*" >{tmp_path}/said')
    executable(tmp_path / "scontrol", "echo node3; echo node4")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[3-4]"}
    subprocess.run([ROOT / "examples" / "check_gpus.sh", "two-nodes", "--steps", "9"], env=given, check=True)
    where = "--node-rank 1 --master-addr node3 --master-port 29500"
    assert (tmp_path / "said").read_text() == f"WARN tools/check_gpus.py {where} two-nodes --steps 9\n"


def test_batch_scripts_ask_for_the_signal():
    for name in FULL:
        options = re.findall(r"^#SBATCH --(\S+)$", script(name, "slurm").read_text(), re.MULTILINE)
        assert {"signal=B:USR1@300", "requeue", "open-mode=append"} <= set(options)
