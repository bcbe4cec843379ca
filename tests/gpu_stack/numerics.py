"""Transformer Engine's attention against the local backend's, in numbers, on two processes of a CPU.

    python -m tests.gpu_stack.numerics

Layers of a small Synapse compute with Transformer Engine's Python code, its context parallelism over gloo included,
down to FlashAttention's operators, which flash.py computes. So what is compared is everything above these kernels:
formats, masks, bounds of segments, which tokens a process holds, what it exchanges, and whose exchange it is. Truth is
the same layer with the local backend in fp32, whole rows on one process: outputs, gradients of the input and of every
parameter. Exit status 1 if one differs by more than half precision explains.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

from tests.gpu_stack import stand_in

stand_in.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch import nn  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention import backends  # noqa: E402

from megatron_mm.config.sizes import ParallelSizes  # noqa: E402
from megatron_mm.data.reading.microbatch import Microbatch  # noqa: E402
from megatron_mm.models.graph import ForwardContext, Node  # noqa: E402
from megatron_mm.models.layers.settings import LayerSettings  # noqa: E402
from megatron_mm.models.layers.sharding import local_text  # noqa: E402
from megatron_mm.parts.decoder.nodes import DecoderNodes  # noqa: E402
from megatron_mm.platform import setup  # noqa: E402
from megatron_mm.systems.graph import build_graph  # noqa: E402
from tests.gpu_stack import flash  # noqa: E402
from tests.models import synapse_case  # noqa: E402

PROCESSES = 2
#: Largest difference, over the largest value of each tensor. fp16 gives 2e-3; a wrong mask or chunk, more than 0.1.
TOLERANCE = 1e-2
CONFIG = synapse_case.tiny_config(init_std=0.2)  # large weights: attention is sharp, and sublayers change the stream


def self_attention(causal: bool) -> Callable[[LayerSettings], Node]:
    """A layer of the decoder."""
    return lambda settings: DecoderNodes(CONFIG.decoder, settings, CONFIG.init_std, lambda plan: causal).layer(0)


def named(name: str) -> Callable[[LayerSettings], Node]:
    """A node of the system."""
    return lambda settings: next(node for node in build_graph(CONFIG, settings).nodes if node.name == name)


def packed() -> Microbatch:
    """Several documents a row, some cut by the pieces of a row that processes hold."""
    return synapse_case.make_batch(CONFIG)


def single() -> Microbatch:
    """One document a row, with padding."""
    batch = packed()
    for row, length in enumerate((32, 21, 6)):
        batch.document_ids_RT[row] = torch.where(torch.arange(32) < length, 0, -1)
        batch.position_ids_RT[row] = torch.arange(32)
    batch.plan = replace(batch.plan, one_document_per_row=True, max_documents_per_row=1)
    return batch


@dataclass(frozen=True)
class Case:
    """A layer, rows and a layout."""

    name: str
    node: Callable[[LayerSettings], Node]
    batch: Callable[[], Microbatch]
    comms: tuple[str, ...] = ("all_gather",)
    sharded: bool = True
    within: bool = False
    """Context parallelism is Transformer Engine's own."""


CASES = (
    Case("packed rows, causal", self_attention(True), packed, ("all_gather", "a2a")),
    Case("packed rows, both directions", self_attention(False), packed, ("all_gather", "a2a")),
    Case("one document a row, causal", self_attention(True), single, ("all_gather", "a2a", "p2p"), within=True),
    Case("one document a row, both directions", self_attention(False), single, ("all_gather", "a2a", "p2p")),
    Case("media of documents", named("decoder.cross_layers.0"), packed),
    Case("images", named("vision.layers.0"), packed, sharded=False),
)


