"""Run by export_proof.py in a process of its own: what an exported folder says, by nothing but its own code.

    run_exported.py FOLDER INPUTS.pt OUTPUTS.pt

INPUTS holds `prompts` (arguments of generate, None where the model generates no text), `new_tokens`, `answered` (the
fields of the output that are wanted of prompts with their answers), and `calls` (arguments of forward, wanted fields).
OUTPUTS holds `cached` and `uncached` (generated tokens, [R, new_tokens]), `margins` (how far each token of `cached` was
ahead of the second likeliest, [R, new_tokens]), `fields` by name, and `mask`, the attention mask under which the field
`logits` was computed. It needs torch and transformers only.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM


def load(folder):
    """The model of a folder, in fp32."""
    generates = "AutoModelForCausalLM" in json.loads((Path(folder) / "config.json").read_text())["auto_map"]
    kind = AutoModelForCausalLM if generates else AutoModel
    return kind.from_pretrained(folder, trust_remote_code=True, use_safetensors=True, dtype=torch.float32).eval()


@torch.inference_mode()
def run(model, given):
    """OUTPUTS of INPUTS; see the top."""
    said, calls = {"cached": None, "uncached": None, "margins": None, "mask": None, "fields": {}}, given["calls"]
    if (prompts := given["prompts"]) is not None:
        new, length = given["new_tokens"], prompts["input_ids"].shape[1]
        how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        cached = model.generate(**prompts, **how, use_cache=True, output_logits=True)
        said["cached"] = cached.sequences[:, length:]
        said["uncached"] = model.generate(**prompts, **how, use_cache=False).sequences[:, length:]
        size = getattr(model.config, "tokenizer_size", None)
        first, second = torch.stack(cached.logits, dim=1)[..., :size].topk(2, dim=-1).values.unbind(-1)
        said["margins"] = first - second
        ones = torch.ones_like(said["cached"])
        whole = dict(prompts, input_ids=cached.sequences)
        whole["attention_mask"] = torch.cat([prompts["attention_mask"], ones], dim=1)
        calls = [(whole, given["answered"])]
    for arguments, names in calls:
        out = model(**arguments)
        said["fields"].update({name: out[name] for name in names if name in out})
        said["mask"] = arguments["attention_mask"] if "logits" in names else said["mask"]
    return said


if __name__ == "__main__":
    source, read, written = sys.argv[1:]
    torch.save(run(load(source), torch.load(read, weights_only=True)), written)
