"""The fused cross-entropy against the plain one in bf16: the same bits, alone and over a shared vocabulary."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch.nn import functional

from megatron_mm.config.performance import PerformanceConfig
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives import causal_lm
from megatron_mm.objectives.cross_entropy import token_cross_entropy
from megatron_mm.platform import setup
from megatron_mm.systems.graph import build_graph
from tests.objectives import fused_case
from tests.support.programs import TORCHRUN
from tests.support.recipes import small_avt, small_config, small_dual_encoder, small_perceiver_fusion, small_vlm


def assert_same(found: dict) -> None:
    plain, fused = found["plain"], found["native"]
    assert fused["losses"].dtype == torch.float32 and fused["gradient"].dtype == torch.bfloat16
    torch.testing.assert_close(fused["losses"], plain["losses"], rtol=1e-6, atol=1e-6)
    assert torch.equal(fused["gradient"], plain["gradient"]) and plain["gradient"].abs().sum() > 1
    assert (plain["reductions"], fused["reductions"]) == (3, 2)  # the maximum; then two sums, or both at once


def test_one_process():
    found = fused_case.figures()
    assert_same(found)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(fused_case.TOKENS, 1, fused_case.VOCABULARY, generator=generator) * 4
    labels = torch.randint(0, fused_case.VOCABULARY, (fused_case.TOKENS, 1), generator=generator)
    truth = functional.cross_entropy(logits[:, 0].bfloat16().float(), labels[:, 0], reduction="none")
    torch.testing.assert_close(found["native"]["losses"][:, 0], truth, rtol=1e-5, atol=1e-5)


def test_transformer_engines_kernel_is_for_cuda(monkeypatch):
    """A stand-in for logits on a GPU reaches it; others, of a dry run, do not."""
    setup.initialize(ParallelSizes(), seed=1)
    kernel = SimpleNamespace(te_parallel_cross_entropy=lambda *given: given)
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", kernel)
    logits, labels = SimpleNamespace(is_cuda=True), torch.zeros(2, 1, dtype=torch.int64)
    group = get_tensor_model_parallel_group()
    assert token_cross_entropy(logits, labels, "te") == (logits, labels, group)
    losses = token_cross_entropy(torch.zeros(2, 1, 4), labels, "te")
    assert losses.flatten().tolist() == pytest.approx([math.log(4.0)] * 2)


@pytest.mark.slow
def test_two_processes_share_the_vocabulary(tmp_path):
    output = tmp_path / "found.pt"
    words = [*TORCHRUN, "2"]
    subprocess.run([*words, "-m", "tests.objectives.fused_case", str(output)], check=True, capture_output=True)
    shared, alone = torch.load(output), fused_case.figures()
    assert_same(shared)
    torch.testing.assert_close(shared["native"]["losses"], alone["native"]["losses"], rtol=1e-6, atol=1e-6)
    half = alone["native"]["gradient"][..., : fused_case.VOCABULARY // 2]
    torch.testing.assert_close(shared["native"]["gradient"], half, rtol=1e-2, atol=1e-3)


def test_every_token_loss_takes_the_kind_that_the_run_asks_for(monkeypatch):
    """All systems' losses of tokens, found by what they call."""
    asked: list[str] = []

    def remember(logits, labels, kind):
        asked.append(kind)
        return torch.zeros(labels.shape)

    monkeypatch.setattr(causal_lm, "token_cross_entropy", remember)
    performance = PerformanceConfig(cross_entropy_loss_fusion=True)
    setup.initialize(ParallelSizes(), seed=1)
    expected = 0
    for config in (small_config(), small_vlm(), small_avt(), small_dual_encoder(), small_perceiver_fusion()):
        graph = build_graph(config.model, LayerSettings(performance=performance))
        batch = GeneratedRows(config).microbatch([0, 1], task=(config.model.inputs.tasks or (("", 1.0),))[0][0])
        for loss in graph.losses:
            if loss.reads == ("logits",):
                loss.compute(torch.zeros(1), ForwardContext(batch))
                expected += 1
    assert asked == ["native"] * expected and expected >= 6
