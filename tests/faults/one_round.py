"""One round of a campaign: launches of the run under its faults, in a random layout each, until it has come to its end.

What is held against the run:

    silent    it differs from the run without faults, or went on from a damaged checkpoint, and no error said so
    lost      it went on from before the newest checkpoint that was whole when a fault came
    hung      it neither went on nor ended, its watchdog ended it, or it left processes behind
    unclear   it ended with a traceback of its own, or with no message that names a file or the cause
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from tests.faults.comparison import differences
from tests.faults.damage import damage, leave
from tests.faults.faults import Fault, NotRunError, draw_faults, kill_all, lift, random_of, strike
from tests.faults.moments import OF_A_SAVE, Moment, wait_for
from tests.faults.processes import alive, send
from tests.faults.storage import SmallDisk, can_mount
from tests.faults.training import Launch, Said, draw_layout, files_of, finished_checkpoints, iteration, write_recipe

PROBLEMS = ("silent", "lost", "hung", "unclear")
#: Launches after which a run that does not come to its end is given up.
_MOST_LAUNCHES = 12
#: Seconds in which readers and writers of ranks that were killed must have ended by themselves.
_GRACE = 20.0


@dataclass
class Launched:
    """What the log says of one launch."""

    layout: str
    struck: list[str] = field(default_factory=list)
    """Faults, with what was done and where the run was."""
    resumed: int | None = None
    """Iteration that it went on from; 0: a new run; None: it did not come so far."""
    ended: str = ""
    iteration: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What the log says of a round."""

    round: int
    seed: int
    faults: list[str]
    launches: list[Launched]
    problems: list[tuple[str, str]]
    """Kind, one of PROBLEMS, and what happened."""
    not_run: list[str]
    """Faults that met nothing, with the reason."""
    seconds: float

    @property
    def verdict(self) -> str:
        """The worst problem, or "survived"."""
        kinds = {kind for kind, _ in self.problems}
        return next((kind for kind in PROBLEMS if kind in kinds), "survived")

    def record(self) -> dict:
        """A line of the log."""
        return {**asdict(self), "verdict": self.verdict}


class CampaignStopped(Exception):
    """Somebody stopped the campaign."""


