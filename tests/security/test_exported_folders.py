"""Exported folders and checkpoints that others made: configuration and weights are read, and none of their code runs.

The attack is real: transformers runs each of these files where the user trusts the folder.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm.config.load import load_config
from megatron_mm.conversion.convert import export, refresh, restore, write_training_checkpoint
from megatron_mm.conversion.safetensors_stream import INDEX, SafetensorsFolder
from megatron_mm.evaluation.export_proof import proof, prove
from megatron_mm.evaluation.streams import GraphReader
from megatron_mm.generation.generate import Decoding, Generator
from megatron_mm.systems.export import model_entries
from tests.support.hostile import ROOT, Hostile, check_refused, returns, tool
from tests.support.programs import INTERPRETER

EXAMPLE = ROOT / "examples" / "own_system"
PLUGIN = EXAMPLE / "byte_mixer.py"


def write_checkpoint(root: Path, **changes) -> Path:
    """A small byte mixer with random weights."""
    config = load_config(EXAMPLE / "byte-mixer.yaml")
    config = replace(config, model=replace(config.model, num_layers=2, hidden_size=16, kernel_size=4), **changes)
    generator = torch.Generator().manual_seed(0)
    entries = model_entries(config.model)

    def make(entry):
        return 0.3 * torch.randn(entry.shape, generator=generator)

    tokenizer = root.parent / "byte_tokenizer.json"
    shutil.copyfile(EXAMPLE / "bytes.json", tokenizer)
    return write_training_checkpoint(root, config, entries, make, torch.float32, tokenizer, False, True, "write")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    return export(write_checkpoint(root / "run"), root / "exported", quiet=True)


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    return shutil.copytree(clean, tmp_path / "folder")


def edit(path: Path, **fields) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | fields))


def append(path: Path, code: str) -> None:
    path.write_text(path.read_text() + code)


def named_by_auto_map(folder: Path, hostile: Hostile) -> None:
    (folder / "evil.py").write_text(hostile.code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        edit(folder / name, auto_map=dict.fromkeys(names, "evil.Evil"))


def own_generate(folder: Path, hostile: Hostile) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{hostile.code}\ndef generate(model, **kwargs): ...\n")
    edit(folder / "generation_config.json", custom_generate=str(folder))


def pickled_weights(folder: Path, hostile: Hostile) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(hostile.pickled)


ATTACKS: dict[str, Callable[[Path, Hostile], object]] = {
    "auto_map": named_by_auto_map,
    "modelling file": lambda folder, hostile: append(folder / "modeling_byte_mixer.py", hostile.code),
    "configuration file": lambda folder, hostile: append(folder / "configuration_byte_mixer.py", hostile.code),
    "processor": lambda folder, hostile: append(folder / "processing_byte_mixer.py", hostile.code),
    "tokenizer": lambda folder, hostile: append(folder / "tokenization_bytes.py", hostile.code),
    "the plugin's file": lambda folder, hostile: (folder / "byte_mixer.py").write_text(hostile.code),
    "custom_generate": own_generate,
    "pickles": pickled_weights,
    "an adapter": lambda folder, hostile: edit(
        folder / "adapter_config.json", peft_type="LORA", auto_mapping={"parent_library": "evil"}
    ),
    "a chat template": lambda folder, hostile: (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(hostile.marker) + "') }}"
    ),
    "kernels": lambda folder, hostile: edit(folder / "config.json", attn_implementation="evil/kernel:attention"),
    "quantisers": lambda folder, hostile: edit(folder / "config.json", quantization_config={"quant_method": "evil"}),
    "a module beside it": lambda folder, hostile: (folder / "torch.py").write_text(hostile.code),
}


def use(folder: Path, output: Path) -> None:
    """What the tools do with a folder."""
    generator = Generator.from_path(folder)
    list(generator.generate([{"prompt": "import "}], Decoding(max_new_tokens=2)))
    restore(folder, output, quiet=True, plugins=[str(PLUGIN)])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_folders_own_code_does_not_run(attack, folder, tmp_path, monkeypatch, hostile):
    attack(folder, hostile)
    monkeypatch.chdir(folder)
    use(folder, tmp_path / "restored")


@pytest.mark.slow
def test_refresh_makes_it_what_export_writes_before_it_is_proved(folder, hostile):
    for attack in ATTACKS.values():
        attack(folder, hostile)
    refresh(folder, proof(), plugins=[str(PLUGIN)])
    for path in folder.glob("*.py"):
        assert hostile.code not in path.read_text() or path.name in ("evil.py", "byte_mixer.py", "torch.py")
    fields = json.loads((folder / "config.json").read_text())
    assert not {"attn_implementation", "quantization_config"} & fields.keys() and "evil" not in str(fields)


@pytest.mark.parametrize("name", ["auto_map", "modelling file", "configuration file", "processor", "kernels"])
def test_what_is_not_as_export_writes_it_is_not_run_for_a_proof(name, folder, hostile):
    ATTACKS[name](folder, hostile)
    with pytest.raises(ValueError, match=r"export writes"):
        prove(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto_map", "modelling file", "custom_generate"])
def test_transformers_does_run_it_where_the_user_trusts_the_folder(name, folder, tmp_path, tmp_path_factory):
    """So the tests above attack what there is to attack."""
    other = Hostile(tmp_path_factory.mktemp("known"))
    ATTACKS[name](folder, other)
    code = (
        "import sys, transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    subprocess.run([INTERPRETER, "-c", code, str(folder)], capture_output=True, cwd=tmp_path)
    assert other.ran


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", INDEX, "byte_tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "pickle", "brackets"])
def test_every_file_of_a_folder_is_data(name, kind, folder, tmp_path, hostile):
    (folder / name).unlink()
    if kind == "pickle":
        (folder / name).write_bytes(hostile.pickled)
    elif kind == "brackets":
        (folder / name).write_text("[" * 100_000)
    else:
        hostile.special(kind, folder / name)
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        returns(lambda: use(folder, tmp_path / "restored"))


@pytest.mark.parametrize("value", ["x", [], {"a": 1}, 1.5])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "pad_token_id", "tokenizer_size"])
def test_fields_of_a_configuration_are_of_their_types(name, value, folder, tmp_path):
    edit(folder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=r"config\.json"):
        use(folder, tmp_path / "restored")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_files_of_its_folder(name, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (names|not an index)"):
        SafetensorsFolder(folder)


HEADERS = {
    "a shape of exabytes": {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}},
    "a negative shape": {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
    "a stretch that runs back": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}},
    "a stretch before the data": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}},
    "a stretch beyond the file": {"x": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}},
    "another type": {"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
    "no object": [],
    "no entry": {"x": 3},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_is_compared_with_the_file(header, tmp_path):
    data = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))
    with pytest.raises(ValueError, match=r"a\.safetensors: not a whole safetensors file"):
        SafetensorsFolder(tmp_path)


def test_weights_that_are_pickled_alone_are_refused(tmp_path, hostile):
    pickled_weights(tmp_path, hostile)
    with pytest.raises(ValueError, match=r"no \.safetensors file \(found adapter_model\.bin, pytorch_model\.bin"):
        SafetensorsFolder(tmp_path)


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 39))
        stream.truncate(1 << 40)  # a sparse file
    with pytest.raises(ValueError, match="its header says 549755813888 bytes; the format has at most"):
        SafetensorsFolder(tmp_path)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path, hostile) -> Path:
    """One that names a plugin and a builder, with these files in it."""
    config = load_config(EXAMPLE / "byte-mixer.yaml")
    data = replace(config.data, builder="evil_mixer.py:build")
    made = write_checkpoint(tmp_path / "run", plugins=[*config.plugins, "evil_mixer.py"], data=data)
    (made / "evil_mixer.py").write_text(hostile.code)
    return made


USES: dict[str, Callable[[Path, Path], object]] = {
    "export": lambda checkpoint, output: export(checkpoint, output, quiet=True),
    "generate": lambda checkpoint, output: Generator.from_path(checkpoint),
    "score": lambda checkpoint, output: GraphReader.from_path(checkpoint, reads_data=True),
    "read": lambda checkpoint, output: GraphReader.from_path(checkpoint),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_checkpoints_plugin_does_not_run(use, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint)
    monkeypatch.syspath_prepend(str(checkpoint))
    with pytest.raises(ValueError, match=r"config\.yaml: plugins names 'evil_mixer\.py', which .* --plugins"):
        use(checkpoint, tmp_path / "out")


def test_nor_for_a_proof(clean, checkpoint):
    with pytest.raises(ValueError, match="plugins names"):
        prove(clean, checkpoint)


TOOLS = {
    "export": ("tools/convert_checkpoint.py", "export", "--output", "{out}", "--checkpoint"),
    "generate": ("tools/generate.py", "--prompt", "a", "--model"),
    "score": ("tools/score_objectives.py", "--checkpoint"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", TOOLS.values(), ids=TOOLS)
def test_the_tools_say_which_option_is_missing(words, checkpoint, tmp_path):
    words = [word.format(out=tmp_path / "out") for word in words]
    done = tool(*words, checkpoint, "--plugins", PLUGIN, folder=checkpoint)
    check_refused(done, "config.yaml", "evil_mixer.py", "--plugins")


def test_the_marker_is_left_where_a_pickle_is_read(tmp_path):
    """So the tests above would see it."""
    other = Hostile(tmp_path)
    pickle.loads(other.pickled).close()
    assert other.ran
