"""Every format of input gives the bytes of the JSONL build; what is damaged or malicious is refused by name.

Truth: the folder that the JSONL with the same samples gives, compared file by file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.build.train_tokenizer import training_lines
from megatron_mm.data.corpus.record_lines import RecordLines, inline_medium
from megatron_mm.data.corpus.text_input import expand_inputs, open_lines, zstd
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.jobs.parallel import line_blocks
from megatron_mm.media.errors import DataError

pytestmark = pytest.mark.interface

KINDS = ("images", "audios", "videos")
PACKINGS = {".gz": gzip.compress, ".zst": zstd.compress}


@pytest.fixture(scope="module")
def records(samples) -> list[dict]:
    """The samples, each with an id."""
    lines = samples.read_text().splitlines()
    return [{"id": f"ball-{i}", **json.loads(line)} for i, line in enumerate(lines)]


@pytest.fixture(scope="module")
def source(samples, records) -> Path:
    path = samples.parent / "all.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, source, tokenizer_path) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "x"
    build_multimodal([str(source)], str(output), tokenizer_path, workers=0, progress=False)
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of the files of a dataset folder; its manifest names the sources, which differ."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def with_bytes(record: dict, folder: Path, form) -> dict:
    """The record with `form(name, bytes)` in place of each path."""
    media = {kind: [form(name, (folder / name).read_bytes()) for name in record.get(kind, ())] for kind in KINDS}
    return {**record, **media}


def write_table(path: Path, records: list[dict], delimiter: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["id", "prompt", "text", *KINDS])
        for record in records:
            media = [";".join(record.get(kind, ())) for kind in KINDS]
            writer.writerow([record["id"], record.get("prompt", ""), record["text"], *media])


def arrow_table(records: list[dict], folder: Path) -> pyarrow.Table:
    """As Hugging Face has it: media are structs of bytes and path; here they are all inline."""
    medium = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [(name, pyarrow.string()) for name in ("id", "prompt", "text")]
    schema = pyarrow.schema([*fields, *((kind, pyarrow.list_(medium)) for kind in KINDS)])
    rows = [with_bytes(record, folder, lambda name, data: {"bytes": data, "path": None}) for record in records]
    return pyarrow.Table.from_pylist(rows, schema=schema)


def write_arrow(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def save_to_disk(folder: Path, table: pyarrow.Table) -> None:
    """The files of Hugging Face's `Dataset.save_to_disk`; their order is that of state.json, not of their names."""
    folder.mkdir()
    half = table.num_rows // 2
    write_arrow(folder / "data-b.arrow", table.slice(0, half))
    write_arrow(folder / "data-a.arrow", table.slice(half))
    write_arrow(folder / "cache-0.arrow", table)
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def tar_members(records: list[dict], folder: Path) -> list[tuple[str, bytes]]:
    members = [("train/", b""), ("train/.hidden.txt", b"x")]
    endings = {"images": "png", "audios": "wav", "videos": "mp4"}
    for i, record in enumerate(records):
        name = f"train/{record['id']}"
        rest = {key: record[key] for key in ("id", "prompt") if key in record}
        members.append((f"{name}.json", json.dumps(rest).encode()))
        members.append((f"{name}.{'txt' if i % 2 else 'caption'}", record["text"].encode()))
        members.append((f"{name}.cls", b"3"))
        for kind in KINDS:
            for k, medium in enumerate(record.get(kind, ())):
                members.append((f"{name}.{k}.{endings[kind]}", (folder / medium).read_bytes()))
    return members


FORMATS = ["jsonl.gz", "ndjson.zst", "csv", "tsv.zst", "parquet", "arrow", "folder", "tar", "tgz", "tar.zst", "inline"]


def write_format(form: str, records: list[dict], folder: Path) -> Path:
    """The records in a format, beside their media."""
    path = folder / ("saved" if form == "folder" else f"made.{form}")
    if form in ("jsonl.gz", "ndjson.zst"):
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        pack = PACKINGS[path.suffix]
        path.write_bytes(pack(data[:5000]) + pack(data[5000:]))  # two members or frames
    elif form == "inline":
        path = folder / "inline.json"
        rows = [with_bytes(record, folder, lambda name, data: inline_medium(data)) for record in records]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        write_table(path, records, ",")
    elif form == "tsv.zst":
        write_table(folder / "made.tsv", records, "\t")
        path.write_bytes(zstd.compress((folder / "made.tsv").read_bytes()))
    elif form == "parquet":
        pyarrow.parquet.write_table(arrow_table(records, folder), path, row_group_size=23)
    elif form == "arrow":
        write_arrow(path, arrow_table(records, folder))
    elif form == "folder":
        save_to_disk(path, arrow_table(records, folder))
    elif form == "tar.zst":
        path.write_bytes(zstd.compress(write_tar(folder / "made.tar", tar_members(records, folder)).read_bytes()))
    else:
        write_tar(path, tar_members(records, folder), "w:gz" if form == "tgz" else "w")
    return path


