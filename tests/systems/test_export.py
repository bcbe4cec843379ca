"""Which files an exported folder gets: those that its classes' files import, from the adapter's source and from ours.

Truth: the files that the test writes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mm.config.systems import SYSTEMS, System
from megatron_mm.conversion.hf_folder import write_code
from megatron_mm.systems import export
from megatron_mm.systems.export import Adapter, adapter_of, needed_plugins

FILES = {
    "configuration_own": "from transformers import PreTrainedConfig\nclass OwnConfig: ...\n",
    "modeling_own": (
        "import torch\nfrom .configuration_own import OwnConfig\nfrom .own_layers import Layer\n"
        "from .exported_model import CACHE\n"
    ),
    "own_layers": "from .exported_model import ExportedModel as Layer\n",
    "unused": "",
}


def adapter(folder: Path | str, **changes) -> Adapter:
    options = {"config_class": "configuration_own.OwnConfig", "model_class": "modeling_own.OwnModel"}
    options |= {"processor_class": None, "source": folder}
    return Adapter("own", fields=lambda config: {}, tree=lambda fields: {}, **(options | changes))


def write(folder: Path, **files: str) -> Path:
    for name, text in (FILES | files).items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_files_are_those_of_the_source_and_what_they_import_of_ours(tmp_path):
    write(tmp_path)
    found = adapter(tmp_path).files
    ours = Path(export.__file__).parents[1] / "hf"
    assert found == {
        "configuration_own.py": tmp_path / "configuration_own.py",
        "modeling_own.py": tmp_path / "modeling_own.py",
        "own_layers.py": tmp_path / "own_layers.py",
        "exported_model.py": ours / "exported_model.py",
    }
    assert "processing_mm.py" in adapter(tmp_path, processor_class="processing_mm.MultimodalProcessor").files


def test_media_are_read_by_our_files_under_flat_names(tmp_path):
    write(tmp_path, modeling_own="from .own_layers import x\nfrom megatron_mm.media.transforms import waveform\n"
          "from megatron_mm.media.errors import DataError\nfrom .exported_model import CACHE\n")  # fmt: skip
    media = Path(export.__file__).parents[1] / "media"
    found = adapter(tmp_path).files
    assert {name: file for name, file in found.items() if name.startswith("media_")} == {
        "media_errors.py": media / "errors.py", "media_transforms.py": media / "transforms.py",
    }  # fmt: skip
    write_code(tmp_path, "written.py", found["modeling_own.py"])
    assert "from .media_transforms import waveform\n" in (tmp_path / "written.py").read_text()


def test_a_file_of_the_source_goes_before_ours_of_the_same_name(tmp_path):
    write(tmp_path, exported_model="CACHE = 'cache'\nclass ExportedModel: ...\n")
    own = adapter(tmp_path)
    assert own.files["exported_model.py"] == tmp_path / "exported_model.py"
    assert own.load_class("own_layers.Layer").__module__.endswith(".exported_model")
    assert own.load_class("own_layers.Layer") is own.load_class("exported_model.ExportedModel")


def test_the_source_may_be_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "own_package" / "portable"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "own_package" / "__init__.py").write_text("")
    write(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = adapter("own_package.portable")
    assert own.files["own_layers.py"] == package / "own_layers.py" and "exported_model.py" in own.files
    assert own.load_class("configuration_own.OwnConfig").__name__ == "OwnConfig"
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modeling_own": "from .missing import x\n"}, r"modeling_own\.py names missing\.py, which is not in"),
        ({"modeling_own": "from megatron_mm.hf.vit import ViTTower\n"}, r"line 1: it imports megatron_mm\.hf\.vit"),
        ({"modeling_own": "import megatron_mm\n"}, r"line 1: it imports megatron_mm, which is not installed where"),
        ({"modeling_own": "import own_layers\n"}, r"imports own_layers.*as `from \.module import name`"),
        ({"modeling_own": "\nfrom . import own_layers\n"}, r"line 2: it imports from \.; write"),
        ({"modeling_own": "from .a.b import x\n"}, r"imports from \.a\.b"),
        ({"modeling_own": "from ..a import x\n"}, r"imports from \.\.a"),
        ({"own_layers": "from .vit import ViTTower\n"}, r"modeling_own\.py must itself import \..*vit, which"),
    ],
)
def test_imports_that_an_exported_folder_cannot_give_are_refused(tmp_path, changed, message):
    """Also one that another file's import brings: transformers before 5.6 copies what the loaded file itself names."""
    write(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        _ = adapter(tmp_path).files


def test_a_source_that_is_not_there_is_refused(tmp_path):
    for source, message in ((tmp_path / "none", "is no folder"), ("no_such_package_here", "is no package"),
                            ("json.decoder", "is no package")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _ = adapter(source).files


def test_systems_that_cannot_be_exported_are_named(monkeypatch, tmp_path):
    section, graph = SYSTEMS["vlm"].section, SYSTEMS["vlm"].graph
    monkeypatch.setitem(SYSTEMS, "mine", System("mine", section, graph))
    with pytest.raises(ValueError, match=r"there is no export of the system 'mine'.*registered with an Adapter"):
        adapter_of("mine", "r.yaml")
    monkeypatch.setitem(SYSTEMS, "mine", System("mine", section, graph, adapter(tmp_path)))
    with pytest.raises(ValueError, match=r"the system 'mine' is registered with the adapter of 'own'"):
        adapter_of("mine", "r.yaml")
    named = replace(adapter(tmp_path), name="mine")
    monkeypatch.setitem(SYSTEMS, "mine", System("mine", section, graph, named))
    assert adapter_of("mine", "r.yaml") is named


def test_a_folder_names_plugins_without_this_machines_folders():
    config = SimpleNamespace(plugins=["/home/me/own.py", "examples/other.py", "installed.module"])
    assert needed_plugins(config) == ["own.py", "other.py", "installed.module"]
