"""Every attention call of every full recipe through Transformer Engine and FlashAttention on the meta device.

    python -m tests.gpu_stack.shapes [--systems synapse-70b …]

The dry run of each recipe, as its script launches it, forward and backward, with Transformer Engine's attention in
all stages: its Python layer chooses a kernel and checks heads, formats, masks and bounds, FlashAttention's operators
say the shapes of their results, and the layers after them must take these. Exit status 1 if a call was not
FlashAttention's, or if a run would not say so at its start, or not say what has no kernel.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from unittest import mock

from tests.gpu_stack import stand_in

stand_in.install()

import torch  # noqa: E402
import tyro  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams  # noqa: E402

from megatron_mm.config.schema import Config  # noqa: E402
from megatron_mm.config.sizes import ParallelSizes  # noqa: E402
from megatron_mm.models.layers.attention_kernels import describe  # noqa: E402
from megatron_mm.models.layers.settings import LayerSettings  # noqa: E402
from megatron_mm.planner.assembly import layer_settings  # noqa: E402
from megatron_mm.planner.dry_run import dry_run  # noqa: E402
from tests.support.full_recipes import FULL, launched  # noqa: E402

_OPERATORS = ("_flash_attn_forward", "_flash_attn_varlen_forward")


@dataclass
class Arguments:
    """What to run."""

    systems: tuple[str, ...] = FULL
    """Full recipes."""


class _Calls:
    """Counts calls of FlashAttention by format and mask, and checks what comes back."""

    def __init__(self) -> None:
        from megatron_mm.models.layers import transformer_engine as engine

        self.counts: Counter[tuple[str, str]] = Counter()
        self.cores: list[torch.nn.Module] = []
        self._attention, self._run = engine._Attention, engine._Attention.run

    def __enter__(self) -> _Calls:
        counts, cores, run = self.counts, self.cores, self._run

        def counted(core, query, key, value, mask, *rest, **kinds):
            with _Operators() as operators:
                result = run(core, query, key, value, mask, *rest, **kinds)
            assert operators.calls == 1, f"{operators.calls} calls of FlashAttention, not 1"
            assert result.shape == (*query.shape[:-2], query.shape[-2] * query.shape[-1]), result.shape
            assert result.dtype is query.dtype is torch.bfloat16, result.dtype
            counts[kinds["qkv_format"], mask] += 1
            cores.append(core)
            return result

        self._attention.run = counted
        return self

    def __exit__(self, *unused: object) -> None:
        self._attention.run = self._run


class _Operators(TorchDispatchMode):
    """Counts FlashAttention's forward operators."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.name() in {f"flash_attn::{name}" for name in _OPERATORS}
        return function(*args, **(kwargs or {}))


def says_what_has_no_kernel(cores: list[torch.nn.Module], settings: LayerSettings) -> bool:
    """Whether start-up names calls without a kernel, and refuses attention that has none: as in fp32 before 2.11."""
    from megatron_mm.models.layers import transformer_engine as engine

    def only_unpacked(asked: AttentionParams) -> tuple:
        return False, None, False, None, not asked.qkv_layout.startswith("thd"), None

    with mock.patch.object(engine, "get_attention_backend", only_unpacked):
        said = describe([core for core in cores if isinstance(core, engine.CoreAttention)], settings, 32)
        try:
            describe(cores, settings, 32)
        except ValueError as error:
            refused = "no kernel for attention of media of documents (" in str(error)
        else:
            refused = not any(isinstance(core, engine.MediaAttention) for core in cores)
    return refused and "no kernel (packed rows)" in said


def calls(config: Config, sizes: ParallelSizes) -> tuple[Counter, list[str]]:
    """Attention calls of one microbatch in all stages of a layout, by format and mask; what start-up says of them."""
    config = replace(config, model=replace(config.model, backend="transformer_engine", attention_backend="flash"))
    with stand_in.only_attention(), _Calls() as made:
        dry_run(config, sizes.world)
        settings = layer_settings(config, sizes, "cuda")
        said = describe(made.cores, settings, config.data.seq_length)
        assert says_what_has_no_kernel(made.cores, settings)
    return made.counts, said


def main() -> int:
    """Runs and prints counts."""
    arguments = tyro.cli(Arguments, description=__doc__)
    failed = 0
    for name in arguments.systems:
        counts, said = calls(*launched(name))
        failed += not counts or not all(line.startswith("FlashAttention 2") for line in said)
        kinds = ", ".join(f"{number} {form} {mask}" for (form, mask), number in sorted(counts.items()))
        print(f"{name:22} {sum(counts.values()):5} calls of FlashAttention: {kinds or 'NONE'}", flush=True)
        print(f"    start-up says: {'; '.join(said)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
