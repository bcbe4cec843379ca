# megatron_mm on the NVIDIA image with which megatron-core 0.16.1 is tested by its authors (its docker/.ngc_version.dev):
# Python 3.12, torch 2.10.0a0, Transformer Engine 2.9, FlashAttention 2.7.4.post1, NCCL and apex, built against each
# other. megatron-core asks for torch >= 2.6 and, of Transformer Engine, >= 2.9 and < 2.12. The last lines test what was
# built, without a GPU. Not built where this was written (see the README's list of what nobody ran).
FROM nvcr.io/nvidia/pytorch:25.11-py3

# Ubuntu's packages are those of the day: its archive keeps no release but the newest.
RUN apt-get update && apt-get install -y --no-install-recommends espeak-ng npm && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/megatron_mm
# What is installed are the releases of locks/docker.txt, resolved beside the image's torch, of which it names nothing:
# torch, triton, Transformer Engine, FlashAttention and apex stay as they are, because dependencies are not looked for.
# What the image's own constraints file holds back (PIP_CONSTRAINT) may be newer here.
ENV PIP_CONSTRAINT=
COPY locks/docker.txt locks/docker.txt
RUN pip install --no-cache-dir --no-deps --requirement locks/docker.txt
COPY setup.py pyproject.toml README.md ./
COPY megatron_mm megatron_mm
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
COPY . .
# The test, which needs no GPU: what was compiled imports beside what was installed, and 70 billion parameters are built
# and run, one stage of 256 processes after the other.
RUN python -c "import torch, transformer_engine.pytorch, flash_attn, apex, megatron.core, megatron_mm.training.loop; \
    print(torch.__version__, torch.version.cuda, torch.from_numpy(__import__('numpy').zeros(2)).sum())"
RUN python pretrain_multimodal.py --config megatron_mm/recipes/synapse-70b.yaml --dry-run --world-size 256