@pytest.fixture(scope="module", params=FORMATS)
def made(request, samples, records) -> Path:
    return write_format(request.param, records, samples.parent)


def test_same_bytes_as_jsonl(made, expected, tmp_path, tokenizer_path):
    workers = 2 if made.suffix in (".parquet", ".tar") else 0
    inputs = expand_inputs([str(made)])
    build_multimodal(inputs, str(tmp_path / "x"), tokenizer_path, workers=workers, progress=False)
    assert contents(tmp_path / "x") == expected


def test_text_and_tokenizer_read_every_format(made, source, tmp_path, tokenizer_path):
    """The text builder cuts blocks by bytes, not by lines."""
    inputs = expand_inputs([str(made)])
    for name, paths in (("a", inputs), ("b", [str(source)])):
        build_text(paths, str(tmp_path / name), tokenizer_path, workers=0, progress=False)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a_text_document{suffix}").read_bytes() == (
            tmp_path / f"b_text_document{suffix}"
        ).read_bytes()
    keys = ["prompt", "text"]
    assert list(training_lines(inputs, keys)) == list(training_lines([str(source)], keys))


def test_seek_and_progress(made):
    """An interrupted build reads on anywhere; progress ends at the size of the file."""
    for path in expand_inputs([str(made)]):
        with open_lines(path) as (stream, raw):
            whole = stream.read()
            assert raw.tell() == pytest.approx(Path(path).stat().st_size, rel=0.1, abs=64)
        assert whole.endswith(b"\n")
        for offset in (1, len(whole) // 2, len(whole)):
            with open_lines(path) as (stream, _):
                stream.seek(offset)
                assert stream.readline() == whole[offset : whole.find(b"\n", offset) + 1 or len(whole)]


@pytest.mark.parametrize("form", ["ndjson.zst", "tar", "csv", "parquet"])
def test_a_failed_build_continues(form, records, samples, expected, tmp_path, tokenizer_path, monkeypatch, capsys):
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)
    bad = [{**record, "text": record["text"] + "<video>" * (i == 50)} for i, record in enumerate(records)]
    path = write_format(form, bad, samples.parent)
    line = 52 if form == "csv" else 51
    with pytest.raises(DataError, match=rf"made\.{form}, line {line}: \d <video> in prompt and text"):
        build_multimodal([str(path)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    write_format(form, records, samples.parent)
    build_multimodal([str(path)], str(tmp_path / "x"), tokenizer_path, workers=2, progress=False)
    said = capsys.readouterr().err
    assert "continues an unfinished build" in said and "anew" not in said
    assert contents(tmp_path / "x") == expected


def test_placeholders_are_put_before_the_prompt(samples, tmp_path):
    image, sound = ((samples.parent / name).read_bytes() for name in ("1-0.png", "0.wav"))
    tar = write_tar(tmp_path / "a.tar", [("7.wav", sound), ("7.png", image), ("7.txt", b"a ball"), ("8.txt", b"b")])
    table = pyarrow.table({"image": [{"bytes": image, "path": "x.png"}, {"bytes": None, "path": "y.png"}, None]})
    table = table.append_column("text", [["a", "b <image>", "c"]]).append_column("prompt", [["Which?", None, None]])
    write_arrow(tmp_path / "a.arrow", table)
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,images\r\n"two\r\nlines", a.png; b.png \r\n\r\nnone,\r\n')

    def read(name: str) -> list:
        with open_lines(str(tmp_path / name)) as (stream, _):
            return [json.loads(line) if line.strip() else None for line in stream]

    inline = inline_medium(image)
    first, second = read(tar.name)
    assert first == {"id": "7", "prompt": "<image><audio>", "text": "a ball", "images": [inline],
                     "audios": [inline_medium(sound)]}  # fmt: skip
    assert second == {"id": "8", "text": "b"}
    assert [(row["prompt"], row.get("images")) for row in read("a.arrow")] == [
        ("<image>Which?", [inline]), (None, ["y.png"]), (None, None)
    ]  # fmt: skip
    two = {"text": "two\r\nlines", "images": ["a.png", "b.png"], "prompt": "<image><image>"}
    assert read("a.csv") == [None, two, None, None, {"text": "none", "images": []}]  # the numbers of the file's lines


CSV = b"text,images\nfine,\n"
BAD_TABLES = [
    (CSV + b"one\n", "line 3: 1 fields, but the header names 2"),
    (CSV + b'"a\nb",\n1,2,3\n', "line 5: 3 fields, but the header names 2"),
    (CSV + b"caf\xe9,\n", r"line 3: not UTF-8 \(invalid continuation byte at byte 3\)"),
    (CSV + b'"never closed,\nfine,\n', "line 3: not a row of a table"),
    (CSV + b'"a"b,\n', "line 3: not a row of a table"),
    (b"text,text\na,b\n", "line 1: the header names 'text' twice"),
    (b"text,\na,b\n", "line 1: the header has a field without a name"),
]


@pytest.mark.parametrize(("data", "message"), BAD_TABLES)
def test_bad_tables_are_refused_by_line(data, message, tmp_path):
    (tmp_path / "bad.csv").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.csv, {message}"), open_lines(str(tmp_path / "bad.csv")) as (stream, _):
        stream.read()


def test_a_cell_may_be_long_and_a_row_not_endless(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    with open_lines(str(path)) as (stream, _):
        assert json.loads(stream.read().splitlines()[1]) == {"text": "x" * 200_000}
    with pytest.raises(DataError, match=r"long\.csv, line 2: longer than 1000 bytes"):
        read_blocks(path, 1000)


def read_blocks(path: Path, max_line: int) -> int:
    """Bytes of all blocks of a file."""
    with open_lines(str(path), max_line) as (stream, raw):
        return sum(len(block.data) for block in line_blocks(str(path), stream, raw, 1 << 16, 0, max_line))


@pytest.mark.parametrize("packing", PACKINGS)
def test_damaged_compression_is_named(packing, tmp_path):
    noise = random.Random(0).randbytes(60_000).hex().encode() + b"\n"
    data, path = PACKINGS[packing](noise * 3), tmp_path / f"bad.jsonl{packing}"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    message = rf"bad\.jsonl{packing}: damaged (gzip|zstd) file"
    cases = [data[:-9], data[: len(data) // 2], data + b"garbage", b"text", b"", data[:10] + b"\xff" * 20 + data[30:]]
    cases += [bytes(flipped)] if packing == ".gz" else []  # zstd's frames have no checksum unless asked for
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(DataError, match=message):
            read_blocks(path, 1 << 20)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "csv.zst", "tar.gz", "tar.zst"])
def test_bombs_do_not_fill_memory(ending, tmp_path):
    """64 MiB of one line, or of a member of a tar, are refused long before they are in memory."""
    bomb = bytes(1) * (1 << 26)
    form, packing = ending.split(".")
    message = ": a.txt: with it, sample a has" if form == "tar" else ", line 1: longer than"
    if form == "tar":
        write_tar(tmp_path / "plain.tar", [("a.txt", bomb)])
        bomb = (tmp_path / "plain.tar").read_bytes()
    path = tmp_path / f"bomb.{ending}"
    path.write_bytes(PACKINGS["." + packing](bomb, 1))
    del bomb
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"bomb\.{ending}{message}"):
            read_blocks(path, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def header(name: str, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)
BAD_TARS = [
    (header("/etc/a.txt") + END, "/etc/a.txt: a member's path must stay inside the tar"),
    (header("a/../../b.txt") + END, r"a/\.\./\.\./b.txt: a member's path must stay inside"),
    (header("a.png", type=tarfile.SYMTYPE, linkname="b") + END, "a.png: a link, device or sparse file"),
    (header("a.png", type=tarfile.LNKTYPE, linkname="b") + END, "a.png: a link, device or sparse file"),
    (header("null.txt", type=tarfile.CHRTYPE) + END, "null.txt: a link, device or sparse file"),
    (header("huge.mp4", size=(1 << 31) + 1), "huge.mp4: with it, sample huge has 2147483649 bytes; it may have at"),
    (
        header("a" * 9, type=tarfile.GNUTYPE_LONGNAME, size=1 << 33),
        "damaged tar, after sample none .a name of 8589934592 bytes",
    ),
    (header("a.txt", size=600) + b"x" * 512, "damaged tar"),
    (header("a.txt", size=4) + b"text".ljust(512, b"\0"), "damaged tar, after sample a .it is cut off"),
    (header("a.txt", size=4) + b"text".ljust(512, b"\0") + b"junk" * 128 + END, "damaged tar, after sample a"),
    (b"no tar at all", "damaged tar"),
    (b"", "damaged tar"),
    (header("a.txt", size=1) + b"\xff".ljust(512, b"\0") + END, "a.txt: not UTF-8"),
    (header("a.json", size=1) + b"[".ljust(512, b"\0") + END, "a.json: not JSON"),
    (header("a.txt") + header("a.caption") + END, "a.caption: another member is the text of sample a"),
]


@pytest.mark.parametrize(("data", "message"), BAD_TARS)
def test_bad_tars_are_refused_by_member(data, message, tmp_path):
    (tmp_path / "bad.tar").write_bytes(data)
    with (
        pytest.raises(DataError, match=rf"bad\.tar: {message}"),
        open_lines(str(tmp_path / "bad.tar"), 1 << 31) as (stream, _),
    ):
        stream.read()


def test_a_long_tar_keeps_no_headers(tmp_path):
    path = write_tar(tmp_path / "many.tar", [(f"{i}.txt", b"x") for i in range(3000)])
    tracemalloc.start()
    try:
        assert read_blocks(path, 1 << 20) > 0
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_damaged_columns_are_named(ending, records, samples, tmp_path):
    whole = write_format(ending, records, samples.parent).read_bytes()
    path, middle = tmp_path / f"bad.{ending}", len(whole) // 2
    for data in (whole[:middle], whole[:-8], b"", b"text" * 9, whole[:64] + bytes(512) + whole[576:]):
        path.write_bytes(data)
        with (
            pytest.raises(DataError, match=rf"bad\.{ending}, from line 1 on: damaged"),
            open_lines(str(path)) as (stream, _),
        ):
            stream.read()
    (tmp_path / f"a.{ending}.gz").write_bytes(b"")
    with pytest.raises(DataError, match="compress themselves"), open_lines(str(tmp_path / f"a.{ending}.gz")):
        pass


def test_columns_that_are_not_utf8(tmp_path):
    bad = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    with (
        pytest.raises(DataError, match=r"bad\.parquet, from line 1 on: damaged .*UTF8.* 1"),
        open_lines(str(tmp_path / "bad.parquet")) as (stream, _),
    ):
        stream.read()


def test_without_pyarrow(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with (
        pytest.raises(DataError, match=r"a\.parquet: reading it needs pyarrow: pip install"),
        open_lines(str(tmp_path / "a.parquet")) as (stream, _),
    ):
        stream.read()


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        ({"base64": "aGk"}, 'field "images", number 1: not base64'),
        ({"base64": "aGk*"}, 'field "images", number 1: not base64'),
        ({"base64": ""}, 'field "images", number 1: an empty file'),
        ({"base64": "aGk="}, 'field "images", number 1: not an image'),
        ({"base64": 5}, 'field "images" must be a list of paths'),
        ({"url": "x"}, 'field "images" must be a list of paths'),
    ],
)
def test_bad_inline_media(medium, message, tmp_path, tokenizer_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "<image>", "images": [medium]}))
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 1: {message}"):
        build_multimodal([str(path)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)


def test_folders_and_globs(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "c.tar", "notes.md", "d.png", ".e.csv", "sub.tar"):
        (tmp_path / name).mkdir() if name == "sub.tar" else (tmp_path / name).touch()
    inputs = ["a.csv.gz", "b.jsonl", "c.tar"]
    assert [Path(path).name for path in expand_inputs([str(tmp_path)])] == inputs
    assert [Path(path).name for path in expand_inputs([str(tmp_path / "*")])] == inputs
    assert [Path(path).name for path in expand_inputs([str(tmp_path / "*.md")])] == ["notes.md"]
    with pytest.raises(DataError, match=r"sub\.tar: holds no input files \(\.jsonl .* need a glob"):
        expand_inputs([str(tmp_path / "sub.tar")])
    state = tmp_path / "state.json"
    for text, message in (
        ("{", "not the state of a Hugging Face dataset"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "which is not in the folder"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "names gone.arrow, which is not in the folder"),
    ):
        state.write_text(text)
        with pytest.raises(DataError, match=message):
            expand_inputs([str(tmp_path)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="holds several splits; name the folder of one of them"):
        expand_inputs([str(tmp_path)])


def test_lines_in_any_pieces():
    """Truth: the same bytes as a file in memory."""
    lines = [b"a\n", b"\n", b"long line\n", b"last"]
    dice = random.Random(1)
    for _ in range(200):
        made, plain = RecordLines(iter(lines)), io.BytesIO(b"".join(lines))
        for _ in range(12):
            size, method = dice.randrange(1, 9), dice.choice(["read", "readline", "seek"])
            size += plain.tell() if method == "seek" else 0
            if method == "seek" and size > len(plain.getvalue()):
                continue
            assert getattr(made, method)(size) == getattr(plain, method)(size)
            assert made.tell() == plain.tell()
    with pytest.raises(io.UnsupportedOperation):
        made.seek(0)
