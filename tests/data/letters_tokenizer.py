"""A kind of tokenizer of a plugin's own, as docs/data.md shows it: the letters that its file lists."""

from __future__ import annotations

import hashlib

from megatron_mm.data.tokens.tokenizer import ROLES, Tokenizer, json_fields, register_tokenizer


class LetterTokenizer(Tokenizer):
    kind = "letters"
    reads = 'the JSON object {"kind": "letters", "letters": …}'
    file_name = "letters.json"

    def __init__(self, path, content):
        self.path, self.identity = path, hashlib.sha256(content).hexdigest()
        self.letters = json_fields(content)["letters"]
        self.vocab_size = 2 + len(self.letters)
        for role in ROLES:
            setattr(self, f"{role}_id", {"pad": 0, "eos": 1}.get(role))

    @staticmethod
    def recognises(content):
        return json_fields(content, "letters") is not None

    def encode(self, text):
        return [2 + self.letters.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.letters[i - 2] for i in ids if i >= 2)

    def piece(self, index):
        return ("<pad>", "</s>", *self.letters)[index]


register_tokenizer(LetterTokenizer)
