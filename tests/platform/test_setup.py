"""Process groups: those of one layout are made once, and those of another end with their threads."""

import os

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import setup
from tests.support.waiting import wait_until

pytestmark = pytest.mark.interface


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def names() -> set[str]:
    """Of torch's groups; a group that something holds keeps its threads."""
    return set(dist.distributed_c10d._world.pg_names.values())


def test_groups_of_the_same_layout_are_kept():
    setup.initialize(ParallelSizes(), seed=1)
    group = parallel_state.get_tensor_model_parallel_group()
    setup.initialize(ParallelSizes(), seed=2)
    assert parallel_state.get_tensor_model_parallel_group() is group


def test_groups_that_are_made_anew_leave_no_threads():
    # The groups that earlier tests left may be held by their models: what counts begins with a set of our own.
    setup.initialize(ParallelSizes(), seed=1, timeout_minutes=2)
    groups, before = names(), threads()
    for minutes in (3, 4, 5):
        setup.initialize(ParallelSizes(), seed=1, timeout_minutes=minutes)
    assert len(names()) == len(groups) and names() & groups == {dist.group.WORLD.group_name}
    wait_until(lambda: threads() <= before, "the threads of dropped groups have ended")


def test_shut_down_and_started_again():
    setup.initialize(ParallelSizes(), seed=1)
    setup.shutdown()
    assert not dist.is_initialized()
    setup.initialize(ParallelSizes(), seed=1)
    assert parallel_state.model_parallel_is_initialized()
