"""Trains a tiny recipe under random faults, restarts it in random layouts, and compares it with the run without faults.

    python -m tests.faults --rounds 20 --seed 1
    python -m tests.faults --rounds 300 --seed 1 --folder outputs/faults --jobs 2 --resume

Each round is a run of 36 steps on two to four processes. One to three faults strike it at random moments: signals to
ranks, launcher, readers and checkpoint writers, a full or read-only disk, NaN, damaged checkpoints. It is started again
until it ends; then sample ids, losses and final weights are compared. Ends with status 1 if any round differs silently,
lost steps beyond its last checkpoint, hung, or ended without a clear message. Root can also mount small disks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import tyro

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from megatron_mm.config.outputs import UsageError
from megatron_mm.platform.tool import run_tool
from tests.support import warm_python


@dataclass
class Args:
    """Run a campaign of faults."""

    rounds: int = 20
    """Rounds of the whole campaign."""
    seed: int = 0
    """The same seed draws the same faults and layouts, round by round; when they strike depends on the machine."""
    folder: str = "outputs/faults"
    """Folder of the log (rounds.jsonl) and of what is left of rounds with a problem."""
    resume: bool = False
    """Go on with the campaign in the folder: its rounds that are in the log are not run again."""
    jobs: int = 1
    """Rounds at a time."""
    patience: float = 30.0
    """Seconds without progress after which a run counts as hung."""
    interpreters: bool = False
    """Start launcher and ranks as interpreters of their own, not as forks; a round takes twice as long."""


def main() -> int:
    """Runs the rounds, prints each and the table."""
    args = tyro.cli(Args, description=__doc__)
    for name in ("rounds", "jobs", "patience"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must be above 0")
    with warm_python.served():
        from pathlib import Path

        from tests.faults.campaign import Campaign, lines_of, table

        campaign = Campaign(Path(args.folder), args.seed, args.interpreters, args.patience, args.resume)
        for outcome in campaign.run(args.rounds, args.jobs):
            print(*lines_of(outcome, args.rounds), sep="\n", flush=True)
        print(*table(campaign.records()), sep="\n")
    return int(campaign.failed())


if __name__ == "__main__":
    run_tool(main, left="the log has the rounds that were done; --resume goes on")
