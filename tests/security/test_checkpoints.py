"""Checkpoints that others made, with right checksums and manifests: no code runs, no other file is read, no memory is
taken by a number alone, and one line says which file is wrong. Both formats, each file that is read.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.inspection import Inspection, damage
from tests.fixtures import archive
from tests.support.checkpoints import plain_tensors, write_sample
from tests.support.hostile import SECRET, SPECIAL, Hostile, check_refused, returns, tool

#: 246 files that lie, a twentieth of a second each.
pytestmark = pytest.mark.slow
TENSORS = {"layers.0.weight": torch.arange(40.0).reshape(8, 5), "optimizer.step.layers.0.weight": torch.arange(5)}
PIECES = ("manifest.json", "pieces_00000.json", "pieces_00000.safetensors", "config.yaml", "byte_tokenizer.json")
BEFORE = ("manifest.json", ".metadata", "__0_0.distcp", "common.pt", "config.yaml", "tokenizer.model")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of two processes."""
    return write_sample(tmp_path / "checkpoints", 3, 2, TENSORS)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    made = archive.unpack(archive.BEFORE / "vlm-tiny.tar.gz", tmp_path_factory.mktemp("before"))
    return made / "checkpoint" / "iter_0000002"


@pytest.fixture
def before(unpacked, tmp_path) -> Path:
    """A checkpoint of the format of before."""
    return shutil.copytree(unpacked, tmp_path / "before" / "iter_0000002")


def sealed(folder: Path) -> None:
    """Makes the manifest say of all files what they are now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, said in manifest["files"].items():
        now = checkpoint_folder._recorded(name, folder / name)
        manifest["files"][name] = now if isinstance(said, dict) else now["bytes"]
    path.write_text(json.dumps(checkpoint_folder._sealed(manifest) if "checksum" in manifest else manifest))


@contextmanager
def little_memory() -> Iterator[None]:
    """What runs meanwhile takes less than 64 MB of memory more than there was."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now

    def peak() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10

    begun = peak()
    yield
    assert peak() - begun < 64 << 20


def refused(read: Callable[[], object], *named: str) -> None:
    """One line names these; nothing is given away."""

    def run() -> None:
        with little_memory(), pytest.raises((ValueError, OSError)) as raised:
            read()
        said = str(raised.value)
        assert "\n" not in said and len(said) < 2000 and SECRET not in said, said
        assert all(name in said for name in named), said

    returns(run)


# ------------------------------------------------------------------------------------------- files that are none of its


@pytest.mark.parametrize("kind", [*SPECIAL, "link to a secret", "link to itself elsewhere"])
@pytest.mark.parametrize("name", PIECES)
def test_what_is_no_file_of_the_checkpoint_is_not_opened(name, kind, folder, hostile):
    _replace(folder / name, kind, hostile)
    _check_not_opened(folder, name, reads=name.startswith(("pieces", "manifest")))


@pytest.mark.parametrize("kind", [*SPECIAL, "link to a secret", "link to itself elsewhere"])
@pytest.mark.parametrize("name", BEFORE)
def test_what_is_no_file_of_a_checkpoint_of_before_is_not_opened(name, kind, before, hostile):
    _replace(before / name, kind, hostile)
    _check_not_opened(before, name, reads=name.endswith((".metadata", ".distcp", ".pt")))


def _replace(path: Path, kind: str, hostile: Hostile) -> None:
    if kind == "link to a secret":
        path.unlink()
        path.symlink_to(hostile.secret)
    elif kind == "link to itself elsewhere":
        moved = path.rename(hostile.folder / path.name)
        path.symlink_to(moved)
    else:
        hostile.special(kind, path)


def _check_not_opened(folder: Path, name: str, reads: bool) -> None:
    found: list[str | None] = []
    returns(lambda: found.append(checkpoint_folder.verify(folder, everything=True)))
    assert found[0] and (name in found[0] or name == "manifest.json") and SECRET not in found[0]
    problems: list[str] = []
    returns(lambda: problems.extend(damage(folder, everything=True)))
    assert any(name in problem for problem in problems), problems
    if reads:
        refused(lambda: plain_tensors(folder), name)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.model"])
