"""A dataset (`data.builder`) that never hands the second process its third global batch."""

import os
import time
from types import SimpleNamespace

from megatron_mm.data.generated import GeneratedRows


class StuckRows(GeneratedRows):
    """Random rows, until one process waits for ever."""

    def microbatch(self, index, fields=(), task=""):
        """The rows, or nothing at all."""
        if os.environ["RANK"] == "1" and min(index) >= 2 * self.config.training.global_batch_size:
            time.sleep(3600)
        return super().microbatch(index, fields, task)


def build(config):
    """The splits of a run."""
    return SimpleNamespace(train=StuckRows(config), valid=None, test=None, tokenizer=None)
