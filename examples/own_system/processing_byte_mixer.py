"""Prompts of an exported byte mixer: text to bytes, and back. Part of the exported folder; needs torch and
transformers only.

`ByteProcessor` is what AutoProcessor gives, and what tools/generate.py and tools/evaluate.py call.
"""

import torch
from transformers import AutoConfig, AutoTokenizer


class ByteProcessor:
    """Prompts to model inputs, and generated ids to text.

    Args:
        config: the model's configuration, which has the ids of special tokens.
        tokenizer: has encode(text) -> ids and decode(ids) -> text.
    """

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The processor of an exported folder."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return cls(config, AutoTokenizer.from_pretrained(folder, trust_remote_code=True))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """AutoProcessor asks for this; the folder's config.json already names the class."""

    def __call__(self, prompts, with_text=False):
        """A batch, padded on the left: input_ids and attention_mask [B, T].

        Args:
            prompts: dicts (or one dict) with "prompt" (text, optional).
            with_text: rows go on with "text".

        Raises:
            ValueError: a prompt has images, sounds or videos.
        """
        prompts = [prompts] if isinstance(prompts, dict) else list(prompts)
        rows = []
        for prompt in prompts:
            if media := [kind for kind in ("images", "audios", "videos") if prompt.get(kind)]:
                raise ValueError(f"the byte mixer reads text alone; a prompt has {', '.join(media)}")
            text = (prompt.get("prompt") or "") + ((prompt.get("text") or "") if with_text else "")
            rows.append([self.config.bos_token_id, *self.tokenizer.encode(text)])
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.config.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids):
        """Text of generated ids, up to the first </s>."""
        ids, config = [int(i) for i in ids], self.config
        if config.eos_token_id in ids:
            ids = ids[: ids.index(config.eos_token_id)]
        return self.tokenizer.decode([i for i in ids if i not in (config.pad_token_id, config.bos_token_id)])

    def batch_decode(self, sequences):
        """Texts of several sequences of ids."""
        return [self.decode(ids) for ids in sequences]


__all__ = ["ByteProcessor"]