def test_a_link_that_the_manifest_does_not_name_is_found(name, folder, hostile):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop(name, None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(hostile.secret)
    sealed(folder)
    assert f"{name} is a link" in (checkpoint_folder.verify(folder) or "")
    assert Inspection(folder).settings.keys() >= ({"model"} if name != "config.yaml" else set())


@pytest.mark.parametrize("outside", ["/etc/passwd", "../secret.txt", "a/../../secret.txt", "linked/secret.txt"])
def test_names_that_lead_out_of_the_folder(outside, folder, hostile):
    shutil.copyfile(hostile.secret, folder.parent / "secret.txt")
    (folder / "linked").symlink_to(hostile.folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][outside] = {"bytes": 3, "checksum": 5}
    (folder / "manifest.json").write_text(json.dumps(checkpoint_folder._sealed(manifest)))
    found = checkpoint_folder.verify(folder)
    assert found and outside in found and SECRET not in found
    assert "bytes instead" not in found, "its size was looked at"


# ------------------------------------------------------------------------------------------------------------- indices


def _piece(index: dict) -> list:
    return index["tensors"]["layers.0.weight"]["pieces"][0]


def _set(path: str, value: Any) -> Callable[[dict], None]:
    def change(index: dict) -> None:
        *above, last = path.split("/")
        for step in above:
            index = index[int(step) if step.isdigit() else step]
        index[int(last) if last.isdigit() else last] = value

    return change


_WEIGHT = "tensors/layers.0.weight"
INDICES: dict[str, Callable[[dict], None]] = {
    "a piece behind the file": _set(f"{_WEIGHT}/pieces/0/2", 1 << 20),
    "a piece before the file": _set(f"{_WEIGHT}/pieces/0/2", -64),
    "a piece at a huge byte": _set(f"{_WEIGHT}/pieces/0/2", 10**30),
    "a piece at half a byte": _set(f"{_WEIGHT}/pieces/0/2", 0.5),
    "a piece at a truth": _set(f"{_WEIGHT}/pieces/0/2", True),
    "a piece of nothing known": _set(f"{_WEIGHT}/pieces/0", None),
    "a negative size": _set(f"{_WEIGHT}/pieces/0/1/0", -1),
    "a huge size": _set(f"{_WEIGHT}/pieces/0/1/0", 1 << 60),
    "a negative place": _set(f"{_WEIGHT}/pieces/0/0/0", -3),
    "a tensor of petabytes": _set(f"{_WEIGHT}/shape", [1 << 50]),
    "a tensor of petabytes without pieces": _set("tensors/x", {"dtype": "F32", "shape": [1 << 50], "pieces": []}),
    "an empty tensor of a huge size": _set(
        "tensors/x", {"dtype": "F32", "shape": [0, 10**30], "pieces": [[[0, 0], [0, 10**30], 0]]}
    ),
    "a tensor of a thousand dimensions": _set("tensors/x", {"dtype": "F32", "shape": [1] * 1000, "pieces": []}),
    "a shape of text": _set(f"{_WEIGHT}/shape", ["8", "5"]),
    "a shape of lists": _set(f"{_WEIGHT}/shape", [[8], [5]]),
    "a shape that is a number": _set(f"{_WEIGHT}/shape", 40),
    "another type": _set(f"{_WEIGHT}/dtype", "PICKLE"),
    "a type that is a list": _set(f"{_WEIGHT}/dtype", ["F32"]),
    "a wider type": _set(f"{_WEIGHT}/dtype", "F64"),
    "the same bytes a thousand times": _set(
        "tensors/x", {"dtype": "U8", "shape": [1000, 64], "pieces": [[[n, 0], [1, 64], 0] for n in range(1000)]}
    ),
    "the same values twice": lambda index: index["tensors"]["layers.0.weight"]["pieces"].append(_piece(index)),
    "tensors as a list": _set("tensors", []),
    "bytes as text": _set("bytes", "600"),
    "other bytes": _set("bytes", 1 << 40),
    "checksums of another length": _set("checksums", []),
    "checksums of none": _set("checksums", [None]),
    "another block": _set("block", 1),
}


@pytest.mark.parametrize("change", INDICES.values(), ids=INDICES)
def test_an_index_is_held_against_its_file(change, folder, hostile):
    path = folder / "pieces_00000.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    sealed(folder)
    refused(lambda: plain_tensors(folder), str(folder))
    problems: list[str] = []
    returns(lambda: problems.extend(damage(folder, everything=True)))
    assert problems and not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"3", b"null", b"[" * 300_000, b'{"a":' * 300_000, b"\xff", b""])
