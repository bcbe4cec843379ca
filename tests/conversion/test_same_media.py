"""Builders, training, the tools' processor and that of an exported folder read a file alike, or refuse it alike.

Truth: what training reads, tensor by tensor and bit by bit, and the words of the builder's refusals.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.config.schema import Config
from megatron_mm.conversion.convert import text_fields
from megatron_mm.conversion.hf_folder import CODE, write_code, write_hf_files
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.corpus.samples import read_medium
from megatron_mm.data.reading.augmentation import Augmentation
from megatron_mm.data.reading.records import MediaReader, Medium, Piece
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS, open_tokenizer
from megatron_mm.hf.processing_mm import MultimodalProcessor
from megatron_mm.media.encoding import KEEP
from megatron_mm.media.errors import DataError
from megatron_mm.systems.export import adapter_of
from tests.conversion import system_case as case
from tests.conversion.export_case import tiny_recipe, train_tokenizer
from tests.support.media_files import MediaFile, photo, readable, refused
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

READABLE, REFUSED = readable(), refused()
#: Packed rows with spectrograms and frames; rows of one clip and one waveform.
RECIPES = {"synapse": tiny_recipe, "avt": lambda: case.with_vocabulary(case.SYSTEMS["avt"]())}
#: Packages without which a folder loads, and what needs them.
PACKAGES = {
    "simplejpeg": ("420.jpg", "reading JPEG images"),
    "soundfile": ("16.wav", "reading sounds"),
    "soxr": ("8000-hz.wav", "hearing a sound of 8000 Hz at 16000 Hz"),
    "av": ("twelve.mp4", "reading videos"),
}
#: python -c PROCESS input.json output: reads files by the folders' own code. megatron_mm cannot be imported there, nor,
#: when the folders are loaded, the packages. Writes tensors, or [class, words] of an error, by folder and name; under
#: "missing", what is said where one package cannot be imported.
PROCESS = """
import json, sys
import torch
given = json.load(open(sys.argv[1]))
for name in ("megatron", "megatron_mm", *given["packages"]):
    sys.modules[name] = None  # importing it raises ImportError
from transformers import AutoProcessor
load = lambda folder: AutoProcessor.from_pretrained(folder, trust_remote_code=True)
processors = {name: load(folder) for name, folder in given["folders"].items()}
for name in given["packages"]:
    del sys.modules[name]
def read(processor, kind, path):
    try:
        return torch.stack([tensor for tensor, _ in processor.media(kind, path)])
    except (ValueError, ImportError) as error:
        return [type(error).__name__, str(error)]
found = {folder: {name: read(processor, *file) for name, file in given["files"].items()}
         for folder, processor in processors.items()}
found["missing"] = {}
for package, name in given["packages"].items():
    kept, sys.modules[package] = __import__(package), None
    found["missing"][package] = read(processors["synapse"], *given["files"][name])
    sys.modules[package] = kept
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tokenizer, and every file under its name in `media`."""
    root = tmp_path_factory.mktemp("media")
    train_tokenizer(root / "spm.model")
    (root / "media").mkdir()
    for name, file in (READABLE | REFUSED).items():
        (root / "media" / name).write_bytes(file.data)
    return root


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request) -> Config:
    return RECIPES[request.param]()


@pytest.fixture(scope="module")
def processor(work, recipe) -> MultimodalProcessor:
    """That of tools/generate.py and tools/evaluate.py."""
    adapter = adapter_of(recipe.model.system, "")
    config = adapter.load_class(adapter.config_class)(**adapter.fields(recipe))
    return MultimodalProcessor(config, open_tokenizer(work / "spm.model"))


@pytest.fixture(scope="module")
def exported(work, tmp_path_factory) -> dict[str, dict]:
    """What exported folders (without their weights) make of all files, in a process of its own: see PROCESS."""
    root, tokenizer, folders = tmp_path_factory.mktemp("exported"), open_tokenizer(work / "spm.model"), {}
    for name, make in RECIPES.items():
        recipe, folders[name] = make(), str(root / name)
        (root / name).mkdir()
        adapter = adapter_of(name, "")
        text = text_fields(adapter, recipe.model, tokenizer, root)
        write_hf_files(root / name, adapter, recipe, text, torch.float32, tokenizer)
    files = {name: (file.kind, str(work / "media" / name)) for name, file in (READABLE | REFUSED).items()}
    packages = {package: name for package, (name, _) in PACKAGES.items()}
    (root / "input.json").write_text(json.dumps({"folders": folders, "files": files, "packages": packages}))
    command = [PYTHON, "-c", PROCESS, str(root / "input.json"), str(root / "found.pt")]
    variables = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=root, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "found.pt")


class Training:
    """Files as a dataset and what training reads of them: no augmentation, one document a file."""

    def __init__(self, recipe: Config, work: Path, files: dict[str, MediaFile], output: Path, check: bool) -> None:
        lines = [{"text": f"{PLACEHOLDERS[file.kind]} a cat", file.kind: [name]} for name, file in files.items()]
        source = output.with_suffix(".jsonl")
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokenizer, root = str(work / "spm.model"), str(work / "media")
        build_multimodal([str(source)], str(output), tokenizer, media_root=root, workers=0, check=check, progress=False)
        data = recipe.data
        self.files, self.recipe, self.shard = files, recipe, Shard(str(output), open_tokenizer(tokenizer))
        self.reader = MediaReader(
            recipe.model.inputs, data.frames_per_video, data.image_mean, data.image_std, Augmentation(), 0, True, None
        )

    def stored(self, name: str) -> bytes:
        return self.medium(name).decode(lambda data: data)

    def medium(self, name: str, frame: int = -1) -> Medium:
        document, kind = list(self.files).index(name), self.files[name].kind
        (record,) = self.shard.records(kind, document)
        return Medium(self.shard, Piece(0, 0, document, 0, 1), kind, record, 0, frame)

    def read(self, name: str) -> torch.Tensor:
        """[1 or frames, …], as the processor's tensors stacked."""
        kind, inputs = self.files[name].kind, self.recipe.model.inputs
        if kind == "audios":
            read = {"log_mel": self.reader.spectrograms, "waveform": self.reader.waveforms}[inputs.sound]
            return read([self.medium(name)])
        if kind == "videos" and inputs.video == "clips":
            return self.reader.clips([self.medium(name)])
        frames = range(self.recipe.data.frames_per_video) if kind == "videos" else (-1,)
        return self.reader.images([self.medium(name, frame) for frame in frames])


