"""A small system for tests of the pipeline, and a program that trains it in several layouts.

Two branches (mean of token embeddings, linear map of an image) of residual layers, a pair of normalised embeddings, and
a head over both branches whose weight is the token embedding (tied). Its losses are a cross-entropy of the first token,
learned by microbatches of one task only, and a contrastive loss over a microbatch or over the whole batch, in which
some rows are not valid. Every sample is a pure function of its number.

Run under torchrun, it writes for each case what `train` returns.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch.nn import functional

from megatron_mm.checks.layouts import _whole_gradients, parse_layout
from megatron_mm.config.performance import PerformanceConfig
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import Graph, Kind, Loss, Node, NodeCost, Stream
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.pipeline.design import PipelineDesign
from megatron_mm.pipeline.partition import balance
from megatron_mm.pipeline.schedule import build_pipeline, run_batch
from megatron_mm.platform import setup
from megatron_mm.training.optimizer import Optimizer
from megatron_mm.training.resilience import explain_gradient
from tests.support.recipes import small_config

VOCABULARY, WIDTH, LENGTH, IMAGE = 40, 16, 6, 4


class Embedding(nn.Module):
    """Mean of the tokens' rows, `text` [R, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Module()
        self.table.weight = empty_parameter(VOCABULARY, WIDTH, dtype=torch.float32)

    def forward(self, context):
        return functional.embedding(context.batch.tokens_RT, self.table.weight).mean(1)


class ImageEmbedding(nn.Module):
    """A linear map of the row's image, `image` [R, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = empty_parameter(WIDTH, 3 * IMAGE * IMAGE, dtype=torch.float32)

    def forward(self, context):
        return context.batch.images_ICHW.flatten(1) @ self.weight.T


class Layer(nn.Module):
    """x + W·tanh(x), with dropout of what is added. Broken: sample 6 makes the weight's gradient NaN."""

    def __init__(self, dropout: float, broken: bool = False) -> None:
        super().__init__()
        self.weight = empty_parameter(WIDTH, WIDTH, dtype=torch.float32)
        self.dropout, self.broken = dropout, broken

    def forward(self, x, context):
        if self.broken and "sample 6" in context.batch.sample_ids:
            x = x + torch.sqrt(0.0 * self.weight[0])
        return x + functional.dropout(torch.tanh(x) @ self.weight.T, self.dropout, self.training)


class Pair(nn.Module):
    """Normalised embeddings of both branches, which rows count, and the learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.text = empty_parameter(8, WIDTH, dtype=torch.float32)
        self.image = empty_parameter(8, WIDTH, dtype=torch.float32)
        self.scale = empty_parameter(1, dtype=torch.float32)

    def forward(self, text, image, context):
        valid = (context.batch.image_slots_RK[:, 0] >= 0).float()
        pair = functional.normalize(image @ self.image.T, dim=-1), functional.normalize(text @ self.text.T, dim=-1)
        return *pair, valid, self.scale.exp().view_as(self.scale)


class Head(nn.Module):
    """Logits over the vocabulary from both branches, by a weight that may be the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = empty_parameter(VOCABULARY, WIDTH, dtype=torch.float32)

    def forward(self, text, image, context):
        return (text + image) @ self.weight.T


def _build(kind, *arguments) -> nn.Module:
    return describe(kind(*arguments), init_std=0.3)


class _Gather(torch.autograd.Function):
    """[N, …] of every data-parallel process -> [W·N, …], with gradient."""

    @staticmethod
    def forward(ctx, local):
        group = parallel_state.get_data_parallel_group()
        pieces = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(pieces, local.contiguous(), group=group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient):
        group = parallel_state.get_data_parallel_group()
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]


def contrastive(images, texts, valids, scales, contexts) -> torch.Tensor:
    """-log softmax of the own pair among all valid ones, both ways, summed over the rows of this process."""
    image, text, valid = torch.cat(images), torch.cat(texts), torch.cat(valids)
    every_image, every_text, every_valid = _Gather.apply(image), _Gather.apply(text), _Gather.apply(valid)
    first = dist.get_rank(parallel_state.get_data_parallel_group()) * len(valid)
    own = torch.arange(first, first + len(valid))
    scale = torch.stack(list(scales)).mean()
    total = 0.0
    for rows, columns in ((image, every_text), (text, every_image)):
        scores = scale * rows @ columns.T
        scores = scores.masked_fill(every_valid[None] == 0, -1e9)
        total = total + (functional.cross_entropy(scores, own, reduction="none") * valid).sum()
    return 0.5 * total