@pytest.mark.parametrize("name", ["pieces_00000.json", "manifest.json"])
def test_what_is_no_index_and_no_manifest(name, content, folder):
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        sealed(folder)
    refused(lambda: plain_tensors(folder), name)


@pytest.mark.parametrize("name", ["pieces_00000.json", "manifest.json", "config.yaml"])
def test_a_file_of_terabytes_is_not_read(name, folder):
    """A sparse one, which takes no place on the disk."""
    with (folder / name).open("wb") as file:
        file.truncate(1 << 42)
    if name == "config.yaml":
        assert Inspection(folder).settings == {}
    else:
        refused(lambda: plain_tensors(folder), name)


# ------------------------------------------------------------------------------------------------------------- pickles


class _Calls:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def _frame(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


PICKLES: dict[str, Callable[[Hostile], bytes]] = {
    "open": lambda h: h.pickled,
    "os.system": lambda h: pickle.dumps(_Calls(os.system, f"touch {h.marker}")),
    "eval": lambda h: pickle.dumps(_Calls(eval, h.code.strip())),
    "exec": lambda h: pickle.dumps({"iteration": _Calls(exec, h.code)}),
    "partial": lambda h: pickle.dumps(functools.partial(os.system, f"touch {h.marker}")),
    "torch.load": lambda h: pickle.dumps(_Calls(torch.load, str(h.marker))),
    "torch.hub": lambda h: pickle.dumps(_Calls(torch.hub.load, str(h.folder), "x")),
    "a dotted name": lambda h: _frame(b"\x8c\x13torch.serialization", b"\x8c\tos.system", b"\x93", _text(h), b"\x85R"),
    "a dotted name of torch": lambda h: _frame(b"\x8c\x05torch\x8c\x0eos.path.exists\x93", _text(h), b"\x85R"),
    "an instance": lambda h: b"(" + _text(h) + b"ios\nsystem\n.",
    "an object": lambda h: b"(cos\nsystem\n" + _text(h) + b"o.",
    "an extension": lambda h: _frame(b"\x82\x01"),
    "a class that is changed": lambda h: _frame(b"cpathlib\nPosixPath\n", b"N}\x8c\x06existsNs\x86b"),
    "a tuple that is changed": lambda h: _frame(b"ctorch\nSize\n", b"N}\x8c\x01aNs\x86b"),
    "terabytes of bytes": lambda h: _frame(b"\x8e", struct.pack("<Q", 1 << 42)),
    "terabytes of a bytearray": lambda h: _frame(b"\x96", struct.pack("<Q", 1 << 42)),
    "terabytes of a frame": lambda h: _frame(b"\x95", struct.pack("<Q", 1 << 42)),
    "a memo of billions": lambda h: _frame(b"Nr\xff\xff\xff\xff"),
    "a bytearray of torch's list": lambda h: b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "lists in lists": lambda h: b"(" * 200_000 + b"l" * 200_000 + b".",
    "text": lambda h: b"something else",
    "nothing": lambda h: b"",
    "a list": lambda h: pickle.dumps([1, 2]),
    "a number": lambda h: pickle.dumps(7),
}


def _text(hostile: Hostile) -> bytes:
    command = f"touch {hostile.marker}".encode()
    return b"X" + struct.pack("<I", len(command)) + command


def _archived(content: bytes, name: str = "archive", compressed: bool = False, **more: bytes) -> bytes:
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as made:
        made.writestr(f"{name}/data.pkl", content)
        made.writestr(f"{name}/byteorder", b"little")
        made.writestr(f"{name}/padding", bytes(1 << 16), zipfile.ZIP_STORED)  # as long as the piece that it replaces
        for key, value in more.items():
            made.writestr(f"{name}/{key.replace('_', '/')}", value)
    return stream.getvalue()


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("name", [".metadata", "common.pt", "common.pt, no archive", "a piece"])
def test_a_pickle_runs_nothing(name, make, before, hostile):
    content = make(hostile)
    if name == "a piece":
        path = _rewritten(before, _archived(content))
    else:
        path = before / name.partition(",")[0]
        path.write_bytes(_archived(content) if name == "common.pt" else content)
    sealed(before)
    refused(lambda: plain_tensors(before), path.name)
    assert not hostile.ran and Path.exists(before)


def _metadata(folder: Path) -> Any:
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)  # of a fixture


