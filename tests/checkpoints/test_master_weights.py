"""Master weights of BF16 training after a load from a checkpoint that has none, such as a restored one."""

import pytest
import torch

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.held import shares
from megatron_mm.checkpoints.image import Image
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training.optimizer import Optimizer
from tests.support.recipes import small_vlm


@pytest.mark.parametrize("distributed", [False, True])
def test_they_begin_as_the_weights_that_were_loaded(distributed, tmp_path):
    config = changed(
        small_vlm(), {"training.precision": "bf16", "parallel.use_distributed_optimizer": distributed}
    )
    device = setup.initialize(ParallelSizes(), seed=1)
    source = Assembly.of(config, ParallelSizes()).build(device, seed=1)
    part = checkpoint_folder.begin(tmp_path, 0)
    Image(list(shares([(weight, weight.parameter, "") for weight in checkpoint.weights_of(source)]))).write(part, 0)
    folder = checkpoint_folder.finish(part, {"iteration": 0, "consumed_samples": 0})

    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=2)
    optimizer = Optimizer(config, pipeline)
    checkpoint.load(folder, pipeline, optimizer)
    wanted = {weight.key: weight.parameter.detach().float() for weight in checkpoint.weights_of(source)}
    found = 0
    for slot in optimizer.slots(checkpoint.weights_of(pipeline)):
        key = slot.key.removeprefix("optimizer.fp32_param.")
        if key != slot.key:
            region = tuple(slice(at, at + size) for at, size in zip(*slot.region))
            assert torch.equal(slot.tensor, wanted[key][region]), key
            found += slot.tensor.numel()
    assert found == sum(p.numel() for chunk in pipeline.bare_chunks for p in chunk.parameters() if p.requires_grad)
