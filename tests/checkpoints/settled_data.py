"""The datasets of a recipe (`data.builder`), in a run whose saves are done before the next step, however slow the disk.

KILLED names a step and a rank: in the step after, that process kills itself.
"""

import os
import signal
from dataclasses import replace

from megatron_mm.checkpoints.save import Saver
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.training.tracking import Tracker


def build(config):
    """The splits of a run."""
    begin, record = Saver.begin, Tracker.record

    def settled(saver, *words):
        return begin(saver, *words) or saver.wait()

    def killed(tracker, figures):
        record(tracker, figures)
        if f"{figures['iteration'] - 1} {os.environ['RANK']}" == os.environ.get("KILLED"):
            os.kill(os.getpid(), signal.SIGKILL)

    Saver.begin, Tracker.record = settled, killed
    return build_datasets(replace(config, data=replace(config.data, builder=None)))
