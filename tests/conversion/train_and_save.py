"""Run by test_training_equals_export.py, on one process or under torchrun: the training side of the comparison.

train_and_save.py train FOLDER        one optimizer step from seeded weights, a checkpoint, and in FOLDER/said.pt
                                      logits and greedy answers of the training model
train_and_save.py reload FOLDER FROM  loads the weights of checkpoint FROM in TP2 and saves them again in FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.save import save
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.models.graph import ForwardContext
from megatron_mm.pipeline.schedule import Pipeline, run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training import warm_start
from megatron_mm.training.optimizer import Optimizer
from tests.conversion.export_case import media_batch, training_microbatch, training_recipe


@torch.no_grad()
def logits_of(pipeline: Pipeline, batch: Microbatch) -> torch.Tensor:
    """[R, T, vocabulary] of the training model on one process."""
    (chunk,) = pipeline.bare_chunks
    context, streams = ForwardContext(batch), {}
    for node, module in zip(chunk.nodes, chunk.node_modules):
        written = module(*(streams[name] for name in node.reads), context)
        written = (written,) if isinstance(written, torch.Tensor) else written
        streams.update(zip((stream.name for stream in node.writes), written))
    return streams["logits"].reshape(*batch.tokens_RT.shape, -1)


def greedy(pipeline: Pipeline, inputs: dict[str, torch.Tensor], steps: int, pieces: int) -> torch.Tensor:
    """Tokens [R, steps] by argmax over the tokenizer's `pieces`, the whole row computed anew for each."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        batch = training_microbatch(dict(inputs, input_ids=ids, attention_mask=mask))
        lengths = mask.sum(1)
        last = logits_of(pipeline, batch)[torch.arange(len(ids)), lengths - 1]
        ids = torch.cat([ids, last[:, :pieces].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, -steps:]


def main() -> None:
    """See the top."""
    action, folder, *rest = sys.argv[1:]
    config = training_recipe()
    sizes = ParallelSizes(tp=setup.world_size())
    device = setup.initialize(sizes, seed=1)
    pipeline = Assembly.of(config, sizes).build(device, seed=3)
    optimizer = Optimizer(config, pipeline)
    if action == "reload":
        warm_start.load_pretrained([Path(rest[0])], pipeline, optimizer)
    else:
        inputs = media_batch(config.model)
        batch = training_microbatch(inputs)
        optimizer.zero_grad()
        run_batch(pipeline, [batch])
        optimizer.step(optimizer.gradient_norm(), samples=4)
        pieces = open_tokenizer(str(Path(folder) / "spm.model")).vocab_size
        said = {"logits": logits_of(pipeline, batch), "tokens": greedy(pipeline, inputs, 8, pieces)}
        torch.save(said, Path(folder) / "said.pt")
    config = changed(config, {"data.tokenizer": str(Path(folder) / "spm.model")})
    save(config, Path(folder) / "checkpoints", pipeline, optimizer, Position(1, 4))
    setup.shutdown()


if __name__ == "__main__":
    main()
