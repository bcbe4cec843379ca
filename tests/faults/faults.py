"""The faults of a campaign: how they are drawn, and how they strike a launch that runs.

Damage of a checkpoint and leftovers strike between two launches (damage.py); the others at a moment (moments.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults import damage
from tests.faults.moments import ANY, LATER, OF_A_SAVE, Moment, draw_moment
from tests.faults.processes import send
from tests.faults.storage import SmallDisk, limit_files
from tests.faults.training import BATCH, Launch, files_of, finished_checkpoints, iteration


class NotRunError(Exception):
    """A fault cannot strike here; the message says why."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind: "signal" (also SIGKILL), "pause", "slow", "storage", "nan", "damage" or "leftover".
        what: a signal; what befalls storage or a file; for "damage", the way.
        target: of a signal: "rank", "all", "launcher", "worker", "writer"; of storage: "checkpoints" or "output", the
            folder that is a disk of its own; of damage: "newest" or "every" checkpoint.
        moment: at which it strikes; of damage: after which all processes are killed, if a launch runs.
        seconds: how long a pause or a fault of storage lasts; of storage 0: until the launch ends, or until another
            fault of storage does.
        seed: of everything else that is drawn.
    """

    kind: str
    what: str
    target: str
    moment: Moment
    seconds: float
    seed: int

    @property
    def between(self) -> bool:
        """Whether it strikes between two launches."""
        return self.kind in ("damage", "leftover")

    @property
    def needs_disk(self) -> bool:
        """Whether it needs a small disk of its own."""
        return self.kind == "storage" and self.what != "write error"

    def __str__(self) -> str:
        if self.kind == "leftover":
            return self.what
        if self.kind == "damage":
            return f"{self.target} {self.what}"
        return " ".join(filter(None, (self.what, self.target, f"@{self.moment}")))

    def record(self) -> dict:
        """For the log."""
        return asdict(self)


_SIGNALS = [
    *[("signal", "SIGKILL", target, 1.0) for target in ("rank", "all", "launcher", "worker", "writer")],
    *[
        ("signal", name, target, 0.6)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        for target in ("rank", "all", "launcher")
    ],
]
_STORAGE = [
    *[("storage", what, "checkpoints", 0.8) for what in ("full disk", "no inodes", "read-only", "write error")],
    *[("storage", what, "output", 0.3) for what in ("full disk", "no inodes")],
]
_DAMAGE = [(kind, way, target, weight) for way in damage.WAYS for kind, target, weight in (
    ("damage", "newest", 0.8), ("damage", "every", 0.15))]  # fmt: skip
#: Kind, what, target, and how often among all.
KINDS = [
    *_SIGNALS,
    ("pause", "SIGSTOP", "rank", 1.0),
    ("slow", "SIGSTOP bursts", "rank", 0.7),
    *_STORAGE,
    *_DAMAGE,
    *[("leftover", what, "", 0.4) for what in damage.LEFTOVERS],
    ("nan", "NaN", "", 1.0),
]


def draw_faults(dice: random.Random) -> list[Fault]:
    """One to three faults, in the order in which they strike."""
    found: list[Fault] = []
    for kind, what, target, _ in dice.choices(KINDS, [weight for *_, weight in KINDS], k=dice.randint(1, 3)):
        # A launch that goes on after the fault before has begun; readers and writers are there later than ranks.
        goes_on = bool(found) and found[-1].kind in ("pause", "slow", "storage")
        among = OF_A_SAVE if target == "writer" else LATER if goes_on or target == "worker" else ANY
        longest = {"pause": 4.0, "storage": 6.0}.get(kind, 0.0)
        seconds = 0.0 if kind == "storage" and dice.random() < 0.5 else round(longest * dice.random(), 3)
        found.append(Fault(kind, what, target, draw_moment(dice, among), seconds, dice.randrange(1 << 30)))
    return found


def kill_all(launch: Launch) -> None:
    """Ends all processes of a launch, as a scheduler does."""
    send(launch.tree.known(), signal.SIGKILL)
    launch.tree.kill()


def strike(fault: Fault, launch: Launch, disk: SmallDisk | None) -> str:
    """Lets a fault strike a launch now; returns what was done.

    Args:
        fault: not one that strikes between launches.
        launch: which runs.
        disk: mounted on the folder that a fault of storage names.

    Raises:
        NotRunError: there is nothing that it could strike.
    """
    dice = random.Random(fault.seed)
    if fault.kind == "signal":  # at once, to what was there when it was last looked at
        return _signal(fault, launch, dice)
    if fault.kind in ("pause", "slow"):
        return _pause(fault, launch, dice)
    if fault.kind == "nan":
        first = iteration(launch.output) * BATCH
        (launch.marks / "nan").write_text(str(first))
        return f"NaN from sample {first}"
    return _storage(fault, launch, disk, dice)


def lift(launch: Launch, disk: SmallDisk | None) -> None:
    """Ends faults of storage and of data."""
    if disk is not None:
        disk.mend()
    limit_files(launch.tree.everything(), -1)
    (launch.marks / "nan").unlink(missing_ok=True)


def _signal(fault: Fault, launch: Launch, dice: random.Random) -> str:
    tree, number = launch.tree, getattr(signal, fault.what)
    if fault.moment.name == "starting":  # ranks are new, and those of a launcher that ends now would be nobody's
        tree.look()
    launcher = [tree.launcher] if tree.launcher is not None else []
    found = {
        "rank": tree.living_ranks,
        "all": tree.known,
        "launcher": lambda: launcher,
        "worker": tree.workers,
        "writer": tree.writers,
    }[fault.target]()
    if fault.target != "all" and found:
        found = [dice.choice(found)]
    reached = send(found, number)
    if fault.target == "all":  # and what was started since it was last looked at
        tree.look()
        reached += send([process for process in tree.everything() if process.pid not in reached], number)
    if not reached:
        raise NotRunError(f"there is no {fault.target}" if fault.target != "all" else "nothing runs")
    return f"{fault.what} to {len(reached)} process{'es' if len(reached) > 1 else ''} ({fault.target})"


def _pause(fault: Fault, launch: Launch, dice: random.Random) -> str:
    ranks = launch.tree.living_ranks()
    if not ranks:
        raise NotRunError("there is no rank")
    one = [dice.choice(ranks)]
    bursts = [fault.seconds] if fault.kind == "pause" else [0.02 + 0.1 * dice.random() for _ in range(20)]
    for seconds in bursts:
        send(one, signal.SIGSTOP)
        time.sleep(seconds)
        send(one, signal.SIGCONT)
        time.sleep(0.02)
    return f"a rank held {len(bursts)} times for {sum(bursts):.2f} s in all"


def _storage(fault: Fault, launch: Launch, disk: SmallDisk | None, dice: random.Random) -> str:
    newest = max(finished_checkpoints(launch.root).items(), default=(0, None))[1]
    sizes = [os.path.getsize(path) for path in files_of(newest) if path.exists()] if newest else []
    if fault.what == "write error":
        largest = int((max(sizes, default=200_000)) * dice.uniform(0.1, 0.9))
        limit_files([process for process in launch.tree.everything() if process != launch.tree.launcher], largest)
        return f"no file beyond {largest} bytes"
    if disk is None:
        raise NotRunError("mounting a small disk needs root with CAP_SYS_ADMIN")
    try:
        if fault.what == "full disk":
            free = 4096 if dice.random() < 0.3 else int(dice.uniform(0.2, 1.6) * (sum(sizes) or 4_000_000))
            disk.fill(free)
            return f"{free} bytes free in {Path(disk.folder).name}"
        if fault.what == "no inodes":
            free = dice.randint(0, 6)
            disk.take_inodes(free)
            return f"{free} inodes free in {Path(disk.folder).name}"
        disk.lock()
    except OSError as error:
        raise NotRunError(str(error)) from error
    return f"{Path(disk.folder).name} is read-only"


def random_of(seed: int, number: int) -> random.Random:
    """The dice of a round: the same for the same campaign, whatever rounds ran before."""
    return random.Random(f"faults {seed}/{number}")
