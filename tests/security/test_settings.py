"""Recipes and tokenizers that others wrote: data, unless the user names them with --config or --plugins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_mm.config.load import dump_config, load_config, load_saved_config
from megatron_mm.config.plugins import load_plugins
from megatron_mm.data.tokens.tokenizer import open_tokenizer, stored_name, tokenizer_in
from megatron_mm.media.errors import DataError
from megatron_mm.training import identity
from tests.support.hostile import SPECIAL, Hostile, check_refused, returns, tool
from tests.support.programs import INTERPRETER

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
RECIPES = {
    "a type of Python's": ("data: !!python/object/apply:os.system [{command!r}]\n", "not YAML"),
    "a module": ("data: !!python/module:{module}\n", "not YAML"),
    "names that multiply": (BOMB, "stands for"),
    "merges that multiply": (MERGED, "stands for"),
    "a list in itself": ("a: &a [*a]\n", "within itself"),
    "brackets": ("a: " + "[" * 3_000, "nested too deeply"),
    "no text": (b"\xff\xfe\x00", "no recipe"),
    "keys that are no names": ("1: 2\n[a, b]: c\n", "no recipe|no such field|must be"),
    "a number": ("3\n", "must hold sections"),
}


@pytest.mark.parametrize("loads", [load_config, load_saved_config], ids=["named", "saved"])
@pytest.mark.parametrize(("text", "message"), RECIPES.values(), ids=RECIPES)
def test_yaml_of_other_types_or_without_bounds_is_refused(text, message, loads, tmp_path, monkeypatch, hostile):
    (tmp_path / "evil.py").write_text(hostile.code)
    monkeypatch.syspath_prepend(str(tmp_path))
    if isinstance(text, str) and "{command" in text:
        text = text.format(command=f"touch {hostile.marker}")
    text = text.replace("{module}", "evil") if isinstance(text, str) else text
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as raised:
        loads(tmp_path / "r.yaml")
    assert "r.yaml" in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_a_recipe_is_a_plain_file(kind, tmp_path, hostile):
    path = hostile.special(kind, tmp_path / "r.yaml")
    with pytest.raises((ValueError, IsADirectoryError), match=r"r\.yaml"):
        returns(lambda: load_config(path))


# ------------------------------------------------------------------------------------------------------------- plugins


def saved(folder: Path, **fields) -> Path:
    """Settings as a checkpoint holds them."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(fields))  # which is YAML
    return path


@pytest.mark.parametrize("where", ["beside the settings", "in the folder of work", "where modules are"])
@pytest.mark.parametrize("name", ["evil_plugin.py", "evil_plugin"])
def test_saved_settings_run_no_plugin(name, where, tmp_path, monkeypatch, hostile):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "evil_plugin.py").write_text(hostile.code)
    if where == "in the folder of work":
        monkeypatch.chdir(folder)
    elif where == "where modules are":
        monkeypatch.syspath_prepend(str(folder))
    for fields in ({"plugins": [name]}, {"plugins": [name], "model": {"system": "evil"}}):
        with pytest.raises(ValueError, match=rf"config\.yaml: plugins names '{name}', which .* --plugins"):
            load_saved_config(saved(folder, **fields))
    path = saved(folder, data={"builder": f"{name}:build"})
    assert load_saved_config(path).data.builder is None
    with pytest.raises(ValueError, match=rf"config\.yaml: data\.builder names '{name}', which .* --plugins"):
        load_saved_config(path, reads_data=True)


@pytest.mark.parametrize("names", ["evil.py", [3], {"a": "b"}, [["evil.py"]]])
def test_plugins_that_are_no_list_of_names(names, tmp_path):
    with pytest.raises(ValueError, match="plugins: it must be a list of files or modules"):
        load_saved_config(saved(tmp_path, plugins=names))


def test_the_plugin_that_the_user_names_is_taken_in_the_place_of_the_checkpoints(tmp_path, hostile):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    (mine / "named_plugin_test.py").write_text("def build(config):\n    return 'mine'\n")
    (theirs / "named_plugin_test.py").write_text(hostile.code)
    path = saved(theirs, plugins=["named_plugin_test.py"], data={"builder": "elsewhere/named_plugin_test.py:build"})
    with pytest.raises(ValueError, match="--plugins"):
        load_saved_config(path)
    load_plugins([str(mine / "named_plugin_test.py")])
    config = load_saved_config(path, reads_data=True)
    assert config.plugins == [str(mine / "named_plugin_test.py")]
    assert config.data.builder == f"{mine / 'named_plugin_test.py'}:build"