@dataclass
class Case:
    """What to train and how."""

    layout: str = "DP1"
    steps: int = 3
    pool: int = 4
    global_batch: int = 16
    layers: int = 3
    tied: bool = True
    whole_batch: bool = False
    task: bool = False
    """Odd microbatches do not learn the cross-entropy."""
    dropout: float = 0.0
    broken: str = ""
    """Layer whose gradient is NaN; the run then ends with an explanation."""
    save: str = ""
    load: str = ""
    bucket_size: int = 300
    """Parameters of a bucket where gradient reduction is overlapped: about one layer."""


def graph_of(case: Case) -> Graph:
    """The graph of a case."""
    text = Stream("text", lambda plan: (plan.num_rows, WIDTH))
    image = Stream("image", lambda plan: (plan.num_rows, WIDTH))
    pair = [Stream(name, lambda plan: (plan.num_rows, 8), dtype=torch.float32) for name in ("image_pair", "text_pair")]
    valid = Stream("valid", lambda plan: (plan.num_rows,), dtype=torch.float32)
    scale = Stream("scale", lambda plan: (1,), dtype=torch.float32)
    logits = Stream("logits", lambda plan: (plan.num_rows, VOCABULARY))

    def cost(plan):
        return NodeCost(WIDTH * WIDTH, 2.0 * WIDTH * WIDTH * plan.num_rows)

    nodes = [
        Node("text.embedding", Kind(partial(_build, Embedding), cost), (), (text,), fields=frozenset({"tokens_RT"})),
        Node(
            "image.embedding",
            Kind(partial(_build, ImageEmbedding), cost),
            (),
            (image,),
            fields=frozenset({"images_ICHW"}),
        ),
    ]
    for i in range(case.layers):
        for stream in (text, image):
            name = f"{stream.name}.layers.{i}"
            layer = partial(_build, Layer, case.dropout, name == case.broken)
            nodes.append(Node(name, Kind(layer, cost), (stream.name,), (stream,), recomputable=True))
    nodes.append(Node("pair", Kind(partial(_build, Pair), cost), ("text", "image"), (*pair, valid, scale)))
    nodes.append(Node("fusion.layers.0", Kind(partial(_build, Layer, case.dropout), cost), ("text",), (text,)))
    ties = {"weight": "text.embedding.table.weight"} if case.tied else {}
    nodes.append(Node("head", Kind(partial(_build, Head), cost), ("text", "image"), (logits,), ties=ties))

    def first_token(logits, context):
        return functional.cross_entropy(logits, context.batch.labels_RT[:, 0], reduction="sum")

    losses = [
        Loss(
            "first",
            first_token,
            lambda batch: torch.tensor(float(batch.plan.num_rows)),
            ("logits",),
            sharded=False,
            fields=frozenset({"labels_RT"}),
            tasks=frozenset({"first"}) if case.task else None,
        ),
        Loss(
            "pairs",
            contrastive if case.whole_batch else lambda *items: contrastive(*([item] for item in items)),
            lambda batch: (batch.image_slots_RK[:, 0] >= 0).sum(),
            ("image_pair", "text_pair", "valid", "scale"),
            weight=0.5,
            sharded=False,
            whole_batch=case.whole_batch,
        ),
    ]
    return Graph(nodes, losses)


def microbatch(samples: list[int], task: str = "") -> Microbatch:
    """The rows of global sample numbers."""
    generators = [torch.Generator().manual_seed(number) for number in samples]
    tokens = torch.stack([torch.randint(0, VOCABULARY, (LENGTH,), generator=g) for g in generators])
    images = torch.stack([torch.randn(3, IMAGE, IMAGE, generator=g) for g in generators])
    rows = len(samples)
    slots = torch.tensor([[-1 if number % 5 == 3 else row] for row, number in enumerate(samples)])
    return Microbatch(
        plan=MicrobatchPlan(rows, LENGTH, rows, 1, 1, 1, True, LENGTH, task=task),
        document_ids_RT=torch.zeros(rows, LENGTH, dtype=torch.int64),
        position_ids_RT=torch.arange(LENGTH).repeat(rows, 1),
        loss_mask_RT=torch.ones(rows, LENGTH),
        image_slots_RK=slots,
        image_slot_documents_RK=torch.zeros(rows, 1, dtype=torch.int64),
        sound_slots_RJ=torch.full((rows, 1), -1),
        sound_slot_documents_RJ=torch.full((rows, 1), -2),
        tokens_RT=tokens,
        labels_RT=tokens,
        images_ICHW=images,
        sample_ids=[f"sample {number}" for number in samples],
    )


