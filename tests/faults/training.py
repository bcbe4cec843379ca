"""The run under test: a recipe of a few seconds, its layouts, and one launch of it under torchrun."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from tests.faults.processes import Tree
from tests.faults.watched_data import MARKS
from tests.support.corpus import corpus_config
from tests.support.programs import INTERPRETER, PYTHON

ROOT = Path(__file__).resolve().parents[2]
#: Steps of the run, and between its checkpoints and validations; samples of a step, which 1 to 4 processes divide.
STEPS, SAVE_EVERY, EVAL_EVERY, BATCH = 36, 4, 9, 12
#: Seconds without progress after which the run's own watchdog ends it: the run counts as hung.
PATIENCE = 30.0
#: Seconds more, in which the watchdogs wait for each other's stacks, after which the campaign ends what is left.
_BEYOND = 75.0
#: torch's, before each line of a traceback.
_RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
_RESUMED = re.compile(r"^resumed from (\S+) at iteration (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Layout:
    """How one launch divides the run."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch_size: int = 3
    num_workers: int = 0
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def processes(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp

    def words(self) -> list[str]:
        """Of the command line."""
        numbers = {
            "tensor-model-parallel-size": self.tp,
            "pipeline-model-parallel-size": self.pp,
            "micro-batch-size": self.micro_batch_size,
            "num-workers": self.num_workers,
        }
        flags = {"sequence-parallel": self.sequence_parallel, "use-distributed-optimizer": self.distributed_optimizer}
        words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        return words + [f"--{name}" for name, wanted in flags.items() if wanted]

    def __str__(self) -> str:
        sizes = "".join(f"{name}{size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp)))
        marks = "+SP" * self.sequence_parallel + "+DO" * self.distributed_optimizer
        return f"{sizes}{marks} mbs{self.micro_batch_size} w{self.num_workers}"


def draw_layout(dice: random.Random) -> Layout:
    """A layout of two to four processes."""
    ways = [(tp, pp, dp) for tp in (1, 2, 4) for pp in range(1, 5) for dp in range(1, 5) if 2 <= tp * pp * dp <= 4]
    # Tensor-parallel processes that share a core are slow: each layer waits for all of them.
    tp, pp, dp = dice.choices(ways, [1 / way[0] for way in ways])[0]
    most, microbatches = BATCH // dp, 4 if pp > 1 else 2  # rows of a process in a step
    return Layout(
        tp,
        pp,
        dp,
        micro_batch_size=dice.choice([n for n in range(1, most + 1) if most % n == 0 and most // n <= microbatches]),
        num_workers=dice.choice((0, 1, 2)),
        sequence_parallel=tp > 1 and dice.random() < 0.5,
        distributed_optimizer=dp > 1 and dice.random() < 0.5,
    )


def write_recipe(corpus: tuple[Path, Path], output: Path, patience: float) -> Path:
    """Writes the recipe of a run into a folder beside its output and returns its path.

    Args:
        corpus: dataset and tokenizer.
        output: of the run.
        patience: seconds without progress after which the run ends itself.
    """
    config = changed(
        corpus_config(*corpus, output),
        {
            # Four heads everywhere, for four tensor-parallel processes, and as few layers as there can be.
            "model.vision.num_layers": 1,
            "model.audio.num_layers": 1,
            "model.decoder.num_layers": 2,
            "model.vision.num_attention_heads": 4,
            "model.audio.num_attention_heads": 4,
            "model.decoder.num_query_groups": 4,
            "model.cross_attention.num_query_groups": 4,
            "data.builder": f"{Path(__file__).with_name('watched_data.py')}:build",
            "parallel.distributed_timeout_minutes": patience / 60,
            "training.train_iters": STEPS,
            "training.global_batch_size": BATCH,
            "training.eval_interval": EVAL_EVERY,
            "training.eval_iters": 2,
            # What layouts round otherwise stays far below 1e-5: no update is a gradient's sign alone.
            "optimizer.lr": 3e-4,
            "optimizer.adam_eps": 1e-4,
            "checkpoint.save_interval": SAVE_EVERY,
        },
    )
    path = output.parent / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_config(config, path)
    return path


@dataclass(frozen=True)
class Said:
    """What a launch left in words, once it has ended."""

    launcher: str
    """Its output and errors."""
    outputs: str
    """Of all ranks."""
    errors: dict[int, str]
    """Standard error of each rank."""

    @cached_property
    def everything(self) -> str:
        """All of it."""
        return "\n".join([self.launcher, self.outputs, *self.errors.values()])

    @property
    def finished(self) -> bool:
        """Whether the run came to its last step."""
        return "finished at iteration" in self.outputs or "nothing to do: iteration" in self.outputs

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it in order."""
        return "stopped by a signal at iteration" in self.outputs

    @property
    def timed_out(self) -> bool:
        """Whether a watchdog ended it."""
        return "made no progress for" in self.everything

    @property
    def resumed(self) -> tuple[str, int] | None:
        """Folder and iteration that it went on from; ("", 0) for a new run, None if it did not come so far."""
        if found := _RESUMED.search(self.outputs):
            return Path(found[1]).name, int(found[2])
        return ("", 0) if "\nattention: " in self.outputs else None

    @property
    def error_lines(self) -> list[str]:
        """Errors that the run named itself, each with the indented lines below it as one."""
        found: list[str] = []
        for text in self.errors.values():
            within = False
            for line in text.splitlines():
                if line.startswith("error:"):
                    found.append(line)
                elif within and line.startswith("  "):
                    found[-1] += line
                within = line.startswith("error:") or (within and line.startswith("  "))
        return found

    @property
    def tracebacks(self) -> dict[int, str]:
        """Last line of the last traceback of each rank that left one."""
        found = {}
        for rank, text in self.errors.items():
            _, mark, after = _RANK.sub("", text).rpartition("Traceback (most recent call last)")
            if mark:
                rest = [line for line in after.splitlines()[1:] if line.strip() and not line.startswith(" ")]
                found[rank] = rest[0] if rest else "a traceback without an end"
        return found


class Launch:
    """One start of the run, with all its processes.

    Args:
        recipe: from `write_recipe`.
        output: of the run.
        layout: of this launch.
        folder: new; for what launcher and ranks say.
        marks: folder of the data's marks.
        interpreters: start torchrun and ranks as interpreters of their own, not as forks.
        patience: seconds, that of the recipe.
    """

    def __init__(
        self, recipe: Path, output: Path, layout: Layout, folder: Path, marks: Path, interpreters: bool, patience: float
    ) -> None:
        self.output, self.layout, self.folder, self.marks, self.patience = output, layout, folder, marks, patience
        self.root = output / "checkpoints"
        self.began = time.monotonic()
        for path in (folder, marks):
            path.mkdir(parents=True, exist_ok=True)
        number = folder / "launcher.pid"
        launcher = [PYTHON, "-m", "tests.faults.forked_torchrun", INTERPRETER, str(number)]
        words = [*([INTERPRETER, "-m", "torch.distributed.run"] if interpreters else launcher), "--standalone"]
        words += ["--nproc-per-node", str(layout.processes), "--log-dir", str(folder / "ranks"), "--redirects", "3"]
        words += [str(ROOT / "pretrain_multimodal.py"), "--config", str(recipe), *layout.words()]
        with (folder / "launcher.log").open("w") as log:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, MARKS: str(marks)},
                start_new_session=True,
            )
        while not interpreters and not (number.exists() and number.read_text()) and self.process.poll() is None:
            time.sleep(0.01)
        self.tree = Tree(self.process.pid if interpreters or not number.exists() else int(number.read_text()))
        self._looked = self._changed = self.began
        self._signature: object = None

    @property
    def ended(self) -> bool:
        """Whether launcher and ranks have ended; readers and writers of ranks may go on for a while."""
        self.tree.look()
        return self.process.poll() is not None and not self.tree.living_ranks()

    def _progress(self) -> object:
        """Changes while the run goes on: sizes of what it writes."""
        folders = (self.folder, self.root, self.marks)
        sizes = []
        for path in (self.output / "metrics.jsonl", *(path for folder in folders for path in files_of(folder))):
            try:
                sizes.append((str(path), path.stat().st_size))
            except OSError:
                continue
        return sizes

    def watch(self, there: Callable[[], bool], pause: float = 0.005) -> str:
        """Waits until `there()` is true: "there"; or "ended", or "hung" where the run does neither in bounded time."""
        while not there():
            now = time.monotonic()
            if now - self._looked > 0.3:
                self._looked = now
                if self.ended:
                    return "there" if there() else "ended"
                if (signature := self._progress()) != self._signature:
                    self._signature, self._changed = signature, now
                elif now - self._changed > self.patience + _BEYOND:
                    return "hung"
            time.sleep(pause)
        return "there"

    def said(self) -> Said:
        """What launcher and ranks have said so far."""
        outputs, errors = [], {}
        for path in sorted(self.folder.glob("ranks/*/attempt_0/*/std*.log")):
            text = path.read_text(errors="replace")
            if path.name == "stdout.log":
                outputs.append("\n" + text)
            else:
                errors[int(path.parent.name)] = text
        launcher = (self.folder / "launcher.log").read_text(errors="replace")
        return Said(launcher, "".join(outputs), errors)

    def close(self) -> list[str]:
        """Ends all that the launch left, and returns what that was."""
        left = self.tree.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        return left


def files_of(folder: Path) -> list[Path]:
    """Files in a folder and below it, in order; what vanishes meanwhile may be among them."""
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)


def iteration(output: Path) -> int:
    """The last step in a run's metrics."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["iteration"])
        except (ValueError, KeyError):
            continue
    return 0


def finished_checkpoints(root: Path) -> dict[int, Path]:
    """Folders of checkpoints that have their name, by iteration."""
    return {checkpoint_folder.iteration_of(folder): folder for folder in checkpoint_folder.checkpoints(root)}
