"""Prompts of an exported byte mixer: text to bytes, and back. Part of the exported folder; needs torch and
transformers only.

`ByteProcessor` is what AutoProcessor gives, and what tools/generate.py and tools/evaluate.py call.
"""

import torch
from transformers import AutoConfig


class ByteTokenizer:
    """UTF-8: a token is a byte, and there are no others."""

    vocab_size = 256
    #: No byte stands for an image, a sound or a video.
    placeholder_ids = {}

    def encode(self, text):
        """Text to ids."""
        return list(text.encode("utf-8"))

    def decode(self, ids):
        """Ids to text; bytes that are no UTF-8 show as U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")


class ByteProcessor:
    """Prompts to model inputs, and generated ids to text.

    Args:
        config: the model's configuration.
        tokenizer: None; bytes need no file.
    """

    def __init__(self, config, tokenizer=None):
        self.config, self.tokenizer = config, ByteTokenizer()

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The processor of an exported folder."""
        return cls(AutoConfig.from_pretrained(folder, trust_remote_code=True))

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
        """Text of generated ids."""
        return self.tokenizer.decode([int(i) for i in ids])

    def batch_decode(self, sequences):
        """Texts of several sequences of ids."""
        return [self.decode(ids) for ids in sequences]


__all__ = ["ByteProcessor"]
