#!/usr/bin/env bash
# Checks of the GPU stack on a machine without a GPU:  tests/gpu_stack/run.sh
#
# In an environment of its own (.venv-gpu-stack), because Transformer Engine beside CPU training breaks it: megatron-core
# would take its kernels. It lies over .venv, whose packages it sees and leaves as they are; Transformer Engine's and
# FlashAttention's Python layers come from PyPI, and stand_in.py says what stands in place of their CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/../.."

. tools/setup_env.sh
main=$(python -c 'import site; print(site.getsitepackages()[0])')
venv=${MEGATRON_MM_GPU_STACK_VENV:-.venv-gpu-stack}

release=$(python_release python)
lock=locks/gpu-stack-$release.txt
if [ ! -f "$lock" ]; then
    echo "error: there is no $lock: these checks do not run on Python $release; set PYTHON to another" >&2
    exit 1
fi
wanted="$main $(cat "$lock" "$MEGATRON_MM_VENV/installed" | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the releases of $lock, without CUDA libraries"
    tools/new_venv.sh python "$venv" --without-pip
    echo "$main" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/main.pth"
    # FlashAttention is built, with .venv's setuptools; it would look for a wheel with kernels on another server than PyPI.
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
        tools/pip_install.sh "$venv/bin/python" "the releases of $lock" \
        --no-deps --no-build-isolation --requirement "$lock"
    echo "$wanted" >"$venv/installed"
fi
export PYTHONWARNINGS=ignore
echo "full recipes: first, middle and last ranks, on the meta device"
"$venv/bin/python" -m tests.gpu_stack.check
echo "tiny recipes: checkpoints of one backend loaded by the other"
"$venv/bin/python" -m tests.gpu_stack.checkpoints
echo "full recipes: every attention call through Transformer Engine and FlashAttention, on the meta device"
"$venv/bin/python" -m tests.gpu_stack.shapes
echo "Transformer Engine's attention and context parallelism against the local backend, in numbers"
"$venv/bin/python" -m tests.gpu_stack.numerics
