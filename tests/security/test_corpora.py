"""Lists and archives of samples: what they name is read only where it may be, and nothing they hold hangs a reader."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_mm.data.build.estimate import estimate, multimodal_build
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.cleaning.scan import Rules
from megatron_mm.data.corpus.text_input import expand_inputs, open_lines
from megatron_mm.generation.prompts import read_prompts
from megatron_mm.hf.processing_mm import MultimodalProcessor
from megatron_mm.media.errors import DataError
from tests.support.hostile import SECRET, SPECIAL, check_no_secret, check_refused, returns, tool


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    return out.getvalue()


def sample(path: str) -> dict:
    return {"id": "a", "prompt": "<image>", "text": "red", "images": [path]}


def write(form: str, folder: Path, path: str) -> Path:
    """One sample, in a format, that names a file."""
    made = folder / f"corpus.{form}"
    if form == "jsonl":
        made.write_text(json.dumps(sample(path)) + "\n")
    elif form == "csv":
        made.write_text(f"id,prompt,text,images\na,<image>,red,{path}\n")
    elif form == "tar":
        data = json.dumps(sample(path)).encode()
        with tarfile.open(made, "w") as archive:
            header = tarfile.TarInfo("a.json")
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    else:
        images = [[{"bytes": None, "path": path}]] if form == "arrow" else [[path]]
        table = pyarrow.table({"prompt": ["<image>"], "text": ["red"], "images": images})
        if form == "parquet":
            pyarrow.parquet.write_table(table, made)
        else:
            with pyarrow.OSFile(str(made), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return made


def users(source: Path, output: Path, tokenizer: Path, check: bool = True, **options) -> dict:
    """Every reader of a corpus, by name, as a call."""
    inputs, words = [str(source)], (str(output), str(tokenizer))
    quiet = {"workers": 0, "progress": False}
    return {
        "build": lambda: build_multimodal(inputs, *words, check=check, **quiet, **options),
        "clean": lambda: clean_corpus(inputs, str(output), rules=Rules(check=check), **quiet),
        "estimate": lambda: estimate(inputs, multimodal_build(*words, None, 0, check, **options), seconds=1),
    }


READERS = ("build", "clean", "estimate")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["tar", "parquet", "arrow"])
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_what_lies_outside_an_archive_is_not_read(form, reader, check, tmp_path, hostile, bytes_tokenizer):
    """Nor is a picture, which would decode."""
    (hostile.folder / "private.png").write_bytes(picture())
    for name in ("secret.txt", "private.png"):
        for path in (str(hostile.folder / name), f"../{hostile.folder.name}/{name}"):
            source = write(form, tmp_path, path)
            with pytest.raises(DataError, match=r"names the file .*; media of a tar, Parquet or Arrow file lie in it"):
                users(source, tmp_path / "out", bytes_tokenizer, check=check)[reader]()
    check_no_secret(tmp_path)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_bad_line_of_an_archive_may_be_left_out(form, tmp_path, hostile, bytes_tokenizer):
    source = write(form, tmp_path, str(hostile.secret))
    with pytest.raises(DataError, match="none of the 1 lines of the input can be used"):
        users(source, tmp_path / "out", bytes_tokenizer, check=False, on_error="skip")["build"]()
    check_no_secret(tmp_path)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_texts_of_an_archive_are_read_whatever_files_it_names(form, tmp_path, hostile):
    with open_lines(str(write(form, tmp_path, str(hostile.secret)))) as (stream, _):
        assert json.loads(stream.readline())["text"] == "red"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_list_of_ones_own_may_name_pictures_anywhere(form, reader, tmp_path, hostile, bytes_tokenizer):
    (hostile.folder / "a.png").write_bytes(picture())
    (tmp_path / "link.png").symlink_to(hostile.folder / "a.png")
    for number, path in enumerate((str(hostile.folder / "a.png"), f"../{hostile.folder.name}/a.png", "link.png")):
        users(write(form, tmp_path, path), tmp_path / f"out{number}", bytes_tokenizer)[reader]()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_list_takes_in_no_secret_as_a_picture(form, tmp_path, hostile, bytes_tokenizer):
    for path in (str(hostile.secret), f"../{hostile.folder.name}/secret.txt", "/proc/self/environ"):
        source = write(form, tmp_path, path)
        with pytest.raises(DataError, match=r"line \d: .*(corrupt image|not an image|empty file)"):
            users(source, tmp_path / "out", bytes_tokenizer)["build"]()
    check_no_secret(tmp_path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_would_hang_a_build_or_fill_its_memory_is_refused_by_line(
    kind, reader, tmp_path, hostile, bytes_tokenizer
):
    path = hostile.special(kind, tmp_path / "a.png")
    source = write("jsonl", tmp_path, path.name)
    said = "Is a directory" if kind == "folder" else f"is a {kind}; only plain files are read"
    for check in (True, False):
        with pytest.raises(DataError, match=rf".*a\.png.*{said}"):
            returns(users(source, tmp_path / "out", bytes_tokenizer, check=check)[reader])


@pytest.mark.parametrize("kind", SPECIAL)
def test_so_is_what_a_prompt_names(kind, tmp_path, hostile):
    path = hostile.special(kind, tmp_path / "a.png")
    with pytest.raises(DataError, match=r"line 1: no such file: .*a\.png"):
        read_prompts(write("jsonl", tmp_path, path.name))
    with pytest.raises(DataError, match=r"a\.png: (is a|Is a directory)"):
        returns(lambda: MultimodalProcessor.media(None, "images", str(path)))


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tar", "parquet", "arrow", "jsonl.gz", "tgz"])
def test_so_is_a_corpus(kind, ending, tmp_path, hostile):
    path = hostile.special(kind, tmp_path / f"corpus.{ending}")

    def read() -> None:
        with open_lines(str(path)) as (stream, _):
            stream.readline()

    with pytest.raises(DataError, match=rf"corpus\.{ending}: (is a|Is a directory)"):
        returns(read)


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png", "x" * 5000])
def test_names_that_no_file_has_are_refused_by_line(path, tmp_path, bytes_tokenizer):
    source = write("jsonl", tmp_path, path)
    with pytest.raises(DataError, match="line 1: "):
        users(source, tmp_path / "out", bytes_tokenizer)["build"]()


@pytest.mark.parametrize("reader", READERS)
def test_json_that_is_nested_deeper_than_a_parser_goes(reader, tmp_path, bytes_tokenizer):
    source = tmp_path / "deep.jsonl"
    source.write_text('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match="JSON nested too deeply"):
        users(source, tmp_path / "out", bytes_tokenizer)[reader]()


@pytest.mark.parametrize("state", ['{"_data_files": [{"filename": "../secret.arrow"}]}', "[" * 100_000, "3", "{}"])
def test_the_state_of_a_saved_dataset_names_its_own_files(state, tmp_path):
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "a.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"state\.json: "):
        expand_inputs([str(tmp_path)])


@pytest.mark.slow
def test_tools_say_it_in_one_line(tmp_path, hostile, bytes_tokenizer):
    source, output = write("tar", tmp_path, str(hostile.secret)), tmp_path / "out"
    built = ("tools/preprocess_multimodal.py", "--input", source, "--output", output)
    check_refused(tool(*built, "--tokenizer-model", bytes_tokenizer, "--no-check"), "corpus.tar", str(hostile.secret))
    hostile.special("pipe", tmp_path / "pipe.png")
    source = write("jsonl", tmp_path, "pipe.png")
    check_refused(tool("tools/clean_corpus.py", "--input", source, "--output", output), "line 1", "is a pipe")
    assert not output.exists() and SECRET not in source.read_text()