class Round:
    """A round.

    Args:
        number: of the round; with the seed, it decides all that is drawn.
        seed: of the campaign.
        folder: of this round; what is there is removed.
        corpus: dataset and tokenizer of the run.
        undisturbed: output of the run without faults.
        interpreters: start interpreters, not forks.
        patience: seconds without progress that a run may take.
        stopped: whether the campaign is to end.
        faults: in the place of drawn ones.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        folder: Path,
        corpus: tuple[Path, Path],
        undisturbed: Path,
        interpreters: bool,
        patience: float,
        stopped: Callable[[], bool] = lambda: False,
        faults: list[Fault] | None = None,
    ) -> None:
        self.number, self.seed, self.folder, self.undisturbed = number, seed, folder, undisturbed
        self.interpreters, self.patience, self.stopped = interpreters, patience, stopped
        self.dice = random_of(seed, number)
        self.faults = draw_faults(self.dice) if faults is None else faults
        self.pending = list(self.faults)
        shutil.rmtree(folder, ignore_errors=True)
        self.output = folder / "run"
        self.root = self.output / "checkpoints"
        self.recipe = write_recipe(corpus, self.output, patience)
        self.launches: list[Launched] = []
        self.problems: list[tuple[str, str]] = []
        self.not_run: list[str] = []
        self.whole = self.expected = 0
        """The newest iteration that was whole when the last fault came, and that of this launch's start."""
        self.damaged: dict[int, tuple[str, int]] = {}
        """What was done to a checkpoint, by iteration, and the inode of its folder: a later one may have its name."""
        self.stops: set[int] = set()
        """Steps after which a signal stopped a launch in order."""
        self.disk: SmallDisk | None = None
        self._digests: dict[str, str] = {}
        self.left: list[tuple[int, psutil.Process]] = []
        """Number of a launch that has ended, and a process of it that had not."""

    def run(self) -> Outcome:
        """Runs it; nothing of it is left behind but what its folder holds."""
        began = time.monotonic()
        self._make_disk()
        try:
            while not self._launch():
                if len(self.launches) == _MOST_LAUNCHES:
                    self._problem("hung", f"it has not come to its end in {_MOST_LAUNCHES} launches")
                    break
            else:
                self.not_run += [f"{fault}: the run was at its end" for fault in self.pending]
                for difference in differences(self.output, self.undisturbed, self.stops)[:3]:
                    self._problem("silent", difference)
            self._check_left()
        finally:
            for number in (signal.SIGKILL, signal.SIGCONT):
                send([process for _, process in self.left], number)
            if self.disk is not None:
                self._keep_disk()
        return Outcome(
            self.number,
            self.seed,
            [str(fault) for fault in self.faults],
            self.launches,
            self.problems,
            self.not_run,
            round(time.monotonic() - began, 1),
        )

    def _problem(self, kind: str, text: str) -> None:
        self.problems.append((kind, f"launch {len(self.launches)}: {text}"))

    # Storage

    def _make_disk(self) -> None:
        wanted = next((fault for fault in self.faults if fault.needs_disk), None)
        if wanted is not None and can_mount():
            self.disk = SmallDisk(self.root if wanted.target == "checkpoints" else self.output)

    def _keep_disk(self) -> None:
        """What a small disk holds stays in its folder if there was a problem."""
        kept = self.folder / "disk"
        if self.problems:
            shutil.copytree(self.disk.folder, kept, dirs_exist_ok=True)
        self.disk.close()

    def _disk_of(self, fault: Fault) -> SmallDisk | None:
        """The disk, where it is the one that a fault names."""
        if self.disk is not None:
            folder = self.root if fault.target == "checkpoints" else self.output
            if self.disk.folder != folder:
                raise NotRunError("one small disk a round, and another folder has it")
        return self.disk

    # Checkpoints

    def _undamaged(self) -> dict[int, Path]:
        """Checkpoints that have their names, but for those that were damaged and are still the same folders."""
        found = {}
        for number, folder in finished_checkpoints(self.root).items():
            if number in self.damaged and self.damaged[number][1] == folder.stat().st_ino:
                continue
            self.damaged.pop(number, None)
            found[number] = folder
        return found

    def _remember(self) -> None:
        self.whole = max(self._undamaged(), default=0)

    def _strike_between(self, fault: Fault) -> None:
        """Damage, or a leftover."""
        dice, there = random.Random(fault.seed), self._undamaged()
        if fault.kind == "leftover":
            said = leave(self.root, there[max(there)], fault.what, dice)
        else:
            chosen = sorted(there, reverse=True)[: None if fault.target == "every" else 1]
            done = []
            for number in chosen:
                other = next((folder for n, folder in sorted(there.items(), reverse=True) if n != number), None)
                if text := damage(there[number], fault.what, dice, other):
                    self.damaged[number] = (text, there[number].stat().st_ino)
                    done.append(text)
            if not done:
                raise NotRunError(f"no file can be {fault.what}")
            said = ", ".join(done)
        self.launches[-1].remarks.append(f"then {said}")
        self._remember()

    def _between(self) -> None:
        """All faults that are next and strike between launches."""
        while self.pending and self.pending[0].between and self._undamaged():
            fault = self.pending.pop(0)
            try:
                self._strike_between(fault)
            except NotRunError as error:
                self.not_run.append(f"{fault}: {error}")

    # Launches

    def _launch(self) -> bool:
        """One launch; whether the run has come to its end and nothing is left to strike it."""
        if self.stopped():
            raise CampaignStopped
        layout = draw_layout(self.dice)
        if any(fault.target == "worker" for fault in self.pending):
            layout = replace(layout, num_workers=max(1, layout.num_workers))
        record = Launched(str(layout))
        self.launches.append(record)
        folder = self.folder / f"launch_{len(self.launches)}"
        marks = folder / "marks"
        self.expected = self.whole
        launch = Launch(self.recipe, self.output, layout, folder, marks, self.interpreters, self.patience)
        try:
            struck, came = self._strike_while(launch, record)
        finally:
            launch.tree.look()
            left = launch.tree.everything()
            if self.stopped() or launch.tree.living_ranks() or launch.process.poll() is None:
                launch.close()
            lift(launch, self.disk)
        self.left += [(len(self.launches), process) for process in left]
        said = launch.said()
        record.seconds, record.iteration = round(time.monotonic() - launch.began, 1), iteration(self.output)
        if said.stopped:
            self.stops.add(record.iteration)
        self._judge(launch, said, struck, came)
        if said.finished:
            record.ended = "finished"
        self._between()
        return said.finished and not self.damaged and not (self.pending and self.pending[0].between)

    def _strike_while(self, launch: Launch, record: Launched) -> tuple[list[Fault], str]:
        """Lets faults strike a launch until it ends: which did, and "ended" or "hung"."""
        struck: list[Fault] = []
        stops: list[float] = []

        def checked(there: Callable[[], bool]) -> Callable[[], bool]:
            def asked() -> bool:
                if self.stopped():
                    raise CampaignStopped
                if stops and time.monotonic() > stops[0]:
                    stops.clear()
                    lift(launch, self.disk)
                return there()

            return asked

        watch = launch.watch
        launch.watch = lambda there, pause=0.005: watch(checked(there), pause)  # type: ignore[method-assign]
        while self.pending:
            fault = self.pending[0]
            moment = fault.moment
            if fault.between:  # which needs checkpoints, and an end
                enough = 1 + fault.seed % 3
                came = launch.watch(lambda: len(finished_checkpoints(self.root)) >= enough)  # noqa: B023
                moment = moment if moment.name in ("stepping", *OF_A_SAVE) else _SOON
            else:
                came = "there"
            came = wait_for(moment, launch) if came == "there" else came
            if came != "there":
                return struck, came
            parts = [path.name for path in self.root.glob("iter_*.part")]
            self._remember()
            self._digests = _digests(self.root) if fault.kind == "nan" else {}
            try:
                if fault.between:
                    kill_all(launch)
                    done = f"SIGKILL to all before {fault}"
                    struck.append(replace(fault, kind="signal", what="SIGKILL", target="all"))
                else:
                    self.pending.pop(0)
                    done = strike(fault, launch, self._disk_of(fault) if fault.needs_disk else self.disk)
                    struck.append(fault)
                    if fault.kind == "storage" and fault.seconds:
                        stops[:] = [time.monotonic() + fault.seconds]
                record.struck.append(f"{done}, {_where(launch, parts, fault)}")
            except NotRunError as error:
                self.not_run.append(f"{fault}: {error}")
            if fault.between or fault.kind == "nan":  # which ends the run, some steps later
                break
        return struck, launch.watch(lambda: False, 0.02)

    # Judgement

    def _judge(self, launch: Launch, said: Said, struck: list[Fault], came: str) -> None:
        record = self.launches[-1]
        record.ended = record.ended or _ending(launch, said)
        if came == "hung":
            self._problem("hung", f"no progress, and no end by its watchdogs; {self._kept_stacks()}")
            return
        if said.timed_out:
            line = next(line for line in said.everything.splitlines() if "made no progress for" in line)
            if any(_stops_one_rank_early(fault) for fault in struck):
                # It ends with status 0, which tells the launcher nothing, so the others wait for it up to their limit.
                record.remarks.append(f"one rank alone was stopped before the first step: {line}")
            else:
                self._problem("hung", f"{line}; {self._kept_stacks()}")
        damaged = bool(self.damaged)
        refused = self._judge_start(said, struck)
        if said.finished or said.timed_out or refused:
            return
        if any(fault.kind == "nan" for fault in struck):
            self._judge_nan(said)
        problem = unclear(launch.process.returncode, said, struck, damaged)
        if problem:
            self._problem("unclear", problem)
        if said.tracebacks and not problem:
            record.remarks.append(f"tracebacks of ranks: {sorted(set(said.tracebacks.values()))[0][:160]}")

    def _kept_stacks(self) -> str:
        """Moves the stacks of a watchdog into the round's folder, and says where."""
        stacks, kept = self.output / "stacks", self.folder / f"stacks_{len(self.launches)}"
        if not stacks.is_dir():
            return "without stacks"
        shutil.copytree(stacks, kept, dirs_exist_ok=True)
        shutil.rmtree(stacks)
        return f"stacks of {len(list(kept.glob('*.txt')))} ranks in {kept}"

    def _judge_start(self, said: Said, struck: list[Fault]) -> bool:
        """Where it went on from; whether it refused to start."""
        record, damaged = self.launches[-1], self.damaged
        if said.resumed is None:
            if damaged and not struck:
                self._judge_refusal(said)
                return True
            return False
        name, record.resumed = said.resumed
        if used := next((text for text, _ in damaged.values() if text.startswith(f"{name}/") and name), None):
            self._problem("silent", f"it went on from {name} although {used}")
        elif damaged and max(damaged) > record.resumed:
            named = [n for n in damaged if n > record.resumed and f"iter_{n:07d}" not in said.everything]
            if named:
                self._problem("unclear", f"nothing was said of {damaged[named[0]][0]}")
        if record.resumed < self.expected:
            self._problem("lost", f"it went on from {record.resumed}, and {self.expected} was whole")
        damaged.clear()
        return False

    def _judge_refusal(self, said: Said) -> None:
        """It did not start, on damaged checkpoints: right if none is whole. They are removed, as it asks."""
        whole, texts = self._undamaged(), [text for text, _ in self.damaged.values()]
        if whole:
            last = next(iter(said.error_lines or said.tracebacks.values()), "nothing")
            self._problem("unclear", f"it did not start although {max(whole)} is whole: {texts}; it said {last[:300]}")
        elif not any(f"iter_{number:07d}" in line for number in self.damaged for line in said.error_lines):
            self._problem("unclear", f"it did not start, and named none of {texts}")
        for number in self.damaged:
            shutil.rmtree(finished_checkpoints(self.root)[number])
        self.damaged.clear()
        self._remember()

    def _judge_nan(self, said: Said) -> None:
        """A loss of NaN ends the run with a message; nothing is saved after, and nothing that was saved changes."""
        if not any("nan" in line and line.startswith("error: iteration") for line in said.error_lines):
            self._problem("unclear", f"NaN is not named: {said.error_lines or said.tracebacks}")
            return
        line = next(line for line in said.error_lines if line.startswith("error: iteration"))
        number = int(line.split()[2].rstrip(":"))
        if later := [n for n in finished_checkpoints(self.root) if n >= number]:
            self._problem("silent", f"NaN in step {number}, and a checkpoint of step {max(later)}")
        after = _digests(self.root)
        if changed := [name for name, digest in self._digests.items() if after.get(name, digest) != digest]:
            self._problem("silent", f"NaN in step {number} changed {changed[0]}")

    def _check_left(self) -> None:
        """Readers and writers of ranks that ended must end too."""
        until = time.monotonic() + _GRACE
        while (left := [one for one in self.left if alive(one[1])]) and time.monotonic() < until:
            time.sleep(0.1)
        for number, process in left:
            try:
                words = " ".join(process.cmdline())[:160]
            except psutil.Error:
                continue
            self.problems.append(("hung", f"launch {number}: it left a process behind: {process.pid} {words}"))


