# megatron_mm on NVIDIA's PyTorch image, which carries CUDA, NCCL, Transformer Engine, FlashAttention and apex built
# against each other. Not built where this was written: no GPU was at hand (see the README's list of what nobody ran).
FROM nvcr.io/nvidia/pytorch:25.06-py3

RUN apt-get update && apt-get install -y --no-install-recommends espeak-ng npm && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/megatron_mm
COPY setup.py pyproject.toml README.md ./
COPY megatron_mm megatron_mm
# The image's torch, Transformer Engine and FlashAttention stay as they are: only what is missing is installed.
RUN pip list --format=freeze | grep -iE '^(torch|transformer.engine|flash.attn|apex)' > /tmp/pinned.txt; \
    pip install --no-cache-dir --constraint /tmp/pinned.txt '.[evaluation,plot]'
COPY . .
RUN python -c "import torch, transformer_engine, flash_attn, apex, megatron.core, megatron_mm; print(torch.__version__)"
