"""A system of one's own, without touching the package: a layer, an objective, a dataset and an export.

    torchrun --nproc-per-node 2 pretrain_multimodal.py --config examples/own_system/byte-mixer.yaml \
        --pipeline-model-parallel-size 2

The layer is a gated causal convolution over bytes (GLU, arXiv:1612.08083), the objective the likelihood of the next
byte with smoothed labels, the dataset the sources of Python's standard library, which every machine has. The tokens are
those of the package's tokenizer of bytes. The recipe names this file under `plugins` and under `data.builder`, and
bytes.json under `data.tokenizer`. Pipeline, data parallelism, checkpoints, resuming and the
tools work as for any other system; the layer is whole on every tensor-parallel process.

What an exported folder runs on is beside this file, in plain torch: configuration_byte_mixer.py, modeling_byte_mixer.py
and processing_byte_mixer.py. run.sh goes from training to an answer.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.schema import Config
from megatron_mm.config.section import section
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import System, register
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.data.reading.rows import Document, collate
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.models.graph import ForwardContext, Graph, Kind, Loss, Node, NodeCost, Stream
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import Entry, norm, plain
from megatron_mm.models.work import MatrixProduct, Moved
from megatron_mm.objectives.measures import TokenAccuracy
from megatron_mm.systems.export import Adapter, section_fields, section_tree


@section
class ByteMixerConfig(SystemConfig):
    """Byte mixer: gated causal convolutions over bytes."""

    system: Literal["byte_mixer"] = "byte_mixer"
    """Name of the system."""
    vocab_size: int = 264
    """Rows of the embedding: the tokenizer's 256 bytes and eight special tokens."""
    num_layers: int = 6
    """Convolution layers."""
    hidden_size: int = 96
    """Width."""
    kernel_size: int = 5
    """Bytes that a layer sees at once."""
    label_smoothing: float = 0.05
    """Share of the likelihood that is spread over all bytes."""

    @property
    def inputs(self) -> InputFormat:
        """Rows of one piece of text."""
        return InputFormat(vocab_size=self.vocab_size, packed=False)

    @property
    def generates(self) -> bool:
        """It learns to generate text."""
        return True

    def problems(self, config, sizes):
        """What contradicts itself."""
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"model.label_smoothing is {self.label_smoothing}; it must lie in [0, 1)"


# ------------------------------------------------------------------------------------------------------ layers


class ByteEmbedding(nn.Module):
    """Bytes -> [R, T, C]."""

    def __init__(self, config: ByteMixerConfig, settings: LayerSettings) -> None:
        super().__init__()
        self.table = empty_parameter(config.vocab_size, config.hidden_size, dtype=settings.dtype)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """The microbatch's tokens as vectors."""
        return functional.embedding(context.batch.tokens_RT, self.table)


class GatedConvolution(nn.Module):
    """x + value · sigmoid(gate), both a causal convolution of the normed input."""

    def __init__(self, config: ByteMixerConfig, settings: LayerSettings) -> None:
        super().__init__()
        width, self.kernel_size = config.hidden_size, config.kernel_size
        self.input_layernorm = nn.utils.skip_init(
            nn.LayerNorm, width, dtype=settings.dtype, device=torch.cuda.current_device()
        )
        self.kernel = empty_parameter(2 * width, width, config.kernel_size, dtype=settings.dtype)

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[R, T, C] -> [R, T, C]."""
        padded = functional.pad(self.input_layernorm(hidden).transpose(1, 2), (self.kernel_size - 1, 0))
        return hidden + functional.glu(functional.conv1d(padded, self.kernel), dim=1).transpose(1, 2)


class ByteHead(nn.Module):
    """States -> logits [R, T, V]."""

    def __init__(self, config: ByteMixerConfig, settings: LayerSettings) -> None:
        super().__init__()
        self.output = empty_parameter(config.vocab_size, config.hidden_size, dtype=settings.dtype)

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[R, T, C] -> [R, T, V]."""
        return functional.linear(hidden, self.output)


# --------------------------------------------------------------------------------------------------- objective


def smoothed_loss(label_smoothing: float) -> Loss:
    """Cross-entropy of the next byte with smoothed labels; every context-parallel process has all of it."""

    def compute(logits: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        batch = context.batch
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1),
            batch.labels_RT.flatten(),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return torch.dot(losses, batch.loss_mask_RT.flatten())

    def count(batch: Microbatch) -> torch.Tensor:
        return batch.loss_mask_RT.sum()

    def work(shapes: Sequence[tuple[int, ...]], sizes: ParallelSizes) -> tuple[Moved, ...]:
        return (Moved(8 * math.prod(shapes[0]), 4, "cross-entropy"),)  # fp32

    fields = frozenset({"labels_RT"})
    options = {"measure": TokenAccuracy, "work": work}
    return Loss("next_byte", compute, count, ("logits",), sharded=False, fields=fields, **options)


# ------------------------------------------------------------------------------------------------------- graph


