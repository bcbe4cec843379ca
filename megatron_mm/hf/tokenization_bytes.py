"""UTF-8 bytes as tokens, as transformers loads them: part of an exported folder whose model reads bytes.

`AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` gives it. Eight special tokens come first,
and byte b is id 8 + b. Of the special tokens, the placeholders of media and the mask are found in a text; the names of
the others are text.
"""

import re

from transformers import AddedToken, PreTrainedTokenizer

CONTROL = ("<pad>", "<unk>", "<s>", "</s>")
WRITTEN = ("<image>", "<audio>", "<video>", "<mask>")
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


class ByteTokenizer(PreTrainedTokenizer):
    """256 bytes behind eight special tokens; sets no token around a text."""

    vocab_files_names = {"vocab_file": "byte_tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file=None, **kwargs):
        self.vocab_file = vocab_file
        self._names = (*CONTROL, *WRITTEN, *BYTES)
        self._ids = {name: i for i, name in enumerate(self._names)}
        roles = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), CONTROL)) | {"mask_token": "<mask>"}
        super().__init__(**({role: AddedToken(name, special=True) for role, name in roles.items()} | kwargs))

    @property
    def vocab_size(self):
        return len(self._ids)

    def get_vocab(self):
        return dict(self._ids) | self._added_tokens_encoder

    def tokenize(self, text, **kwargs):
        """Names of tokens. In a text, those of control tokens are text; tokens that a user has added are found."""
        added = [name for name in self._added_tokens_encoder if name not in self._ids]
        found = set(WRITTEN).union(added)
        tokens = []
        for part in re.split(f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})", text):
            tokens += [part] if part in found else (self._names[8 + byte] for byte in part.encode())
        return tokens

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0 + (token_ids_1 or [])

    def _convert_token_to_id(self, token):
        return self._ids.get(token)

    def _convert_id_to_token(self, index):
        if index < 0:
            raise IndexError(f"{index} is no id of a token")
        return self._names[index]

    def convert_tokens_to_string(self, tokens):
        """Text; bytes that are no UTF-8 become U+FFFD, and other tokens stay as written."""
        out = bytearray()
        for token in tokens:
            out += bytes([BYTES[token]]) if token in BYTES else token.encode()
        return out.decode(errors="replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Writes the file by which the kind of tokenizer is known."""
        path = f"{save_directory}/{filename_prefix + '-' if filename_prefix else ''}byte_tokenizer.json"
        with open(path, "w", encoding="utf-8") as stream:
            stream.write('{"kind": "bytes"}\n')
        return (path,)


__all__ = ["ByteTokenizer"]