#: In the place of a moment that says nothing of a run that has checkpoints.
_SOON = Moment("stepping", 1, 0.05)


def _digests(root: Path) -> dict[str, str]:
    """Of every file of every checkpoint that has its name."""
    found = {}
    for folder in finished_checkpoints(root).values():
        for path in files_of(folder):
            with contextlib.suppress(FileNotFoundError):  # an old one is removed meanwhile
                found[str(path.relative_to(root))] = hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


def _where(launch: Launch, parts: list[str], fault: Fault) -> str:
    """Where the run is that was struck, and what of its checkpoints was unfinished then."""
    words = [f"step {iteration(launch.output)} after {time.monotonic() - launch.began:.1f} s", *parts]
    return ", ".join(words + [f"for {fault.seconds:.1f} s"] * (fault.kind == "storage" and fault.seconds > 0))


def _stops_one_rank_early(fault: Fault) -> bool:
    """Whether a fault tells one rank, and no other, to stop before the first step."""
    stops = fault.kind == "signal" and fault.what in ("SIGTERM", "SIGINT", "SIGUSR1")
    return stops and fault.target == "rank" and fault.moment.name in ("starting", "loading")


def _ending(launch: Launch, said: Said) -> str:
    """How a launch ended, for the log."""
    how = "stopped by a signal, " if said.stopped else ""
    return f"{how}launcher's status {launch.process.returncode}"