def _rewritten(folder: Path, content: bytes) -> Path:
    """Puts something else in the place of the first piece, at the end of its file."""
    metadata = _metadata(folder)
    place = next(iter(metadata.storage_data.values()))
    path = folder / place.relative_path
    place.offset, place.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def test_archives_that_grow_are_refused(before):
    """A quarter of a gigabyte of zeros takes a quarter of a megabyte where it is compressed, which torch never does."""
    (before / "common.pt").write_bytes(_archived(bytes(1 << 28), compressed=True))
    sealed(before)
    refused(lambda: plain_tensors(before), "common.pt", "compressed")


def test_a_piece_that_grows_is_refused(before):
    path = _rewritten(before, _archived(bytes(1 << 28), compressed=True))
    sealed(before)
    refused(lambda: plain_tensors(before), path.name, "compressed")


def _tensor(size: tuple, stride: tuple, offset: int) -> bytes:
    """An archive of four numbers, which says of a tensor what is given."""
    stream = io.BytesIO()
    torch.save(torch.zeros(4), stream)
    with zipfile.ZipFile(stream) as made:
        content = made.read("archive/data.pkl")
    return _archived(_swapped(content, size, stride, offset), data_0=bytes(16))


def _swapped(content: bytes, size: tuple, stride: tuple, offset: int) -> bytes:
    """torch's pickle of a tensor, with other numbers in it."""
    begin = content.index(b"QK\x00") + 1
    end = content.index(b"\x89", begin)

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    return content[:begin] + number(offset) + numbers(size) + numbers(stride) + content[end:]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 50,), (0,), 0), ((1 << 50,), (1,), 0), ((4,), (1,), 1 << 40), ((4,), (1,), -1), ((-4,), (1,), 0),
        ((4,), (-1,), 3), ((2, 2), (1,), 0),
    ],
)  # fmt: skip
def test_a_tensor_that_is_larger_than_its_numbers(size, stride, offset, before):
    path = _rewritten(before, _tensor(size, stride, offset))
    sealed(before)
    refused(lambda: plain_tensors(before), path.name)


METADATA: dict[str, Callable[[Any], None]] = {}


def _metadata_case(function: Callable[[Any], None]) -> Callable[[Any], None]:
    METADATA[function.__name__.replace("_", " ").strip()] = function
    return function


def _first(metadata: Any) -> tuple[Any, Any]:
    """A tensor with pieces, and where one of them is."""
    index, place = next(iter(metadata.storage_data.items()))
    return metadata.state_dict_metadata[index.fqn], place


@_metadata_case
def _a_file_elsewhere(metadata: Any) -> None:
    _first(metadata)[1].relative_path = "../secret.txt"


@_metadata_case
def _an_absolute_file(metadata: Any) -> None:
    _first(metadata)[1].relative_path = "/etc/passwd"


@_metadata_case
def _a_file_that_is_no_name(metadata: Any) -> None:
    _first(metadata)[1].relative_path = 7


@_metadata_case
def _a_piece_behind_the_file(metadata: Any) -> None:
    _first(metadata)[1].offset = 1 << 40


