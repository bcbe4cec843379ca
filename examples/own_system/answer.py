"""Answers a prompt by an exported folder alone, as a machine does that has torch and transformers and not this package.

    python examples/own_system/answer.py exported "import "
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

#: Bytes of an answer; as run.sh asks of tools/generate.py.
NEW_BYTES = 48


def answer(folder: str, prompt: str) -> str:
    """The likeliest bytes after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([{"prompt": prompt}])
    ids = model.generate(**inputs, max_new_tokens=NEW_BYTES, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :])


if __name__ == "__main__":
    for name in ("megatron_mm", "megatron"):
        sys.modules[name] = None  # where they are installed all the same, the folder's code cannot import them
    _, folder, prompt = sys.argv
    print(answer(folder, prompt))
