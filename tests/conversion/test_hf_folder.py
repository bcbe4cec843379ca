"""Exported folders: what may be replaced, what renewing keeps, and what a proof finds.

Truth: the files that stood there before, byte for byte; the training model's own values, for the proof.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.conversion import hf_folder
from megatron_mm.conversion.convert import export, refresh, restore
from megatron_mm.conversion.hf_folder import REPLACED, TRANSFORMERS_RELEASES, not_exported
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder
from megatron_mm.evaluation.export_proof import proof, prove
from megatron_mm.generation.generate import Decoding, Generator
from tests.conversion.export_case import random_weights, tiny_recipe, train_tokenizer, write_training_folder
from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's output folder with a checkpoint."""
    root = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe()
    tokenizer = train_tokenizer(root / "spm.model")
    write_training_folder(root / "checkpoints", recipe, random_weights(recipe.model), tokenizer)
    return root


@pytest.fixture
def exported(run, tmp_path):
    return export(run, tmp_path / "exported", quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- overwriting


def test_overwrite_replaces_what_export_wrote(run, exported):
    before = contents(exported)
    (exported / "README.md").unlink()  # a part of it is enough
    assert export(run, exported, overwrite=True, quiet=True) == exported
    assert contents(exported) == before
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def web_site(folder: Path) -> None:
    """Another program's folder with a file config.json."""
    (folder / "src").mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "a web site"}')
    (folder / "src" / "thesis.txt").write_text("three years of work")


def other_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")


def same_name_of_another(folder: Path) -> None:
    """Somebody else's model that is called synapse too."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "synapse", "auto_map": {"AutoConfig": "mine.Config"}}')


@pytest.mark.parametrize("make", [web_site, other_model, same_name_of_another])
def test_overwrite_refuses_a_folder_that_export_did_not_write(run, tmp_path, make):
    make(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine: --overwrite replaces an exported model only"):
        export(run, tmp_path / "mine", overwrite=True, quiet=True)
    assert contents(tmp_path / "mine") == before and [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "figures/a.png", "checkpoint-10/state.json"])
def test_overwrite_refuses_a_folder_with_a_file_of_the_users(run, exported, name):
    (exported / name).parent.mkdir(exist_ok=True)
    (exported / name).write_text("of the user's")
    before = contents(exported)
    with pytest.raises(ValueError, match=f"export did not write {exported / Path(name).parts[0]}"):
        export(run, exported, overwrite=True, quiet=True)
    assert contents(exported) == before


def test_overwrite_refuses_a_readme_that_was_written_anew_and_links(run, exported, tmp_path):
    (exported / "README.md").write_text("# My model\n")
    assert "did not write" in not_exported(exported)
    export(run, tmp_path / "other", quiet=True)
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "other" / "config.json").rename(kept / "config.json")
    (tmp_path / "other" / "config.json").symlink_to(kept / "config.json")
    with pytest.raises(ValueError, match="did not write"):
        export(run, tmp_path / "other", overwrite=True, quiet=True)
    assert (kept / "config.json").exists()


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_an_empty_or_root_output_is_refused(run, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"has no name of its own|is a root folder"):
            export(run, output, overwrite=overwrite, quiet=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- proving


def change_weight(folder: Path) -> None:
    """One tensor of an exported folder becomes another."""
    files = SafetensorsFolder(folder)
    path, offset, length, *_ = files._where["model.layers.1.mlp.up_proj.weight"]
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(torch.randn(length // 4).numpy().tobytes())


def lose_cache(code: str) -> str:
    return code.replace("begin(past_key_values, cache,", "begin(None, None,")


def forget(code: str) -> str:
    """The cache's keys are those of the first token: answers with and without it differ, and nothing raises."""
    wrong = "k, v = cache.update(k, v, self.layer_idx); k = k[:, :, :1].expand_as(k)"
    return code.replace("k, v = cache.update(k, v, self.layer_idx)", wrong)


def break_code(code: str) -> str:
    return "import nothing_of_this_name\n"


