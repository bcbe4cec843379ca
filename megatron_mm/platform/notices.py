"""What torch and megatron-core say on every process though nobody can act upon it, silenced message by message.

A notice is named by its words, its kind and the module that it comes from: all else that these libraries warn of is
shown. No command of this project sets PYTHONWARNINGS.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple


class Notice(NamedTuple):
    """A warning, or a line of a logger."""

    words: str
    """Regular expression of its beginning."""
    kind: type[Warning] | None
    """None: a line of the module's logger."""
    module: str
    """Name of the module from which it comes, or of a package around that."""
    reason: str


#: Wherever training or a tool runs.
ALWAYS = (
    Notice(
        r"`torch\.distributed\.\w+` is deprecated",
        FutureWarning,
        "torch.distributed.c10d_logger",
        "megatron-core calls collectives by the names that they had before torch 2.13 (our own calls: collectives.py)",
    ),
    Notice(
        r"The \.grad attribute of a Tensor that is not a leaf",
        UserWarning,
        "megatron.core.optimizer.optimizer",
        "its distributed optimizer looks at the gradients of slices, which never have one",
    ),
    Notice(
        "MimoModelConfig is experimental",
        UserWarning,
        "megatron.core.models.mimo.config.base_configs",
        "0.19 imports it with everything else; nothing here uses it",
    ),
    Notice(
        "DistributedDataParallel: full_param_layout not provided",
        None,
        "megatron.core.distributed.distributed_data_parallel",
        "0.19 can be given where each parameter lies in the buffers, and otherwise lays them out as before",
    ),
)
#: Where CUDA is absent (cpu.py): what is missing there is not missed.
WITHOUT_CUDA = (
    Notice(
        "Transformer Engine and Apex are not installed",
        UserWarning,
        "megatron.core",
        "both are kernels of CUDA; optimizer and clipping do without",
    ),
    Notice("Apex is not installed", UserWarning, "megatron.core.models", "its norms are kernels of CUDA"),
    Notice(
        "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        UserWarning,
        "megatron.core.tensor_parallel.layers",
        "it orders kernels of CUDA (examples/cluster.sh sets it for them)",
    ),
    Notice(
        "If you are using transformer_engine as the transformer implementation, the core_attn",
        UserWarning,
        "megatron.core.transformer.transformer_config",
        "the attention that selective recomputation runs again is torch's there",
    ),
    Notice(
        "No CUDA runtime is found",
        None,
        "torch.utils.cpp_extension",
        "0.19 imports the compiler of extensions, which a torch that was built for CUDA has",
    ),
)


def silence(notices: Sequence[Notice]) -> None:
    """Silences notices in this process. Calling it again does no harm."""
    for notice in notices:
        if notice.kind is None:
            logging.getLogger(notice.module).addFilter(_is_worth_saying)
        else:
            module = rf"{re.escape(notice.module)}(\.|\Z)"
            warnings.filterwarnings("ignore", notice.words, notice.kind, module)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a line of one of the loggers is none of the notices."""
    lines = [notice for notice in (*ALWAYS, *WITHOUT_CUDA) if notice.kind is None and notice.module == record.name]
    return not any(re.match(notice.words, record.getMessage()) for notice in lines)