def unclear(status: int, said: Said, struck: list[Fault], damaged: bool) -> str | None:
    """What is not clear about the end of a launch that did not finish, or None.

    A signal that ends a process is clear where the launcher's report names it as the root cause, or where it ended the
    launcher itself: the other ranks then say what their collectives say. It explains nothing of a fault of storage or
    data that came later. Elsewhere a traceback is no message to a user, but for that of KeyboardInterrupt.

    Args:
        status: of the launcher; negative: the signal that ended it.
        said: by launcher and ranks.
        struck: faults that struck.
        damaged: whether checkpoints were damaged, on which the run may well refuse to start.
    """
    causes = [number for number, fault in enumerate(struck) if fault.kind in ("storage", "nan")]
    signals = {fault.what for fault in struck[max(causes, default=-1) + 1 :] if fault.kind == "signal"}
    _, _, root_cause = said.launcher.partition("Root Cause (first observed failure):")
    if any(f"({name}) received by PID" in root_cause for name in signals):
        return None
    if status < 0 and signal.Signals(-status).name in signals:
        return None
    tracebacks = {rank: last for rank, last in said.tracebacks.items()
                  if not ("SIGINT" in signals and "KeyboardInterrupt" in last)}  # fmt: skip
    if tracebacks:
        rank, last = next(iter(tracebacks.items()))
        return f"rank {rank} ended with a traceback: {last[:300]}"
    if (
        said.stopped
        or said.tracebacks
        or any(f"got signal: {getattr(signal, name)}" in said.launcher for name in signals)
    ):
        return None
    if not said.error_lines:
        return f"it ended with status {status} and named no cause: {said.everything.strip()[-300:]}"
    if any(fault.kind == "storage" for fault in struck) and not any("/" in line for line in said.error_lines):
        return f"no file is named: {said.error_lines[0][:300]}"
    if not struck and not damaged:
        return f"it ended without a fault: {said.error_lines[0][:300]}"
    return None
