"""The datasets of a recipe (`data.builder`), in a run that waits for a signal after the step that HELD_AFTER names.

Such a run is not at its end when a test sends it a signal, however fast it is, or however long the test takes.
"""

import os
import time
from dataclasses import replace

from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.platform import stopping
from megatron_mm.training.tracking import Tracker


def build(config):
    """The splits of a run."""
    record = Tracker.record

    def held(tracker: Tracker, figures: dict) -> None:
        """What the run calls on every process after each step."""
        record(tracker, figures)
        while figures["iteration"] == int(os.environ["HELD_AFTER"]) and stopping.asked() is None:
            time.sleep(0.01)

    Tracker.record = held
    return build_datasets(replace(config, data=replace(config.data, builder=None)))