def test_every_kind_of_file_is_the_same_tensor_everywhere(recipe, work, processor, exported, tmp_path):
    training = Training(recipe, work, READABLE, tmp_path / "dataset", check=True)
    assert len(READABLE) > 45
    for name, file in READABLE.items():
        assert training.stored(name) == file.data, name
        wanted = training.read(name)
        assert wanted.isfinite().all() and (wanted.std() > 0.1 or "silence" in name), name
        found = torch.stack([tensor for tensor, _ in processor.media(file.kind, work / "media" / name)])
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
        there = exported[recipe.model.system][name]
        assert isinstance(there, torch.Tensor) and there.dtype == wanted.dtype and torch.equal(there, wanted), name


def test_what_one_refuses_all_refuse_with_the_same_words(recipe, work, processor, exported, tmp_path):
    """The place differs: line and path, shard and record, path."""
    held = {name: file for name, file in REFUSED.items() if file.data}  # an empty file is never stored
    training = Training(recipe, work, held, tmp_path / "dataset", check=False)
    for name, file in REFUSED.items():
        path = str(work / "media" / name)
        with pytest.raises(DataError, match=file.cause) as builder:
            read_medium(file.kind, name, str(work / "media"), "line 1", True, KEEP)
        cause = str(builder.value).removeprefix(f"line 1: {path}: ")
        assert cause != str(builder.value)
        with pytest.raises(DataError) as here:
            processor.media(file.kind, path)
        assert str(here.value) == f"{path}: cannot be read as one of the {file.kind}: {cause}"
        assert exported[recipe.model.system][name] == ["DataError", str(here.value)]
        if name in held:
            with pytest.raises(DataError) as trained:
                training.read(name)
            where = training.shard.describe_record(file.kind, training.medium(name).record, list(held).index(name))
            assert str(trained.value) == f"{where}: {cause}"


def test_folders_need_the_packages_of_the_files_that_they_read(exported):
    """They were loaded without any of them."""
    for package, (_, purpose) in PACKAGES.items():
        kind, words = exported["missing"][package]
        assert kind == "ImportError"
        assert words.startswith(f"{purpose} needs the package {package}: pip install {package}")


@pytest.mark.parametrize("recipe", ["synapse"], indirect=True)
def test_images_and_samples_of_the_callers_are_taken_and_checked(recipe, work, processor):
    for name in ("420.jpg", "alpha.png"):
        with Image.open(work / "media" / name) as opened:
            pixels = processor.image(opened)
        ((wanted, _),) = processor.media("images", work / "media" / name)
        # Levels of 255 by which torch and Pillow resize a JPEG otherwise.
        apart = (2 if name == "420.jpg" else 0) / 255 / min(recipe.data.image_std)
        assert (pixels - wanted).abs().max() <= apart + 1e-6, name
    jpeg = np.asarray(photo())
    assert processor.image(jpeg).shape == (3, 28, 28)
    for wrong in (jpeg.transpose(2, 0, 1), jpeg / 255, jpeg[..., 0]):
        with pytest.raises(DataError, match=r"give uint8 \[height, width, 3\], or a Pillow image"):
            processor.image(wrong)
    samples = np.sin(np.arange(4000) / 9)
    assert torch.equal(processor.sound(samples), processor.sound(samples.astype(np.float32).tolist()))
    with pytest.raises(DataError, match="without samples"):
        processor.sound([])
    with pytest.raises(DataError, match="not all numbers"):
        processor.sound([0.1, np.inf])
    with pytest.raises(DataError, match=r"a sound of shape \[4000, 2\]; give mono samples"):
        processor.sound(np.stack([samples, samples], axis=1))


def test_code_of_folders_is_the_package_s_with_flat_imports(tmp_path):
    """Nothing of megatron_mm is left, and nothing but these imports is another."""
    for name, source in CODE.items():
        write_code(tmp_path, name, source)
        code, was = ((folder / file).read_text() for folder, file in ((tmp_path, name), (source.parent, source.name)))
        pairs = list(zip(code.splitlines(), was.splitlines(), strict=True))
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        assert all(re.fullmatch(r"from \.media_(\w+) import .*", line) for line, _ in changed), name
        assert all(before == line.replace(".media_", "megatron_mm.media.") for line, before in changed), name
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in CODE, name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(str(module).split(".")[0] == "megatron_mm" for module in modules), name
    assert "from .media_errors import DataError\n" in (tmp_path / "media_decoding.py").read_text()
