"""Notices of libraries: those that are listed are silent, and whatever differs from them in anything is shown.

Truth: the words as torch 2.13 and megatron-core 0.16.1 or 0.19.2 print them on a CPU when nothing is silenced.
"""

import json
import subprocess
from pathlib import Path

import pytest

import megatron_mm
from megatron_mm.platform import notices
from tests.support.programs import INTERPRETER

_TE = "Transformer Engine and Apex are not installed. Falling back to"
_LOCAL = f"{_TE} local implementations of multi_tensor_applier"
_ADVICE = "it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup"
#: (kind, module, words); the kind of a line of a logger is empty.
SAID = [
    ("FutureWarning", "torch.distributed.c10d_logger",
     "`torch.distributed.all_gather_into_tensor` is deprecated. Please use `torch.distributed.all_gather_single` "
     "instead."),
    ("FutureWarning", "torch.distributed.c10d_logger",
     "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use `torch.distributed.reduce_scatter_single` "
     "instead."),
    ("UserWarning", "megatron.core.optimizer.optimizer",
     "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed. Its .grad attribute won't be "
     "populated during autograd.backward()."),
    ("UserWarning", "megatron.core.models.mimo.config.base_configs",
     "MimoModelConfig is experimental and still under active development. The API may change without notice in future "
     "releases."),
    ("UserWarning", "megatron.core.optimizer", f"{_TE} Torch optimizers."),
    ("UserWarning", "megatron.core.optimizer.optimizer", f"{_LOCAL} and multi_tensor_scale"),
    ("UserWarning", "megatron.core.optimizer.clip_grads", f"{_LOCAL}, multi_tensor_l2norm, and multi_tensor_scale"),
    ("UserWarning", "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision",
     f"{_LOCAL} and multi_tensor_scale"),
    ("UserWarning", "megatron.core.models.backends", "Apex is not installed. Falling back to Torch Norm"),
    ("UserWarning", "megatron.core.tensor_parallel.layers", f"When using async grad allreduce {_ADVICE}"),
    ("UserWarning", "megatron.core.tensor_parallel.layers", f"When using sequence parallelism {_ADVICE}"),
    ("UserWarning", "megatron.core.transformer.transformer_config",
     "If you are using transformer_engine as the transformer implementation, the core_attn is from transformer_engine "
     "and may be the fused version."),
    ("", "megatron.core.distributed.distributed_data_parallel",
     "DistributedDataParallel: full_param_layout not provided with use_distributed_optimizer=True."),
    ("", "torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='/usr/local'"),
]  # fmt: skip
OTHERS = [
    *[(kind, f"another.{module}", words) for kind, module, words in SAID],
    *[(kind, module, f"New: {words}") for kind, module, words in SAID],
    *[("RuntimeWarning", module, words) for kind, module, words in SAID if kind],
    *[("UserWarning", module, words) for kind, module, words in SAID if not kind],
    ("UserWarning", "megatron.core_of_mine", f"{_TE} Torch optimizers."),
    ("UserWarning", "megatron.core.transformer.transformer_config", "full scope is deprecated."),
]

#: python -c SAY: says what is in standard input, each thing with its number, on a CPU.
SAY = """
import builtins, json, logging, sys, warnings
from megatron_mm.platform import cpu
cpu.apply()
cpu.apply()
for number, (kind, module, words) in enumerate(json.load(sys.stdin)):
    if kind:
        warnings.warn_explicit(f"{words} #{number}#", getattr(builtins, kind), "file.py", number, module)
    else:
        logging.getLogger(module).warning("%s #%d#", words, number)
"""


def shown(said: list[tuple[str, str, str]]) -> list[int]:
    """Numbers of what a process on a CPU shows."""
    command, given = [INTERPRETER, "-c", SAY], json.dumps(said)
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=True)
    return [number for number in range(len(said)) if f"#{number}#" in done.stderr]


@pytest.mark.slow
def test_known_notices_are_silent_and_all_others_are_shown():
    assert [SAID[number] for number in shown(SAID)] == []
    assert shown(OTHERS) == list(range(len(OTHERS)))


def test_every_notice_is_one_that_is_said():
    import re

    for notice in (*notices.ALWAYS, *notices.WITHOUT_CUDA):
        kind = notice.kind.__name__ if notice.kind else ""
        said = [words for name, module, words in SAID if name == kind and f"{module}.".startswith(f"{notice.module}.")]
        assert any(re.match(notice.words, words) for words in said), notice
        assert notice.reason


def test_the_package_calls_collectives_by_their_new_names():
    """The old names' warnings are silenced with megatron-core's: they come from the same module of torch."""
    package = Path(megatron_mm.__path__[0])
    for path in package.rglob("*.py"):
        if path != package / "platform" / "collectives.py":
            text = path.read_text()
            assert "all_gather_into_tensor" not in text and "reduce_scatter_tensor" not in text, path


@pytest.mark.slow
def test_a_plugin_that_imports_layers_first_brings_no_notices():
    """A tool reads a recipe, and with it the plugin's file, before it has a platform."""
    read = "from megatron_mm.config.load import load_config; load_config('examples/own_system/byte-mixer.yaml')"
    root = Path(__file__).parents[2]
    done = subprocess.run([INTERPRETER, "-c", read], capture_output=True, encoding="utf-8", cwd=root)
    said = "examples/own_system/byte-mixer.yaml: its code runs: examples/own_system/byte_mixer.py\n"
    assert (done.returncode, done.stderr) == (0, said)
