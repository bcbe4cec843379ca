"""The datasets of a recipe (`data.builder`), in a run whose storage never answers: a save makes NOTED, and waits."""

import os
import time
from dataclasses import replace
from pathlib import Path

from megatron_mm.checkpoints.save import Saver
from megatron_mm.data.reading.dataset import build_datasets


def build(config):
    """The splits of a run."""

    def held(*_):
        """What the run calls to save."""
        Path(os.environ["NOTED"]).touch()
        time.sleep(86400)

    Saver.begin = held
    return build_datasets(replace(config, data=replace(config.data, builder=None)))
