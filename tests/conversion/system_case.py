"""A small model of any system with random weights, saved as training saves it, and generated rows for both sides: what
the training graph reads, and what the exported model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.held import shares
from megatron_mm.checkpoints.image import Image
from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.conversion.convert import export
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.evaluation import export_proof
from megatron_mm.generation.generate import Generator
from megatron_mm.models.graph import ForwardContext, Graph
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from tests.support import recipes

VOCABULARY = 320  # holds the tests' tokenizer

#: Two layers: what a modality lacks is no longer zero in the second. Heads share keys and values.
_FUSION = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64}

#: Each system, and what is left of it where objectives are left out.
SYSTEMS = {
    "vlm": lambda: recipes.small_vlm(),
    "vlm-mae": lambda: recipes.small_vlm(phase="mae"),
    "vlm-contrastive": lambda: recipes.small_vlm(causal_lm_weight=0.0),
    "vlm-captions": lambda: recipes.small_vlm(contrastive_weight=0.0),
    "dual_encoder": lambda: recipes.small_dual_encoder(),
    "dual_encoder-mae": lambda: recipes.small_dual_encoder(phase="mae"),
    "dual_encoder-contrastive": lambda: recipes.small_dual_encoder(causal_lm_weight=0.0, mae_weight=0.0),
    "perceiver_fusion": lambda: recipes.small_perceiver_fusion(),
    "perceiver_fusion-matching": lambda: recipes.small_perceiver_fusion(masked_lm_weight=0.0, contrastive_weight=0.0),
    "avt": lambda: recipes.small_avt(fusion=_FUSION),
    "avt-contrastive": lambda: recipes.small_avt(masked_lm_weight=0.0, generation_weight=0.0),
    "avt-masked": lambda: recipes.small_avt(contrastive_weight=0.0, generation_weight=0.0, masked_lm_share=1.0),
}


def with_vocabulary(config: Config) -> Config:
    """The recipe with a vocabulary for the tests' tokenizer."""
    part = "decoder" if hasattr(config.model, "decoder") else "text"
    section = replace(getattr(config.model, part), vocab_size=VOCABULARY)
    return replace(config, model=replace(config.model, **{part: section}))


@dataclass
class Trained:
    """The training side, in this process."""

    config: Config
    pipeline: Pipeline

    @property
    def graph(self) -> Graph:
        """The system's graph."""
        return self.pipeline.bare_chunks[0].graph

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by training name; tied ones once, under their owner's."""
        (chunk,) = self.pipeline.bare_chunks
        seen, weights = set(), {}
        for node, module in zip(chunk.nodes, chunk.node_modules):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    weights[f"{node.name}.{name}"] = parameter.detach()
        return weights

    @torch.no_grad()
    def streams(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """All streams at the end of the graph."""
        (chunk,) = self.pipeline.bare_chunks
        context, streams = ForwardContext(batch), {}
        for node, module in zip(chunk.nodes, chunk.node_modules):
            written = module(*(streams[name] for name in node.reads), context)
            written = (written,) if isinstance(written, torch.Tensor) else written
            streams.update(zip((stream.name for stream in node.writes), written))
        return streams

    def logits(self, batch: Microbatch) -> torch.Tensor:
        """[R, T, V]."""
        return self.streams(batch)["logits"].view(*batch.tokens_RT.shape, -1)

    def save(self, root: Path, tokenizer: Path | None) -> Path:
        """A checkpoint `root/iter_0000007`, its weights written by the training code."""
        part = checkpoint_folder.begin(root, 7)
        weights = checkpoint.weights_of(self.pipeline)
        Image(list(shares([(weight, weight.parameter, "") for weight in weights]))).write(part, 0)
        dump_config(self.config, part / "config.yaml")
        if tokenizer is not None:
            (part / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        return checkpoint_folder.finish(part, {"iteration": 7, "consumed_samples": 0})


def trained(config: Config, seed: int = 0) -> Trained:
    """Random weights everywhere: norms near one, biases and gates away from zero."""
    device = setup.initialize(ParallelSizes(), seed=1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=3)
    generator = torch.Generator().manual_seed(seed)
    (chunk,) = pipeline.bare_chunks
    chunk.eval()
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif "scale" in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() < 2 else 0.08))
    return Trained(config, pipeline)


def rows(config: Config, numbers: Sequence[int] = range(6), task: str = "") -> Microbatch:
    """Generated rows of a format, of different lengths; the first six are with and without media."""
    return GeneratedRows(config).microbatch(numbers, task=task)


#: The rows as the exported model reads them.
exported_inputs = export_proof.exported_inputs


def prefix(batch: Microbatch, lengths: torch.Tensor) -> Microbatch:
    """The first tokens of each row as one document, padded."""
    kept = torch.arange(batch.plan.row_length)[None] < lengths[:, None]
    documents = torch.where(kept, 0, -1)
    positions = torch.arange(batch.plan.row_length).expand_as(documents)
    return replace(batch, tokens_RT=batch.tokens_RT * kept, document_ids_RT=documents, position_ids_RT=positions)


def greedy(model: Trained, batch: Microbatch, lengths: torch.Tensor, steps: int, pieces: int) -> torch.Tensor:
    """Tokens [R, steps] after the first `lengths` of each row, by argmax over the tokenizer's `pieces` of the training
    model, computed anew for each."""
    every, tokens, lengths = torch.arange(len(lengths)), batch.tokens_RT.clone(), lengths.clone()
    for _ in range(steps):
        logits = model.logits(prefix(replace(batch, tokens_RT=tokens), lengths))
        found = logits[every, lengths - 1, :pieces].argmax(-1)
        tokens[every, lengths] = found
        lengths += 1
    return torch.stack([tokens[row, lengths[row] - steps : lengths[row]] for row in range(len(lengths))])


class Work:
    """A system's training model, its checkpoint, its export, and the exported model."""

    def __init__(self, name: str, root: Path, tokenizer: Path) -> None:
        self.config = with_vocabulary(SYSTEMS[name]())
        self.trained = trained(self.config)
        self.checkpoint = self.trained.save(root / "run" / "checkpoints", tokenizer)
        self.exported = export(root / "run", root / "exported", max_shard_bytes=100_000, quiet=True)
        self.model = Generator.from_path(self.exported).model
