"""A dataset (`data.builder`) that never hands the second process its third global batch.

The watchdogs lose their patience only there: how long a machine takes to get so far is no hang.
"""

import os
import time
from types import SimpleNamespace

from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.training.resilience import Watchdog

_beat = Watchdog.beat
_watchdogs: list[Watchdog] = []


def _remembered_beat(watchdog: Watchdog, where: str) -> None:
    """What the run calls before each step: leaves its watchdog here."""
    _watchdogs[:] = [watchdog]
    _beat(watchdog, where)


class StuckRows(GeneratedRows):
    """Random rows, until one process waits for ever."""

    def microbatch(self, index, fields=(), task=""):
        """The rows, or nothing at all."""
        rows = super().microbatch(index, fields, task)
        if min(index) >= 2 * self.config.training.global_batch_size:
            (watchdog,) = _watchdogs
            watchdog.beat(watchdog._where)
            watchdog.seconds = 10.0
            while os.environ["RANK"] == "1":
                time.sleep(1.0)
        return rows


def build(config):
    """The splits of a run."""
    Watchdog.beat = _remembered_beat
    return SimpleNamespace(train=StuckRows(config), valid=None, test=None, tokenizer=None)