def build_graph(config: ByteMixerConfig, settings: LayerSettings) -> Graph:
    """Embedding, convolutions, head: each layer a node, so that a pipeline can be cut between any two."""
    vocabulary, width, inputs = config.vocab_size, config.hidden_size, config.hidden_size * config.kernel_size
    matrix = 2 * width * inputs
    hidden = Stream("hidden", lambda plan: (plan.num_rows, plan.row_length, width))
    logits = Stream("logits", lambda plan: (plan.num_rows, plan.row_length, vocabulary))

    def make(kind: type[nn.Module]) -> nn.Module:
        return describe(kind(config, settings), init_std=config.init_std)

    def cost(parameters: int, outputs: int = 0, inputs: int = 0, kernels: int = 1):
        """Every process does all of the work: a product of all positions, kernels that read and write states."""

        def of_plan(plan: MicrobatchPlan) -> NodeCost:
            positions, everywhere = plan.num_rows * plan.row_length, settings.sizes.tp_cp
            moved = Moved(2 * positions * width * settings.dtype.itemsize, kernels)
            work = (moved, MatrixProduct(positions, outputs, inputs)) if outputs else (moved,)
            return NodeCost(parameters, work, 4.0 * positions * width * everywhere, everywhere)

        return of_plan

    def embedding_names(node: str, exported: str) -> Iterator[Entry]:
        yield plain(f"{node}.table", f"{exported}.weight", vocabulary, width)

    def layer_names(node: str, exported: str) -> Iterator[Entry]:
        yield from norm(f"{node}.input_layernorm", f"{exported}.norm", width, bias=True)
        yield plain(f"{node}.kernel", f"{exported}.conv.weight", 2 * width, width, config.kernel_size)

    def head_names(node: str, exported: str) -> Iterator[Entry]:
        yield plain(f"{node}.output", f"{exported}.weight", vocabulary, width)

    table = vocabulary * width
    embedding = Kind(partial(make, ByteEmbedding), cost(table), embedding_names)
    nodes = [Node("embedding", embedding, (), (hidden,), "embed_tokens", frozenset({"tokens_RT"}))]
    for index in range(config.num_layers):
        name = f"layers.{index}"
        figures = cost(matrix + 2 * width, 2 * width, inputs, kernels=4)
        layer = Kind(partial(make, GatedConvolution), figures, layer_names)
        nodes.append(Node(name, layer, ("hidden",), (hidden,), exported=name, recomputable=True))
    head = Kind(partial(make, ByteHead), cost(table, vocabulary, width), head_names)
    nodes.append(Node("output", head, ("hidden",), (logits,), "lm_head"))
    return Graph(nodes, [smoothed_loss(config.label_smoothing)])


# ------------------------------------------------------------------------------------------------------ export

#: Fields of the section and their names in config.json; the others keep theirs.
NAMES = {"num_layers": "num_hidden_layers"}
DATA = ("seq_length",)

ADAPTER = Adapter(
    name="byte_mixer",
    fields=lambda config: section_fields(config, None, NAMES, DATA),
    tree=lambda fields: section_tree(fields, ByteMixerConfig, None, NAMES, DATA),
    config_class="configuration_byte_mixer.ByteMixerConfig",
    model_class="modeling_byte_mixer.ByteMixerModel",
    processor_class="processing_byte_mixer.ByteProcessor",
    source=Path(__file__).parent,
)

register(System("byte_mixer", ByteMixerConfig, build_graph, ADAPTER))

# ----------------------------------------------------------------------------------------------------- dataset


class StandardLibrary:
    """A split of the standard library's modules: sample n is a paragraph that a keyed draw chooses.

    Args:
        files: the modules of the split.
        length: tokens of a row.
    """

    def __init__(self, files: list[Path], tokenizer: Tokenizer, inputs: InputFormat, length: int, seed: int) -> None:
        self.texts, self.tokenizer = tokenizer.encode_batch(paragraphs(files)), tokenizer
        self.inputs, self.length, self.seed, self.files = inputs, length, seed, len(files)

    def report_lines(self) -> list[str]:
        """What the console is told."""
        return [f"{self.files} modules of Python's standard library, {len(self.texts):,} paragraphs"]

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """The samples of these numbers (contract: megatron_mm/data/reading/dataset.py)."""
        rows, tokenizer = [], self.tokenizer
        for number in index:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, number]))
            text = self.texts[draw.integers(len(self.texts))]
            tokens = np.concatenate([[tokenizer.bos_id], text, [tokenizer.eos_id]])[: self.length]
            learned = ~np.isin(tokens, tokenizer.unlearned_ids)
            rows.append([Document(tokens, learned, f"stdlib/{number}")])
        return collate(rows, self.inputs, self.length, index, task, pad_id=tokenizer.pad_id).microbatch


def modules() -> tuple[list[Path], list[Path]]:
    """The modules that are learned, and every tenth, which is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path for number, path in enumerate(files) if number % 10], files[::10]


def paragraphs(files: list[Path]) -> list[str]:
    """What empty lines separate in these modules."""
    parts = (part for path in files for part in path.read_text(encoding="utf-8").split("\n\n"))
    return [part.strip("\n") for part in parts if part.strip()]


def build_datasets(config: Config) -> SimpleNamespace:
    """The splits of a run, and their tokenizer."""
    if config.data.tokenizer is None:
        raise ValueError("data.tokenizer is not set; name examples/own_system/bytes.json")
    tokenizer = open_tokenizer(config.data.tokenizer)
    args = (tokenizer, config.model.inputs, config.data.seq_length, config.training.seed)
    train, valid = (StandardLibrary(files, *args) for files in modules())
    return SimpleNamespace(train=train, valid=valid, tokenizer=tokenizer)
