"""Every test of models runs in a process group of one, with megatron-core's groups of size 1."""

import pytest

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import setup


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)