def inputs(case: Case, batch: Microbatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Whole streams that the layer reads, the first one [rows, tokens, width], and what its output is multiplied by."""
    generator = torch.Generator().manual_seed(5)
    plan = batch.plan
    shapes = [(plan.num_rows, plan.row_length, CONFIG.decoder.hidden_size)]
    shapes += [(plan.num_images, CONFIG.vision.tokens_per_image, CONFIG.vision.hidden_size)]
    shapes += [(plan.num_sounds, CONFIG.audio.tokens_per_sound, CONFIG.audio.hidden_size)]
    streams = [torch.randn(shape, generator=generator) for shape in shapes]
    streams = streams[: len(case.node(LayerSettings()).reads)] if case.sharded else streams[1:2]
    weight = torch.randn(streams[0].shape, generator=generator)
    if case.sharded:
        weight = weight * (batch.document_ids_RT >= 0)[:, :, None]  # what padding computes is nobody's business
    return streams, weight


def figures(case: Case, settings: LayerSettings) -> dict[str, torch.Tensor]:
    """Output, gradients of streams and of parameters; of text, this process's tokens, and sums over all processes."""
    batch = case.batch()
    module: nn.Module = synapse_case.fill(case.node(settings).build())
    whole, weight = inputs(case, batch)
    share = local_text if case.sharded else lambda values: values
    first, *others = [share(whole[0]), *whole[1:]]
    streams = [values.to(settings.dtype).requires_grad_() for values in (first, *others)]
    read = [streams[0].flatten(0, 1)[:, None], *streams[1:]] if case.sharded else streams
    update = module(*read, ForwardContext(batch)).view(first.shape) - streams[0]
    weight = share(weight)
    (update.float() * weight).sum().backward()
    summed = {f"gradient of stream {number}": stream.grad for number, stream in enumerate(streams[1:], start=1)}
    summed |= {name: parameter.grad for name, parameter in module.named_parameters()}
    for gradient in summed.values():
        if settings.sizes.cp > 1:
            dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    own = {"output": update.detach() * (weight != 0), "gradient of stream 0": streams[0].grad}
    return own | summed


#: Transformer Engine's context parallelism, where its FlashAttention calls it; argument 14 is the kind.
_WITHIN = "attn_forward_func_with_cp"


def difference(case: Case, cp_size: int, comm: str) -> tuple[float, str]:
    """The largest one, over each tensor's largest value, and whose it is."""
    setup.initialize_groups(ParallelSizes(dp=PROCESSES))
    expected = figures(case, LayerSettings())
    sizes = ParallelSizes(cp=cp_size, dp=PROCESSES // cp_size)
    setup.initialize_groups(sizes)
    settings = LayerSettings(sizes, torch.float16, "transformer_engine", cp_comm_type=comm)
    with stand_in.only_attention(), mock.patch.object(backends, _WITHIN, wraps=getattr(backends, _WITHIN)) as within:
        found = figures(case, settings)
    assert found.keys() == expected.keys()
    asked = {call.args[14] for call in within.call_args_list}
    if asked != ({comm} if case.within and cp_size > 1 else set()):
        return float("inf"), f"Transformer Engine's own exchange: {asked or 'none'}"
    worst = (0.0, "")
    for name, value in expected.items():
        if case.sharded and name in ("output", "gradient of stream 0"):
            value = local_text(value)
        worst = max(worst, ((found[name].float() - value).abs().max().item() / value.abs().max().item(), name))
    return worst


def main() -> int:
    """Compares in this process's layout; rank 0 prints."""
    setup.initialize(ParallelSizes(dp=PROCESSES), seed=1)
    flash.install()
    failed = count = 0
    for case in CASES:
        layouts = [(1, "all_gather"), *((PROCESSES, comm) for comm in case.comms if case.sharded)]
        for cp_size, comm in layouts:
            worst, name = difference(case, cp_size, comm)
            everywhere = torch.tensor(worst)
            dist.all_reduce(everywhere, dist.ReduceOp.MAX)
            failed, count = failed + (not everywhere <= TOLERANCE), count + 1
            if dist.get_rank() == 0:
                layout = f"CP{cp_size} {comm}" if cp_size > 1 else "CP1"
                print(f"{case.name:38} {layout:16} {everywhere.item():.1e} ({name})", flush=True)
    if dist.get_rank() == 0:
        print(f"{count} layouts of attention compared: {f'{failed} DIFFER' if failed else 'all agree'}")
    setup.shutdown()
    return int(failed > 0)


def start() -> int:
    """The same on two processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    return subprocess.run([*words, "-m", "tests.gpu_stack.numerics", "worker"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:] == ["worker"] else start())