def test_the_packages_own_builder_needs_no_name(tmp_path):
    own = "megatron_mm.data.reading.generated:build"
    assert load_saved_config(saved(tmp_path, data={"builder": own}), reads_data=True).data.builder == own
    path = saved(tmp_path, data={"builder": "megatron_mm.platform.setup:exit_at_once"})
    with pytest.raises(ValueError, match=r"data\.builder names 'megatron_mm\.platform\.setup'"):
        load_saved_config(path, reads_data=True)


def test_a_recipe_that_the_user_names_runs_its_code_and_says_so_before(tmp_path, capsys):
    (tmp_path / "loud_plugin.py").write_text("import sys\nprint('it runs', file=sys.stderr)\n")
    (tmp_path / "loud_builder.py").write_text("")
    (tmp_path / "r.yaml").write_text("plugins: [loud_plugin.py]\ndata: {builder: 'loud_builder.py:build'}\n")
    for _ in range(2):  # what was said is not said again
        load_config(tmp_path / "r.yaml")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{tmp_path}/r.yaml: its code runs: {tmp_path}/loud_plugin.py",
        f"{tmp_path}/r.yaml: its code runs: {tmp_path}/loud_builder.py",
        "it runs",
    ]


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tokenizer_is_a_plain_file(kind, tmp_path, hostile):
    path = hostile.special(kind, tmp_path / "t.model")
    said = "cannot be read" if kind == "folder" else f"is a {kind}; only plain files are read"
    with pytest.raises(DataError, match=rf"t\.model: {said}"):
        returns(lambda: open_tokenizer(path))
    assert stored_name(path) == "tokenizer.model"


TOKENIZERS = {
    "brackets": ("[" * 100_000).encode(),
    "brackets on the next line": ("\n" + "[" * 100_000).encode(),
    "another kind": b'{"kind": "evil"}',
    "a module as a kind": b'{"kind": "evil:Tokenizer"}',
    "Hugging Face's": b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "kind": 5}',
    "a field more": b'{"kind": "bytes", "auto_map": "evil.T"}',
    "pieces cut off": b"\n\x0e\n\x05<unk>",
    "nothing": b"",
}


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_data(content, tmp_path, monkeypatch, hostile):
    (tmp_path / "evil.py").write_text(hostile.code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer\.model: "):
        open_tokenizer(tokenizer_in(tmp_path))


def test_a_pickled_tokenizer_is_not_loaded(tmp_path, hostile):
    (tmp_path / "t").write_bytes(hostile.pickled)
    with pytest.raises(DataError, match=r"tokenizer .*: not a SentencePiece model"):
        open_tokenizer(tmp_path / "t")


def test_a_tokenizer_larger_than_any_is_not_read(tmp_path):
    with (tmp_path / "t").open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file
    with pytest.raises(DataError, match=r"t: 1099511627776 bytes; the limit is"):
        open_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("kind", SPECIAL)
def test_processes_that_compare_their_files_do_not_wait_for_one(kind, tmp_path, hostile):
    path = hostile.special(kind, tmp_path / "t")
    found: list[str] = []
    returns(lambda: found.append(identity._file(path)))
    assert found[0] in ("Is a directory", f"{path}: is a {kind}; only plain files are read")


# ---------------------------------------------------------------------------------------------------------- as programs


@pytest.mark.slow
def test_a_run_says_it_in_one_line(tmp_path, hostile: Hostile):
    recipe = tmp_path / "r.yaml"
    dump_config(load_config(Path(__file__).parents[2] / "megatron_mm/recipes/synapse-tiny.yaml"), recipe)
    hostile.special("pipe", tmp_path / "t.model")
    words = ("--config", recipe, "--logging.output", tmp_path / "out", "--data.datasets.0.path", tmp_path / "none")
    tokenizer = ("--data.tokenizer", tmp_path / "t.model")
    check_refused(tool("pretrain_multimodal.py", *words, *tokenizer), "t.model: is a pipe")
    recipe.write_text(BOMB)
    check_refused(tool("pretrain_multimodal.py", *words), "r.yaml", "stands for")
    recipe.unlink()
    hostile.special("folder", recipe)
    check_refused(tool("pretrain_multimodal.py", *words), "r.yaml")


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks in the folder of work")
def test_files_in_the_folder_of_work_are_no_modules_of_what_is_started(tmp_path, hostile: Hostile):
    """By the names of modules that the started programs import before all else."""
    for name in ("yaml", "torch", "numpy", "megatron", "json", "runpy"):
        (tmp_path / f"{name}.py").write_text(hostile.code)
    recipe = Path(__file__).parents[2] / "megatron_mm/recipes/synapse-tiny.yaml"
    words = ("--layouts", "DP1", "--iterations", 1, "--global-batch-size", 4)
    done = tool("tools/verify_layouts.py", "--config", recipe, *words, folder=tmp_path, python=INTERPRETER)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