def microbatches_of(case: Case, step: int, sizes: ParallelSizes) -> list[Microbatch]:
    """This process's part of the global batch of a step, pool by pool."""
    rows, rank = case.pool // sizes.dp, parallel_state.get_data_parallel_rank()
    batches = []
    for pool in range(case.global_batch // case.pool):
        first = step * case.global_batch + pool * case.pool + rank * rows
        task = ("first", "other")[pool % 2] if case.task else ""
        batches.append(microbatch(list(range(first, first + rows)), task))
    return batches


def sizes_of(layout: str) -> ParallelSizes:
    """The sizes of a layout's name."""
    parsed = parse_layout(layout)
    tp, pp, vpp, cp = (
        parsed.parallel.get(f"{kind}_parallel_size", 1)
        for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context")
    )
    return ParallelSizes(tp, pp, vpp, cp, parsed.data_parallel)


def build(case: Case):
    """(pipeline, optimizer, configuration) of a case, whose groups exist."""
    sizes, distopt = sizes_of(case.layout), "distopt" in case.layout
    graph = graph_of(case)
    performance = PerformanceConfig(**parse_layout(case.layout).performance)
    if performance.overlap_grad_reduce:
        performance = changed(performance, {"ddp_bucket_size": case.bucket_size})
    settings = LayerSettings(
        sizes,
        recompute="full" if "full" in case.layout else "none",
        hidden_dropout=case.dropout,
        performance=performance,
    )
    cuts = balance([1.0] * len(graph.nodes), sizes.chunks)
    pipeline = build_pipeline(PipelineDesign(graph, cuts, settings, distopt), torch.device("cpu"), seed=11)
    config = changed(
        small_config(),
        {
            "performance": performance,
            "training.train_iters": 100,
            "training.global_batch_size": case.global_batch,
            "optimizer.lr": 1e-2,
            "optimizer.lr_warmup_iters": 0,
            "parallel.use_distributed_optimizer": distopt,
        },
    )
    return pipeline, Optimizer(config, pipeline), config


def copies_agree(pipeline) -> bool:
    """Whether all copies of the tied weight in the world are the same bits."""
    pipeline.wait_for_weights()
    own = [
        parameter.detach().clone()
        for chunk in pipeline.bare_chunks
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for name, parameter in module.named_parameters()
        if (node.name, name) in (("text.embedding", "table.weight"), ("head", "weight"))
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    copies = [copy for one in everyone for copy in one]
    return all(torch.equal(copy, copies[0]) for copy in copies)


def train(case: Case) -> dict:
    """Losses, norms and gradients of every step, and whether tied copies agreed after each."""
    from megatron_mm.checkpoints import checkpoint
    from megatron_mm.checkpoints.save import save

    sizes = sizes_of(case.layout)
    setup.initialize(sizes, seed=5)
    pipeline, optimizer, config = build(case)
    position = checkpoint.Position()
    if case.load:
        position = checkpoint.load(checkpoint.find(Path(case.load)), pipeline, optimizer)
    found: dict = {"losses": [], "named": [], "counts": [], "norms": [], "gradients": {}, "agree": []}
    for step in range(position.iteration, position.iteration + case.steps):
        batches = microbatches_of(case, step, sizes)
        optimizer.zero_grad()
        found["evaluated"] = evaluate(pipeline, batches)
        setup.seed_dropout(5, step)
        result = run_batch(pipeline, batches)
        norm = optimizer.gradient_norm()
        if case.broken:
            return {"norm": norm, "explained": explain_gradient(pipeline, norm, batches, step)}
        for key, value in _whole_gradients(pipeline, config.parallel.use_distributed_optimizer).items():
            found["gradients"][f"{step}/{key}"] = value
        optimizer.step(norm, case.global_batch)
        found["losses"].append(result.total)
        found["named"].append(result.losses)
        found["counts"].append(result.counts)
        found["norms"].append(norm)
        if not case.save:  # a checkpoint must wait for the weights itself
            found["agree"].append(copies_agree(pipeline))
    if case.save:
        done = position.iteration + case.steps
        position = checkpoint.Position(done, done * case.global_batch)
        save(config, Path(case.save), pipeline, optimizer, position)
    return found


def evaluate(pipeline, batches) -> dict:
    """Losses of a forward pass alone."""
    for chunk in pipeline.chunks:
        chunk.eval()
    with torch.no_grad():
        result = run_batch(pipeline, batches, forward_only=True)
    for chunk in pipeline.chunks:
        chunk.train()
    return result.losses


if __name__ == "__main__":
    cases = [Case(**fields) for fields in json.loads(sys.argv[1])]
    results = [train(case) for case in cases]
    if setup.rank() == 0:
        torch.save(results, sys.argv[2])
    setup.shutdown()
