"""The datasets of a recipe (`data.builder`), in a run that waits for a signal after the step that HELD_AFTER names.

Such a run is not at its end when a test sends it a signal, however fast it is, or however long the test takes.
"""

import os
import time
from dataclasses import replace

from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.training.resilience import StopSignal


def build(config):
    """The splits of a run."""
    agreed, steps = StopSignal.agreed, 0

    def held(signals: StopSignal) -> bool:
        """What the run calls after each step."""
        nonlocal steps
        steps += 1
        while steps == int(os.environ["HELD_AFTER"]) and signals.received is None:
            time.sleep(0.01)
        return agreed(signals)

    StopSignal.agreed = held
    return build_datasets(replace(config, data=replace(config.data, builder=None)))
