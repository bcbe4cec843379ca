"""A campaign: rounds with numbers, a log with a line for each, and a table of what they came to.

FOLDER/campaign.json has the seed, FOLDER/rounds.jsonl a line for each round, FOLDER/round_N what is left of those with
a problem. A campaign that was interrupted goes on with the rounds that have no line.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_mm.config.outputs import UsageError
from megatron_mm.platform.atomic_files import write_whole
from tests.faults.one_round import PROBLEMS, CampaignStopped, Outcome, Round
from tests.faults.storage import mounted_below, unmount
from tests.faults.training import Launch, Layout, write_recipe
from tests.support.corpus import build_corpus

VERDICTS = ("survived", "lost", "silent", "hung", "unclear")


class Campaign:
    """Rounds in a folder.

    Args:
        folder: of log and rounds; made.
        seed: of what is drawn.
        interpreters: start interpreters, not forks.
        patience: seconds without progress that a run may take.
        resume: go on with the log that is there.

    Raises:
        UsageError: the folder has something else in it, or another campaign.
    """

    def __init__(self, folder: Path, seed: int, interpreters: bool, patience: float, resume: bool) -> None:
        self.folder, self.seed, self.interpreters, self.patience = folder.resolve(), seed, interpreters, patience
        self.log, settings = self.folder / "rounds.jsonl", self.folder / "campaign.json"
        self._stopped = threading.Event()
        if resume and settings.exists():
            if (begun := json.loads(settings.read_text())["seed"]) != seed:
                raise UsageError(f"--resume: the campaign in {folder} was begun with --seed {begun}, not {seed}")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UsageError(f"--folder: {folder} is not empty; name another one, or go on with --resume")
        for left in mounted_below(self.folder):  # by a campaign that was killed
            unmount(left)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(settings, json.dumps({"seed": seed}) + "\n")

    def records(self) -> list[dict]:
        """Lines of the log, in order of rounds."""
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # of a campaign that was killed
                continue
        return sorted(found, key=lambda record: record["round"])

    def prepare(self) -> tuple[tuple[Path, Path], Path]:
        """The data, and the output of the run without faults, of one process.

        Raises:
            ValueError: that run does not come to its end.
        """
        there, base = self.folder / "undisturbed" / "whole", self.folder / "undisturbed"
        dataset, tokenizer = base / "corpus" / "discs", base / "corpus" / "t.model"
        if there.exists():
            return (dataset, tokenizer), base / "run"
        shutil.rmtree(base, ignore_errors=True)
        corpus = build_corpus(base / "corpus")
        recipe = write_recipe(corpus, base / "run", self.patience)
        launch = Launch(
            recipe, base / "run", Layout(), base / "launch", base / "marks", self.interpreters, self.patience
        )
        try:
            launch.watch(lambda: False, 0.05)
        finally:
            launch.close()
        if not launch.said().finished:
            raise ValueError(f"the run without faults failed:\n{launch.said().everything[-2000:]}")
        there.touch()
        return corpus, base / "run"

    def run(self, rounds: int, jobs: int) -> Iterable[Outcome]:
        """Runs the rounds below `rounds` that have no line yet, and yields each when it is done.

        Args:
            rounds: of the whole campaign.
            jobs: rounds at a time.
        """
        corpus, undisturbed = self.prepare()
        done = {record["round"] for record in self.records()}

        def one(number: int) -> Outcome:
            folder = self.folder / f"round_{number}"
            return Round(
                number, self.seed, folder, corpus, undisturbed, self.interpreters, self.patience, self._stopped.is_set
            ).run()

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, number) for number in range(rounds) if number not in done]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    with self.log.open("a") as stream:
                        stream.write(json.dumps(outcome.record(), ensure_ascii=False) + "\n")
                    if not outcome.problems:
                        shutil.rmtree(self.folder / f"round_{outcome.round}", ignore_errors=True)
                    yield outcome
            except BaseException:
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def failed(self) -> bool:
        """Whether any round has a problem."""
        return any(record["problems"] for record in self.records())


def lines_of(outcome: Outcome, rounds: int) -> list[str]:
    """What is printed of a round."""
    head = f"round {outcome.round} of {rounds}: {outcome.verdict} after {outcome.seconds:.0f} s"
    lines = [f"{head}: {'; '.join(outcome.faults)}"]
    for number, launch in enumerate(outcome.launches, 1):
        way = "did not begin" if launch.resumed is None else f"from {launch.resumed} to {launch.iteration}"
        lines.append(f"    {number}  {launch.layout:<24} {way}, {launch.ended}, {launch.seconds:.0f} s")
        lines += [f"       {text}" for text in (*launch.struck, *launch.remarks)]
    lines += [f"    {kind}: {text}" for kind, text in outcome.problems]
    return lines + [f"    not run: {text}" for text in outcome.not_run]


def table(records: list[dict]) -> list[str]:
    """Rounds, launches and verdicts of each fault, and of all."""
    rows = [("fault", "rounds", *VERDICTS)]
    names = sorted({name for record in records for name in record["faults"]})
    kinds = sorted({name.partition(" @")[0] for name in names})
    for kind in kinds:
        among = [r["verdict"] for r in records if any(name.partition(" @")[0] == kind for name in r["faults"])]
        counts = Counter(among)
        rows.append((kind, str(len(among)), *(str(counts[verdict]) for verdict in VERDICTS)))
    counts = Counter(record["verdict"] for record in records)
    rows.append(("all rounds", str(len(records)), *(str(counts[verdict]) for verdict in VERDICTS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    launches = sum(len(record["launches"]) for record in records)
    seconds = sum(record["seconds"] for record in records)
    not_run = sum(len(record["not_run"]) for record in records)
    many = Counter(kind for record in records for kind in {kind for kind, _ in record["problems"]})
    problems = ", ".join(f"{many[kind]} {kind}" for kind in PROBLEMS)
    lines.append(f"{launches} launches, {seconds / max(1, len(records)):.0f} s a round; {not_run} faults met nothing")
    return [*lines, f"rounds with a problem, by its kind: {problems}"]


__all__ = ["Campaign", "CampaignStopped", "lines_of", "table"]
