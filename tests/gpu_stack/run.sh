#!/usr/bin/env bash
# Checks of the GPU stack on a machine without a GPU:  tests/gpu_stack/run.sh
#
# In an environment of its own (.venv-gpu-stack), because Transformer Engine beside CPU training breaks it: megatron-core
# would take its kernels. Its Python layers come from PyPI; stand_in.py says what stands in place of its CUDA library.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MEGATRON_MM_VENV=${MEGATRON_MM_GPU_STACK_VENV:-.venv-gpu-stack}
. tools/setup_env.sh

# The enumerations of the compiled module change between releases.
wanted="transformer-engine==2.20.2"
if [ "$(cat "$MEGATRON_MM_VENV/gpu-stack" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $wanted without its CUDA libraries"
    python -m pip install --quiet onnxscript einops nvdlfw-inspect triton
    python -m pip install --quiet --no-deps "$wanted"
    echo "$wanted" >"$MEGATRON_MM_VENV/gpu-stack"
fi
export PYTHONWARNINGS=ignore
echo "full recipes: first, middle and last ranks, on the meta device"
python -m tests.gpu_stack.check
echo "tiny recipes: checkpoints of one backend loaded by the other"
python -m tests.gpu_stack.checkpoints