@_metadata_case
def _a_piece_before_the_file(metadata: Any) -> None:
    _first(metadata)[1].offset = -5


@_metadata_case
def _a_piece_of_terabytes(metadata: Any) -> None:
    _first(metadata)[1].length = 1 << 42


@_metadata_case
def _a_tensor_of_terabytes(metadata: Any) -> None:
    tensor = _first(metadata)[0]
    tensor.size = torch.Size([1 << 42])
    tensor.chunks[0].sizes = torch.Size([1 << 42])
    tensor.chunks[0].offsets = torch.Size([0])


@_metadata_case
def _no_type(metadata: Any) -> None:
    object.__setattr__(_first(metadata)[0].properties, "dtype", "float32")


@_metadata_case
def _no_places(metadata: Any) -> None:
    metadata.storage_data = None


@_metadata_case
def _tensors_as_a_list(metadata: Any) -> None:
    metadata.state_dict_metadata = [1]


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_what_a_list_of_pieces_says_is_held_against_the_files(change, before, hostile):
    metadata = _metadata(before)
    change(metadata)
    (before / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(before)
    refused(lambda: plain_tensors(before), ".metadata")


@pytest.mark.parametrize("counts", [{"iteration": "3"}, {"consumed_samples": -1}, {"optimizer_step": 2.5}])
def test_positions_are_numbers(counts, before):
    stream = io.BytesIO()
    torch.save({"iteration": 2, **counts}, stream)
    (before / "common.pt").write_bytes(stream.getvalue())
    refused(lambda: plain_tensors(before), "common.pt")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
def test_files_of_before_beside_pieces_are_not_read(name, folder, hostile):
    (folder / name).write_bytes(hostile.pickled)
    found = plain_tensors(folder)
    assert all(torch.equal(found[key], value) for key, value in TENSORS.items())


# ---------------------------------------------------------------------------------------------- settings and tokenizers


SETTINGS = {
    "a type of Python's": "data: !!python/object/apply:os.system ['touch {marker}']\n",
    "a plugin": "plugins: [evil.py]\nmodel: {{system: evil}}\ndata: {{builder: 'evil.py:build'}}\n",
    "sections that are none": "model: 3\nparallel: [1]\ntraining: text\n",
    "sizes that are none": "parallel: {{tensor_model_parallel_size: x, pipeline_model_parallel_size: -4}}\n",
    "control characters": 'model: {{system: "\\e]0;owned\\a"}}\ntraining: {{precision: [fp32]}}\n',
}


@pytest.mark.parametrize("text", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_shown_and_run_nothing(text, folder, hostile, monkeypatch):
    (folder / "evil.py").write_text(hostile.code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (folder / "config.yaml").write_text(text.format(marker=hostile.marker))
    sealed(folder)
    figures = Inspection(folder).figures(optimizer=True, pattern=None)
    assert figures["layout"]["TP"] == 1 and "\x1b" not in json.dumps(figures["recipe"], ensure_ascii=False)


@pytest.mark.slow
def test_the_tools_say_it_in_one_line(folder, hostile):
    """Names of tensors that a terminal would obey are printed as what they are."""
    (folder / "byte_tokenizer.json").write_bytes(hostile.pickled)
    index = json.loads((folder / "pieces_00000.json").read_text())
    index["tensors"]["\x1b]0;owned\x07"] = {"dtype": "F32", "shape": [0], "pieces": []}
    (folder / "pieces_00000.json").write_text(json.dumps(index))
    sealed(folder)
    done = tool("tools/inspect_checkpoint.py", folder, "--verify", "--optimizer")
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\\x1b]0;owned" in done.stdout, done.stderr
    _replace(folder / "pieces_00000.safetensors", "link to a secret", hostile)
    done = tool("tools/inspect_checkpoint.py", folder, "--verify")
    assert done.returncode == 1
    check_refused(done, "pieces_00000.safetensors: is a link")
    output = ("--output", folder.parent.parent / "exported")
    check_refused(tool("tools/convert_checkpoint.py", "export", "--checkpoint", folder, *output), "is a link")
