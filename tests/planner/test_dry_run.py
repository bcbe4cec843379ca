"""The dry run against what it predicts: parameters of built models, FLOPs of node costs, bytes that autograd keeps."""

import json
import subprocess
import sys

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.platform import setup, stopping
from tests.support.balance import slowest_over_mean
from tests.support.full_recipes import PHASES, dry_run, estimates, launched
from tests.support.programs import PYTHON
from tests.support.recipes import small_config, small_perceiver_fusion


def run_dry(path, world_size: int, output, *words: str) -> dict:
    command = [PYTHON, "pretrain_multimodal.py", "--config", str(path), "--dry-run"]
    command += ["--world-size", str(world_size), "--dry-run-json", str(output), *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_small_model(tmp_path):
    """One process against four: the same parameters in all, FLOPs that add up to the costs, and shards of them."""
    setup.apply_platform()
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.planner.assembly import full_plan, layer_settings
    from megatron_mm.planner.costs import model_flops
    from megatron_mm.systems.graph import build_graph

    config = small_config()
    dump_config(config, tmp_path / "r.yaml")
    one = run_dry(tmp_path / "r.yaml", 1, tmp_path / "one.json")
    graph = build_graph(config.model, layer_settings(config, ParallelSizes(), "cpu"))
    assert one["stages"][0]["parameters"] == one["total_parameters"]
    assert one["stages"][0]["flops"] == pytest.approx(model_flops(graph, full_plan(config)), rel=0.05)
    assert one["stages"][0]["communicated"] == {}

    fused = ["--model.backend", "transformer_engine", "--gradient-accumulation-fusion"]
    (stage,) = run_dry(tmp_path / "r.yaml", 1, tmp_path / "fused.json", *fused)["stages"]
    assert {**stage, "seconds": 0} == {**one["stages"][0], "seconds": 0}  # planned without it

    words = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    four = run_dry(tmp_path / "r.yaml", 4, tmp_path / "four.json", *words)
    own = [stage["parameters"] for stage in four["stages"]]
    assert one["total_parameters"] / 2 < sum(own) < one["total_parameters"]  # matrices are halved, norms are not
    assert four["stages"][0]["communicated"]["send/receive (pipeline)"] > 0
    assert any("reduce" in kind for kind in four["stages"][0]["communicated"])

    full = run_dry(tmp_path / "r.yaml", 1, tmp_path / "full.json", "--recompute-granularity", "full")
    assert full["stages"][0]["activation_bytes"] < one["stages"][0]["activation_bytes"]
    assert full["stages"][0]["flops"] > 1.2 * one["stages"][0]["flops"]


@pytest.mark.slow
def test_activations_on_the_host_leave_the_device(tmp_path):
    """No more leaves than arrives: what a later layer reads too stays as well."""
    config = changed(
        small_config(),
        {
            "training.micro_batch_size": 64,  # tensors of more than a mebibyte
            "training.global_batch_size": 128,
        },
    )
    dump_config(config, tmp_path / "r.yaml")
    none, some = (
        run_dry(tmp_path / "r.yaml", 1, tmp_path / "r.json", "--cpu-offloading-num-layers", str(layers))["stages"][0]
        for layers in (0, 6)
    )
    assert none["host_bytes"] == 0
    assert 0.3 * some["host_bytes"] < none["activation_bytes"] - some["activation_bytes"] <= some["host_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_partitioner_counts_as_the_dry_run_what_waits_on_the_host(recompute, monkeypatch):
    setup.apply_platform()
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.pipeline import offload
    from megatron_mm.planner import dry_run as planner

    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    config = changed(small_config(), {"parallel.recompute_granularity": recompute})

    def memory(layers: int) -> tuple[float, int]:
        offloading = changed(config, {"performance.cpu_offloading_num_layers": layers})
        return estimates(offloading, ParallelSizes())[0], planner.dry_run(offloading, 1).stages[0].memory_bytes

    before, after = memory(0), memory(4)
    assert before[1] - after[1] > 1e4
    assert before[0] - after[0] == pytest.approx(before[1] - after[1], rel=0.1)


@pytest.mark.slow
def test_the_balance_counts_the_first_pass_of_losses_over_the_whole_batch(tmp_path):
    """Towers run it and fusion does not; truth is the nodes' own costs, by which the pipeline is cut."""
    setup.apply_platform()
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.planner.assembly import Assembly

    config = changed(
        small_perceiver_fusion(contrastive={"embedding_size": 16, "negatives": "batch"}),
        {
            "parallel.pipeline_model_parallel_size": 2,
            "parallel.pipeline_cuts": ["perceiver.latents"],
        },
    )
    sizes = ParallelSizes(pp=2)
    dump_config(config, tmp_path / "r.yaml")
    found = run_dry(tmp_path / "r.yaml", 2, tmp_path / "r.json")["slowest_over_mean"]

    def balance(config: Config) -> float:
        assembly = Assembly.of(config, sizes)
        return slowest_over_mean(assembly.times, assembly.cuts)

    assert found == pytest.approx(balance(config), rel=0.02)
    one = changed(config, {"training.global_batch_size": config.training.micro_batch_size})  # microbatch, so one pass
    assert found != pytest.approx(balance(one), rel=0.04)


@pytest.mark.slow
def test_synapse_70b_on_256_processes(tmp_path):
    """By its script: 70.4B parameters; stages under 80 GB, the slowest at most 1.10 x the mean; shards that add up."""
    result = dry_run("synapse-70b", "joint", tmp_path / "70b.json")
    assert f"{result['total_parameters'] / 1e9:.1f}" == "70.4"
    assert len(result["stages"]) == 8
    assert all(stage["memory_bytes"] < 80e9 for stage in result["stages"])
    assert result["slowest_over_mean"] <= 1.10 and "in chunk" in result["bottleneck"]
    estimated = estimates(*launched("synapse-70b"))
    assert [stage["memory_bytes"] for stage in result["stages"]] == pytest.approx(estimated, rel=0.10)
    sharded = sum(stage["parameters"] for stage in result["stages"]) * 8
    assert sharded == pytest.approx(result["total_parameters"], rel=1e-3)


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_every_stage_of_a_full_recipe_is_estimated_under_80_gb(name, phase):
    """By the partitioner's figures, which take no time; the dry run above says how near they are."""
    config, sizes = launched(name, phase)
    stages = estimates(config, sizes)
    assert len(stages) == sizes.pp
    assert max(stages) < 80e9


def test_what_fails_in_a_dry_run_is_raised_or_said(monkeypatch, capsys):
    """Its fake group has no other ranks, so that no error may be left to one of them to say."""
    monkeypatch.delenv("MEGATRON_MM_TRACEBACK", raising=False)
    monkeypatch.setattr(stopping, "exit_at_once", sys.exit)
    setup.shutdown()  # of an earlier test's group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with pytest.raises(NotImplementedError, match="no kernel"), setup.reporting_errors():
            raise NotImplementedError("no kernel")
        with pytest.raises(SystemExit), setup.reporting_errors():
            raise ValueError("no such layer")
    finally:
        dist.destroy_process_group()
    assert "error: no such layer" in capsys.readouterr().err
