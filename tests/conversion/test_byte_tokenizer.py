"""A model that reads bytes: from its checkpoint to a folder that loads by transformers alone, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.conversion.convert import export, refresh, restore
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.evaluate import token_scores
from megatron_mm.generation.generate import Decoding, Generator
from megatron_mm.systems.export import PLUGINS
from tests.conversion.export_case import draw, random_weights, tiny_recipe, train_tokenizer, write_training_folder

pytestmark = pytest.mark.interface

TEXTS = ["a red ball", "", "象 ☃ <image>x<mask>", "a\x00b <video><audio>\n\t  c", "</s><pad><s> is text", "<0x41>"]
#: By transformers alone: this package cannot be imported, nor SentencePiece.
ALONE = """
import json, sys
sys.modules["megatron_mm"] = sys.modules["sentencepiece"] = None
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
folder, saved, prompts, texts = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(prompts)
out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
ids = [tokenizer(text)["input_ids"] for text in texts]
tokenizer.save_pretrained(saved)
again = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
json.dump({
    "answers": processor.batch_decode(out[:, inputs["input_ids"].shape[1]:]), "ids": ids, "size": len(tokenizer),
    "texts": tokenizer.batch_decode(ids), "again": [again(text)["input_ids"] for text in texts],
    "special": [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
                tokenizer.mask_token_id],
    "padded": tokenizer(["a", "bc"], padding=True)["input_ids"],
    "skipped": tokenizer.decode([2, *ids[0], 3, 0], skip_special_tokens=True),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A training run on bytes, its export and a picture."""
    root = tmp_path_factory.mktemp("bytes")
    (root / "bytes.json").write_text('{"kind": "bytes"}\n')
    recipe = tiny_recipe()
    write_training_folder(root / "run" / "checkpoints", recipe, random_weights(recipe.model), root / "bytes.json")
    export(root / "run", root / "exported", quiet=True)
    draw(root / "a.png")
    return root


@pytest.fixture(scope="module")
def prompts(work) -> list[dict]:
    return [{"prompt": "what is", "images": [str(work / "a.png")]}, {"prompt": "☃"}]


def test_the_folder_has_what_transformers_loads(work):
    names = {path.name for path in (work / "exported").iterdir()}
    assert {"byte_tokenizer.json", "tokenizer_config.json", "tokenization_bytes.py"} <= names
    assert "tokenizer.model" not in names
    assert "Needs transformers and Pillow;" in (work / "exported" / "README.md").read_text()
    fields = json.loads((work / "exported" / "config.json").read_text())
    found = {key: fields[f"{key}_token_id"] for key in ("pad", "bos", "eos", "mask")}
    assert found == {"pad": 0, "bos": 2, "eos": 3, "mask": 7} and fields["tokenizer_size"] == 264


def test_it_answers_alone_as_the_checkpoint_does(work, prompts, tmp_path):
    words = [str(work / "exported"), str(tmp_path / "saved"), json.dumps(prompts), json.dumps(TEXTS)]
    # The interpreter itself: what can be imported is the point.
    run = subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found, ours = json.loads(run.stdout), open_tokenizer(work / "bytes.json")
    assert found["ids"] == found["again"] == [ours.encode(text) for text in TEXTS]
    assert found["texts"] == TEXTS and found["size"] == ours.vocab_size
    assert found["special"] == [ours.pad_id, ours.unk_id, ours.bos_id, ours.eos_id, ours.mask_id]
    assert sorted(map(len, found["padded"])) == [2, 2] and found["skipped"] == TEXTS[0]
    direct, exported = (Generator.from_path(work / name) for name in ("run", "exported"))
    for generator in (direct, exported):
        assert list(generator.generate(prompts, Decoding(6), batch_size=2)) == found["answers"]
    samples = [prompt | {"text": "ab <image>☃"} for prompt in prompts]
    scores = token_scores(direct, samples)
    assert scores == token_scores(exported, samples) and scores.loss > 0


def test_it_goes_back_and_is_renewed_and_replaced(work):
    restored = restore(work / "exported", work / "restored", quiet=True)
    assert (restored / "byte_tokenizer.json").read_bytes() == (work / "bytes.json").read_bytes()
    code = work / "exported" / "tokenization_bytes.py"
    whole = code.read_bytes()
    code.write_bytes(whole + b"# of before\n")
    assert "tokenization_bytes.py" in refresh(work / "exported") and code.read_bytes() == whole
    export(work / "run", work / "other", quiet=True)
    export(work / "run", work / "other", quiet=True, overwrite=True)
    (work / "other" / "tokenizer_config.json").rename(work / "other" / "mine.json")
    with pytest.raises(ValueError, match=r"export did not write .*mine\.json"):
        export(work / "run", work / "other", quiet=True, overwrite=True)


def test_another_tokenizer_is_named_where_it_does_not_fit(work, tmp_path):
    with pytest.raises(ValueError, match=r"gone: cannot be read"):
        Generator.from_path(work / "run", tokenizer=tmp_path / "gone")
    large = train_tokenizer(tmp_path / "large.model", 330)
    with pytest.raises(ValueError, match=r"large\.model has 330 pieces, the model's vocabulary 320 rows"):
        export(work / "run", tmp_path / "out", tokenizer=large, quiet=True)
    (tmp_path / "unknown.json").write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match=r"unknown\.json: is of the kind 'words'; known kinds"):
        export(work / "run", tmp_path / "out", tokenizer=tmp_path / "unknown.json", quiet=True)


def test_a_kind_that_comes_with_a_plugin_is_asked_for(work, tmp_path):
    """A folder's tokenizer of a kind that this process does not know is not passed over."""
    folder = tmp_path / "hf"
    shutil.copytree(work / "exported", folder)
    (folder / "byte_tokenizer.json").rename(folder / "letters.json")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {PLUGINS: ["letters.py"]}))
    asked = r"the kind of its tokenizer comes with a plugin of its recipe, letters\.py; .* --plugins"
    with pytest.raises(ValueError, match=asked):
        restore(folder, tmp_path / "restored", quiet=True)
    with pytest.raises(ValueError, match=asked):
        Generator.from_path(folder)
    with pytest.raises(ValueError, match=asked):
        refresh(folder)
    with pytest.raises(ValueError, match=asked):
        export(work / "run", folder, quiet=True, overwrite=True)
    assert not (tmp_path / "restored").exists()
    assert Generator.from_path(folder, tokenizer=work / "bytes.json").processor.tokenizer.vocab_size == 264


def test_a_damaged_tokenizer_does_not_keep_a_folder_from_being_replaced(work, tmp_path):
    export(work / "run", tmp_path / "hf", quiet=True)
    (tmp_path / "hf" / "byte_tokenizer.json").write_text("{")
    export(work / "run", tmp_path / "hf", quiet=True, overwrite=True)
    assert (tmp_path / "hf" / "byte_tokenizer.json").read_bytes() == (work / "bytes.json").read_bytes()