@pytest.mark.slow
def test_a_proof_says_what_agreed(run, exported, capsys):
    assert prove(exported).endswith("tokens, generated with its cache and without it, agree")
    proof(run)(exported)
    said = capsys.readouterr().out
    assert "generated with its cache, without it and by the training model, agree" in said
    assert float(re.search(r"\(values within (\S+) of the largest\)", said).group(1)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, damage, found",
    [
        ("modeling_synapse.py", lose_cache, "cannot use the exported model: ValueError: position_ids reach"),
        ("text_layers.py", forget, "with its cache and .* without it"),
        ("text_layers.py", break_code, "nothing_of_this_name"),
    ],
)
def test_wrong_code_of_this_package_leaves_no_folder_behind(run, tmp_path, monkeypatch, name, damage, found):
    write = hf_folder.write_code

    def write_damaged(folder: Path, file: str, source: Path) -> None:
        write(folder, file, source)
        if file == name:
            code = (folder / file).read_text()
            assert damage(code) != code
            (folder / file).write_text(damage(code))

    monkeypatch.setattr(hf_folder, "write_code", write_damaged)
    with pytest.raises(ValueError, match=found):
        export(run, tmp_path / "exported", quiet=True, check=proof(run))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_wrong_weight_leaves_no_folder_behind(run, tmp_path):
    check = proof(run)

    def damaged(folder: Path) -> None:
        change_weight(folder)
        check(folder)

    with pytest.raises(ValueError, match="logits of the exported model differ from the training model's by"):
        export(run, tmp_path / "exported", quiet=True, check=damaged)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_proof_that_does_not_fit_in_memory_says_so(exported, monkeypatch):
    from megatron_mm.evaluation import export_proof

    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(export_proof.psutil, "virtual_memory", lambda: free)
    assert re.fullmatch(r".* was not run: .* takes about \S+ GiB, and 0.0 GiB are free", prove(exported))


@pytest.mark.slow
def test_the_tool_ends_with_the_proof(run, tmp_path):
    command = [PYTHON, "tools/convert_checkpoint.py", "export"]
    command += ["--checkpoint", str(run), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "without it and by the training model, agree" in done.stdout
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}"


# ---------------------------------------------------------------------------------------------------------- refreshing


#: Files of code that folders of before lack.
NEW = ["exported_model.py", "media_decoding.py", "media_errors.py", "media_transforms.py"]


def make_old(folder: Path) -> None:
    """As export wrote it before it knew of releases and of media: other code, and no word of tokenizer and releases."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("tokenizer_size", "transformers_releases"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    for name in NEW:
        (folder / name).unlink()
    (folder / "modeling_synapse.py").write_text("# the code of before\n")


def test_refresh_renews_code_and_keeps_the_rest(run, exported, tmp_path):
    fresh = contents(exported)
    make_old(exported)
    (exported / "notes.txt").write_text("of the user's")
    changed = refresh(exported)
    assert changed == ["modeling_synapse.py", *NEW, "config.json"]
    after = contents(exported)
    assert after.pop("notes.txt") == b"of the user's"
    assert after.pop(f"{REPLACED}/modeling_synapse.py") == b"# the code of before\n"
    assert json.loads(after.pop("config.json")) == json.loads(fresh.pop("config.json"))
    assert after == fresh
    assert refresh(exported) == []
    assert json.loads((exported / "config.json").read_text())["transformers_releases"] == list(TRANSFORMERS_RELEASES)
    restore(exported, tmp_path / "restored", quiet=True)


def test_a_refresh_that_is_not_proved_changes_nothing(exported):
    make_old(exported)
    before = contents(exported)

    def refuses(folder: Path) -> None:
        assert (folder / "exported_model.py").exists() and SafetensorsFolder(folder).names
        raise ValueError("it says something else")

    with pytest.raises(ValueError, match="something else"):
        refresh(exported, refuses)
    assert contents(exported) == before and [p.name for p in exported.parent.iterdir()] == ["exported"]


def test_refresh_takes_what_export_wrote_and_nothing_else(tmp_path):
    web_site(tmp_path / "site")
    with pytest.raises(ValueError, match="model_type is None"):
        refresh(tmp_path / "site")


def test_a_folder_of_before_never_answers_with_padded_rows(exported):
    """tools/generate.py reads it with today's code: the size of the tokenizer comes from the tokenizer."""
    make_old(exported)
    generator = Generator.from_path(exported)
    assert generator.model.config.tokenizer_size == 300 < generator.model.config.vocab_size
    prompts = [{"prompt": "a red"}] * 50
    list(generator.generate(prompts, Decoding(max_new_tokens=20, top_p=1.0, temperature=2.0)))  # decode refuses others
