"""Switches of performance: Megatron's names, what contradicts, what a device lacks, and what reaches megatron-core."""

import re
import subprocess

import pytest
import torch

from megatron_mm.config.load import RECIPES, parse_command_line
from megatron_mm.config.performance import Device
from megatron_mm.config.section import changed
from megatron_mm.config.validate import check, check_device, parallel_sizes
from tests.support.full_recipes import FULL, launched
from tests.support.programs import PYTHON
from tests.support.recipes import small_config, small_dual_encoder, small_vlm

A100, H100, CPU = Device("NVIDIA A100-SXM4-80GB", (8, 0)), Device("NVIDIA H100", (9, 0)), Device("a CPU", None)
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
BF16 = {"precision": "bf16"}


def configured(performance: dict, config=None, backend: str = "auto", parallel=(), training=()):
    sections = {"performance": performance, "parallel": dict(parallel), "training": dict(training)}
    changes = {f"{name}.{key}": value for name, fields in sections.items() for key, value in fields.items()}
    return changed(config or small_config(), {"model.backend": backend, **changes})


def refused(config, world: int = 2) -> str:
    with pytest.raises(ValueError) as caught:
        check(config, parallel_sizes(config, world))
    return str(caught.value)


def test_megatrons_names():
    words = ["--config", str(RECIPES / "synapse-tiny.yaml"), "--overlap-grad-reduce", "--overlap-param-gather"]
    words += ["--ddp-bucket-size", "1000", "--no-overlap-p2p-communication", "--tp-comm-overlap"]
    words += ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te", "--gradient-accumulation-fusion"]
    words += ["--fp8-format", "hybrid", "--fp8-recipe", "mxfp8", "--cuda-graph-impl", "local"]
    words += ["--cpu-offloading-num-layers", "3", "--recompute-granularity", "full", "--recompute-method", "uniform"]
    words += ["--recompute-num-layers", "1", "--recompute-modules", "core_attn"]
    config = parse_command_line(words).config
    performance = config.performance
    assert (performance.overlap_grad_reduce, performance.overlap_param_gather) == (True, True)
    assert (performance.ddp_bucket_size, performance.overlap_p2p_comm) == (1000, False) and performance.tp_comm_overlap
    assert performance.cross_entropy == "te" and performance.gradient_accumulation_fusion
    assert (performance.fp8_format, performance.fp8_recipe) == ("hybrid", "mxfp8")
    assert (performance.cuda_graph_impl, performance.cpu_offloading_num_layers) == ("local", 3)
    parallel = config.parallel
    assert (parallel.recompute_granularity, parallel.recompute_method, parallel.recompute_num_layers) == (
        "full", "uniform", 1,
    )  # fmt: skip
    assert parallel.recompute_modules == ["core_attn"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (configured({"overlap_param_gather": True}), "needs parallel.use_distributed_optimizer"),
        (configured({"overlap_param_gather": True}), "needs performance.overlap_grad_reduce"),
        (configured({"ddp_bucket_size": 5}), "ddp_bucket_size needs performance.overlap_grad_reduce"),
        (configured({"ddp_bucket_size": 0, "overlap_grad_reduce": True}), "ddp_bucket_size is 0; it must be at least"),
        (configured({"tp_comm_overlap": True}, training=BF16), "tensor_model_parallel_size above 1 (it is 1)"),
        (configured({"tp_comm_overlap": True}, parallel=TP), "training.precision is fp32"),
        (configured({"tp_comm_overlap": True}, small_dual_encoder(), parallel=TP), "dual_encoder has"),
        (configured({"tp_comm_overlap": True}, backend="local"), "tp_comm_overlap is True, which needs model"),
        (configured({"cross_entropy_loss_fusion": True}), "rounds its gradient to bf16"),
        (configured({"cross_entropy_fusion_impl": "te"}), "needs performance.cross_entropy_loss_fusion"),
        (
            configured({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, backend="local"),
            "cross_entropy_fusion_impl is te, which needs model.backend transformer_engine",
        ),
        (configured({"gradient_accumulation_fusion": True}, backend="local"), "add --no-gradient-accumulation-fusion"),
        (configured({"fp8_format": "hybrid"}), "fp8_format is hybrid, which needs training.precision bf16"),
        (configured({"fp8_format": "e4m3"}, backend="local", training=BF16), "add --fp8-format none"),
        (configured({"fp8_format": "e4m3"}, small_dual_encoder(), training=BF16), "and dual_encoder has none"),
        (configured({"fp8_format": "e4m3"}, small_vlm(phase="mae"), training=BF16), "and model.phase mae has none"),
        (configured({"tp_comm_overlap": True}, small_vlm(phase="mae"), parallel=TP), "and model.phase mae has none"),
        (configured({"fp8_recipe": "mxfp8"}), "fp8_recipe is mxfp8, and fp8_format is none"),
        (configured({"fp8_format": "e4m3", "fp8_recipe": "delayed"}, training=BF16), "use tensorwise, blockwise or"),
        (
            configured({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, training=BF16),
            "model.decoder.hidden_size is 64, which does not divide by TP x what FP8 needs = 128",
        ),
        (
            configured({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, training={**BF16, "micro_batch_size": 3}),
            "tokens of a microbatch on one process is 96, which does not divide by what FP8 needs = 128",
        ),
        (configured({"cuda_graph_impl": "local"}), "microbatches differ in documents, media and task"),
        (configured({"cpu_offloading_num_layers": -1}), "cpu_offloading_num_layers is -1"),
        (configured({}, parallel={"recompute_method": "block", "recompute_granularity": "full"}), "name uniform"),
        (configured({}, parallel={"recompute_method": "uniform"}), "recompute_method needs recompute_granularity full"),
        (configured({}, parallel={"recompute_num_layers": 2, "recompute_granularity": "full"}), "which is 1"),
        (configured({}, parallel={"recompute_modules": ["mlp", "core_attn"]}), "recompute_modules is mlp core_attn"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(config, message):
    assert message in refused(config)


def test_fp8_asks_for_the_width_of_queries_keys_and_values():
    config = configured({"fp8_format": "e4m3", "fp8_recipe": "mxfp8"}, training=BF16)
    config = changed(config, {"model.decoder.num_attention_heads": 8, "model.decoder.num_query_groups": 1})
    assert "queries, keys and values is 80, which does not divide by TP x what FP8 needs = 32" in refused(config)


def test_all_contradictions_are_named_at_once():
    config = configured({"overlap_param_gather": True, "cuda_graph_impl": "local", "fp8_format": "e4m3"})
    assert len(refused(config).splitlines()) == 1 + 4


def test_a_device_that_lacks_it_is_named():
    fp8 = configured({"fp8_format": "hybrid"}, training=BF16)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9, and NVIDIA A100-SXM4-80GB has 8\.0"):
        check_device(fp8, A100)
    check_device(fp8, H100)
    l40s = Device("NVIDIA L40S", (8, 9))
    check_device(fp8, l40s)
    fp8 = changed(fp8, {"performance.fp8_recipe": "blockwise"})
    check_device(fp8, H100)
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0, and NVIDIA L40S has 8\.9"):
        check_device(fp8, l40s)
    fp8 = changed(fp8, {"performance.fp8_recipe": "mxfp8"})
    with pytest.raises(ValueError, match=r"needs compute capability 10\.0, and NVIDIA H100 has 9\.0"):
        check_device(fp8, H100)
    both = configured({"fp8_format": "hybrid", "gradient_accumulation_fusion": True}, training=BF16)
    with pytest.raises(ValueError) as caught:
        check_device(both, CPU)
    assert "add --fp8-format none" in str(caught.value) and "add --no-gradient-accumulation-fusion" in str(caught.value)


def test_buffers_without_multicast_are_asked_for(monkeypatch):
    config = configured({"tp_comm_overlap": True}, parallel=TP, training=BF16)
    monkeypatch.delenv("UB_SKIPMC", raising=False)
    with pytest.raises(ValueError, match="A100-SXM4-80GB has no CUDA multicast; set UB_SKIPMC=1"):
        check_device(config, A100)
    check_device(config, H100)
    monkeypatch.setenv("UB_SKIPMC", "1")
    check_device(config, A100)


@pytest.mark.parametrize("name", FULL)
def test_full_recipes_turn_on_what_pays_on_an_a100_and_nothing_else(name):
    for phase in ("joint", "mae") if name in ("vlm-14b", "dual-encoder") else ("joint",):
        config, sizes = launched(name, phase)
        check(config, sizes)
        check_device(config, A100)
        performance = config.performance
        assert performance.overlap_grad_reduce and performance.overlap_param_gather
        assert performance.gradient_accumulation_fusion and performance.cross_entropy == "native"
        assert performance.fp8_format == "none" and not performance.tp_comm_overlap
    lines = (RECIPES / f"{name}.yaml").read_text().partition("\nperformance:")[2].partition("\ndata:")[0].splitlines()
    switches = [line for line in lines[1:] if not line.startswith("  #")]
    assert len(switches) == 4 and all(re.search(r"  # \S", line) for line in switches)  # each says why
    assert "FP8" in lines[0]


def test_what_needs_a_gpu_ends_a_run_on_a_cpu_with_status_2():
    words = ["--config", str(RECIPES / "synapse-tiny.yaml"), "--gradient-accumulation-fusion"]
    command = [PYTHON, "pretrain_multimodal.py", *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert "gradient_accumulation_fusion is True, which needs a GPU; this run is on a CPU" in done.stderr


def test_what_reaches_megatron_core():
    from megatron_mm.platform import setup

    setup.apply_platform()
    from megatron_mm.config.performance import PerformanceConfig
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.models.layers.settings import LayerSettings, layer_config
    from megatron_mm.parts.decoder.nodes import decoder_shape
    from megatron_mm.pipeline.schedule import pipeline_config

    config = small_config()
    shape = decoder_shape(config.model.decoder, 0.02)
    performance = PerformanceConfig(tp_comm_overlap=True, fp8_format="hybrid", gradient_accumulation_fusion=True)
    sizes = ParallelSizes(tp=2, sequence_parallel=True)
    for backend, decoder, wanted in (
        ("transformer_engine", True, ("hybrid", True, True)),
        ("transformer_engine", False, (None, False, True)),
        ("local", True, (None, False, False)),
    ):
        settings = LayerSettings(sizes, torch.bfloat16, backend, performance=performance)
        made = layer_config(settings, shape, sharded=True, decoder=decoder)
        assert (made.fp8, made.tp_comm_overlap, made.gradient_accumulation_fusion) == wanted
        assert made.fp8_recipe == "tensorwise"
    for vpp, overlap, wanted in ((2, True, (True, False)), (2, False, (False, True)), (1, True, (False, True))):
        made = pipeline_config(ParallelSizes(pp=4, vpp=vpp), torch.bfloat16, batched_p2p=True, overlap_p2p=overlap)
        assert (made.overlap_p2p_comm, made.batch_p2p_comm) == wanted
