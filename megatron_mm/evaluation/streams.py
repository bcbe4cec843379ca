"""Reads a graph from outside: runs its nodes over rows of data in one process and hands out the streams asked for.

    checkpoint of any layout ─ whole graph in one process ─ microbatch ─ nodes that the wanted streams need ─ streams

So whatever a system computes (embeddings, logits, predictions) can be scored on held-out data without an export, with
the preprocessing, masks and attention that training had. Nodes that no wanted stream needs are not run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mm.config.load import load_saved_config
from megatron_mm.config.schema import Config, DatasetConfig, ParallelConfig
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.conversion.convert import find_checkpoint
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.reading.dataset import build_datasets, whole_dataset
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Graph
from megatron_mm.platform import setup

_TOKENS = frozenset({"tokens_RT", "masked_tokens_RT"})


class GraphReader:
    """The whole graph of a recipe in this process, in evaluation mode.

    Args:
        config: the recipe; its layout is not used.
        weights: checkpoint folder (…/iter_0000100); None: the initial weights that a run of this recipe begins with.

    Raises:
        ValueError: the checkpoint is not of this model.
    """

    def __init__(self, config: Config, weights: Path | None = None) -> None:
        config = replace(config, parallel=ParallelConfig())
        self.config = config
        self.device = setup.initialize(ParallelSizes(), config.training.seed)
        # Only now: the platform comes before anything of megatron-core.
        from megatron_mm.checkpoints import checkpoint
        from megatron_mm.planner.assembly import Assembly

        pipeline = Assembly.of(config, ParallelSizes(), self.device.type).build(self.device, config.training.seed)
        if weights is not None:
            checkpoint.load_weights(weights, pipeline)
        (self._chunk,) = pipeline.bare_chunks
        self._chunk.eval()

    @classmethod
    def from_path(cls, path: Path, trained: bool = True, reads_data: bool = False) -> GraphReader:
        """The model of a checkpoint, a folder of checkpoints or a run's output folder (the newest whole one).

        Args:
            trained: False: the same model as it was before training.
            reads_data: the data of the run are wanted too, by `data.builder` where it has one.

        Raises:
            ValueError: there is no checkpoint, or it is damaged, or it needs a plugin that the user has not named
                (`config.plugins.load_plugins`).
        """
        folder = find_checkpoint(path)
        config = load_saved_config(folder / "config.yaml", reads_data)
        return cls(config, folder if trained else None)

    @property
    def graph(self) -> Graph:
        """The system's graph."""
        return self._chunk.graph

    def fields(self, names: Collection[str]) -> frozenset[str]:
        """Microbatch fields that these streams need."""
        return frozenset().union(*(self.graph.nodes[number].fields for number in self.graph.needed(names)))

    @torch.inference_mode()
    def run(
        self, batch: Microbatch, names: Collection[str], kept: dict[int, tuple[torch.Tensor, ...]] | None = None
    ) -> tuple[dict[str, torch.Tensor], ForwardContext]:
        """The streams as the end of the graph sees them, and the context in which they were made.

        Args:
            batch: with at least `fields(names)`.
            names: of streams.
            kept: results of nodes that depend on no token, by number: used where there, else added. For runs that
                differ in their tokens alone.
        """
        context, streams, of_tokens = ForwardContext(batch.to(self.device)), {}, set()
        for number in self.graph.needed(names):
            node, module = self.graph.nodes[number], self._chunk.node_modules[number]
            writes = [stream.name for stream in node.writes]
            depends = bool(node.fields & _TOKENS) or not of_tokens.isdisjoint(node.reads)
            of_tokens = of_tokens.union(writes) if depends else of_tokens.difference(writes)
            if kept is not None and number in kept:
                written = kept[number]
            else:
                own = context.reading(node.reader, node.fields)
                written = module(*(streams[name] for name in node.reads), own)
                written = (written,) if isinstance(written, torch.Tensor) else written
                if kept is not None and not depends:
                    kept[number] = written
            streams.update(zip(writes, written))
        return {name: streams[name] for name in names}, context


def all_rows(
    config: Config, fields: Collection[str], batch_size: int, task: str = "", limit: int = 0
) -> Iterator[Microbatch]:
    """Every row of the recipe's datasets once, as they are: no split, no augmentation, in the order of the samples.

    Args:
        config: its `data` is read.
        fields: of the microbatches.
        batch_size: rows of a microbatch; the last may have fewer.
        task: what the microbatches learn, where the system divides them among tasks.
        limit: at most this many rows; 0 takes all.
    """
    dataset = whole_dataset(config)
    count = min(dataset.num_rows, limit or dataset.num_rows)
    for start in range(0, count, batch_size):
        yield dataset.microbatch(range(start, min(start + batch_size, count)), fields, task)


def validation_rows(
    config: Config, fields: Collection[str], batch_size: int, task: str = "", limit: int = 0
) -> Iterator[Microbatch]:
    """The samples by which a run of this recipe validates; as `all_rows`, of data that has no last row too.

    Args:
        limit: at most this many rows; 0 takes those of `training.eval_iters` global batches.

    Raises:
        ValueError: the recipe has no validation split.
    """
    dataset = build_datasets(config).valid
    if dataset is None:
        raise ValueError("this recipe has no validation split (data.split, or what data.builder makes)")
    count = limit or config.training.eval_iters * config.training.global_batch_size
    for start in range(0, count, batch_size):
        yield dataset.microbatch(range(start, min(start + batch_size, count)), fields, task)


@contextmanager
def reading_samples(config: Config, samples: Sequence[dict], tokenizer: Path, media_root: Path) -> Iterator[Config]:
    """As `reading_jsonl`, of samples that no file has.

    Args:
        media_root: folder to which the samples' paths are relative.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_mm-") as folder:
        path = Path(folder, "samples.jsonl")
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
        with reading_jsonl(config, path, tokenizer, media_root) as reading:
            yield reading


@contextmanager
def reading_jsonl(config: Config, path: Path, tokenizer: Path, media_root: Path | None = None) -> Iterator[Config]:
    """The recipe with the samples of a JSONL as its only data, built as tools/preprocess_multimodal.py builds shards.

    Raises:
        ValueError: a line or a file that it names is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_mm-") as folder:
        shards = str(Path(folder) / "shards")
        root = str(media_root) if media_root is not None else None
        build_multimodal([str(path)], shards, str(tokenizer), media_root=root, workers=0, check=False, progress=False)
        datasets = [DatasetConfig(path=shards)]
        yield replace(config, data=replace(config.data, datasets=datasets, tokenizer=str(tokenizer), builder=None))
