"""The campaign's short form, and that it sees what it is there to see. Truth: the run without faults."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.faults import damage
from tests.faults.campaign import Campaign, table
from tests.faults.comparison import differences
from tests.faults.faults import Fault, draw_faults, random_of
from tests.faults.moments import Moment
from tests.faults.one_round import Round, unclear
from tests.faults.training import STEPS, Said, finished_checkpoints

SIGKILL_ALL = Fault("signal", "SIGKILL", "all", Moment("copying", 2, 0.002), 0.0, 1)
MISSING = Fault("damage", "missing", "newest", Moment("stepping", 1, 0.0), 0.0, 2)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    made = Campaign(tmp_path_factory.mktemp("faults"), seed=0, interpreters=False, patience=300.0, resume=False)
    return made, *made.prepare()


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_and_loses_a_file_is_as_if_it_were_not(campaign):
    made, corpus, undisturbed = campaign
    folder = made.folder / "round_0"
    faults = [SIGKILL_ALL, MISSING]
    outcome = Round(0, 0, folder, corpus, undisturbed, interpreters=False, patience=300.0, faults=faults).run()
    assert outcome.verdict == "survived" and not outcome.not_run, outcome.record()
    first, *_, last = outcome.launches
    assert first.resumed == 0 and "iter_0000012.part" in first.struck[0], "the kill came within the third save"
    assert last.resumed == 4 and last.ended == "finished" and last.iteration == STEPS
    lines = table([outcome.record()])
    assert lines[-3].split() == ["all", "rounds", "1", "1", "0", "0", "0", "0"]


@pytest.mark.slow
def test_what_differs_is_found(campaign, tmp_path):
    """A sample, a loss and a weight, each by itself, in a copy of the run without faults."""
    _, _, undisturbed = campaign
    assert differences(undisturbed, undisturbed) == []
    ours = tmp_path / "run"
    shutil.copytree(undisturbed, ours)
    lines = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    lines[4]["sample_ids"][2:4] = reversed(lines[4]["sample_ids"][2:4])
    lines[7]["loss"] *= 1 + 2e-5
    (ours / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = finished_checkpoints(ours / "checkpoints")
    shutil.rmtree(last[STEPS])
    last[STEPS - 4].rename(last[STEPS])
    samples, loss, weights = differences(ours, undisturbed)
    assert samples == "step 5 read other samples" and loss.startswith("loss of step 8 is")
    assert weights.startswith("weights differ by")


def test_a_campaign_goes_on_with_its_own_seed_only(tmp_path):
    Campaign(tmp_path / "faults", 3, interpreters=False, patience=30.0, resume=False)
    Campaign(tmp_path / "faults", 3, interpreters=False, patience=30.0, resume=True)
    with pytest.raises(ValueError, match="begun with --seed 3, not 4"):
        Campaign(tmp_path / "faults", 4, interpreters=False, patience=30.0, resume=True)
    with pytest.raises(ValueError, match="is not empty"):
        Campaign(tmp_path / "faults", 3, interpreters=False, patience=30.0, resume=False)


def test_a_round_is_drawn_by_seed_and_number():
    drawn = [[fault.record() for fault in draw_faults(random_of(seed, 7))] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    kinds = {fault.kind for number in range(200) for fault in draw_faults(random_of(1, number))}
    assert kinds == {"signal", "pause", "slow", "storage", "damage", "leftover", "nan"}


@pytest.mark.parametrize("way", damage.WAYS)
def test_damage_changes_one_file(way, tmp_path):
    for name in ("iter_0000004", "iter_0000008"):
        (tmp_path / name / "pieces").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(name)
        (tmp_path / name / "pieces" / "0.bin").write_bytes(name.encode() * 1000)
    folder, other = tmp_path / "iter_0000008", tmp_path / "iter_0000004"
    before = _contents(folder)
    said = damage.damage(folder, way, random.Random(5), other)
    after = _contents(folder)
    (changed,) = [name for name in before if after.get(name) != before[name]]
    assert said == f"iter_0000008/{changed} {way}" and after.keys() <= before.keys()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRACEBACK = """Traceback (most recent call last):
[rank1]:   File "pretrain_multimodal.py", line 54, in <module>
[rank1]: RuntimeError: Connection closed by peer
"""
REPORT = "Root Cause (first observed failure):\n  traceback : Signal 9 (SIGKILL) received by PID 7"
FULL = Fault("storage", "full disk", "checkpoints", Moment("saving", 0, 0.0), 0.0, 0)


@pytest.mark.parametrize(
    ("status", "launcher", "errors", "faults", "problem"),
    [
        (1, REPORT, TRACEBACK, [SIGKILL_ALL], None),  # one rank was killed, and the launcher says so
        (-9, "", TRACEBACK, [SIGKILL_ALL], None),  # the launcher was
        (1, "exitcode: 1", TRACEBACK, [SIGKILL_ALL], "rank 1 ended with a traceback: RuntimeError: Connection closed"),
        (1, "", "error: checkpoint /c/iter_0000004 was not written: OSError: no space", [FULL], None),
        (1, "", "error: [Errno 28] No space left on device", [FULL], "no file is named"),
        (-9, "", "error: [Errno 28] No space left on device", [SIGKILL_ALL, FULL], "no file is named"),
        (1, "", "", [FULL], "named no cause"),
        (1, "", "error: /data: no such file", [], "it ended without a fault"),
    ],
)
def test_an_end_is_clear_if_it_names_file_or_cause(status, launcher, errors, faults, problem):
    said = unclear(status, Said(launcher, "", {1: errors}), faults, damaged=False)
    assert (said is None) if problem is None else (said is not None and problem in said)
