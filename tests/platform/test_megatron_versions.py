"""Releases of megatron-core: what is listed as different is so in the installed one, and nothing is said about it."""

import importlib.metadata
import inspect
import logging
import pkgutil
import warnings

import pytest

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.save import save
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import megatron_versions, setup
from megatron_mm.training.optimizer import Optimizer
from tests.support.recipes import small_vlm

pytestmark = pytest.mark.interface


def exists(name: str) -> bool:
    """Whether megatron-core has `module.name`, or `module.function(argument)`."""
    name, _, argument = name.rstrip(")").partition("(")
    owner, _, attribute = name.rpartition(".")
    found = getattr(pkgutil.resolve_name(owner), attribute, None)
    return found is not None and (not argument or argument in inspect.signature(found).parameters)


@pytest.mark.parametrize("difference", megatron_versions.DIFFERENCES, ids=lambda difference: difference.name)
def test_the_installed_release_is_as_listed(difference):
    setup.apply_platform()
    assert exists(difference.name) == difference.is_here


def test_series_are_known_and_not_single_releases(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.7rc1")
    megatron_versions.prepare()
    assert megatron_versions.MLP_BUILDER.is_here
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    assert not megatron_versions.MLP_BUILDER.is_here
    with pytest.raises(ValueError, match=r"megatron-core 0\.17\.1 was not tried; install one of: 0\.16\.1, 0\.19\.2"):
        megatron_versions.prepare()


def test_only_one_file_asks_for_the_release():
    from pathlib import Path

    own = Path(megatron_versions.__file__)
    asking = ('version("megatron', "megatron.core.__version__", "package_info", "is_here")
    for path in own.parents[1].rglob("*.py"):
        assert path == own or not any(word in path.read_text() for word in asking), path


def test_a_model_is_built_saved_and_loaded_without_a_word(tmp_path, caplog):
    """What 0.19 has to say would be said on every process, for every layer and checkpoint."""
    device = setup.initialize(ParallelSizes(), seed=1)
    caplog.set_level(logging.WARNING)
    config = small_vlm()
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=1)
    optimizer = Optimizer(config, pipeline)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", FutureWarning)
        megatron_versions.prepare()
        folder = save(config, tmp_path, pipeline, optimizer, Position(1, 8))
        assert checkpoint.load(folder, pipeline, optimizer) == Position(1, 8)
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in warned if warning.category in (UserWarning, FutureWarning)] == []
