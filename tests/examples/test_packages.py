"""Packages from registries, with an npm of the test's own in PATH: what is unpacked, and when not again."""

import json
import stat
import tarfile
from pathlib import Path

import pytest

from examples.data import emoji_art, packages
from examples.data.packages import Package, fetch

PACKAGE = Package("npm", "@some/art", "1.2.0", r"img/[^/]+|names\.json", "MIT")


def write_client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def archive(folder: Path, files: dict[str, str]) -> Path:
    """A tarball of the files, under `package/` as npm's are."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        path = folder / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with tarfile.open(folder / "made.tgz", "w:gz") as tar:
        for path in sorted((folder / "package").rglob("*")):
            tar.add(path, path.relative_to(folder), recursive=False)
        tar.add(folder / "package" / next(iter(files)), "package/../../evil.png")
    return folder / "made.tgz"


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a client in PATH that hands out this tarball and counts its calls."""

    def serve(files: dict[str, str]) -> Path:
        made, calls = archive(tmp_path / "source", files), tmp_path / "calls"
        write_client(tmp_path / "bin", "npm", f'echo "$@" >>{calls}; cp {made} .; echo made.tgz')
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return calls

    return serve


def test_only_what_is_wanted_is_unpacked_and_only_once(npm, tmp_path):
    calls = npm({"img/1.png": "one", "sheets/2.png": "two", "names.json": "{}", "LICENSE": "MIT"})
    for _ in range(2):
        folder = fetch(PACKAGE, tmp_path / "cache" / "art")
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {"img/1.png", "names.json", "LICENSE"} and (folder / "img/1.png").read_text() == "one"
    assert len(calls.read_text().splitlines()) == 1 and "@some/art@1.2.0" in calls.read_text()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["art"], "no leftovers"


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_pictures_alike_the_same_is_taken_on_every_disk(backwards, tmp_path, monkeypatch):
    folder = tmp_path / emoji_art.ALL_VENDORS["fluent"].pictures
    folder.mkdir(parents=True)
    names = ["26a7-fe0f.webp", "26a7.webp", "1f34e.webp"]
    for name in names:
        (folder / name).touch()
    listed = [folder / name for name in (reversed(names) if backwards else names)]
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed))
    found = emoji_art.pictures_of("fluent", tmp_path)
    assert {code: path.name for code, path in found.items()} == {"26a7": "26a7.webp", "1f34e": "1f34e.webp"}


def test_failures_name_the_client_and_the_package(tmp_path, monkeypatch, npm):
    write_client(tmp_path / "bin", "npm", "echo first >&2; echo no such version >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"npm could not get @some/art 1.2.0 \(npm\): no such version"):
        fetch(PACKAGE, tmp_path / "cache" / "art")
    npm({"other.txt": "x", "package.json": "{}"})
    with pytest.raises(ValueError, match="holds no file like img"):
        fetch(PACKAGE, tmp_path / "cache" / "art")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"npm is not installed; it is needed to get @some/art"):
        fetch(PACKAGE, tmp_path / "cache" / "art")
    assert not (tmp_path / "cache" / "art").exists()


def test_what_comes_damaged_or_not_at_all_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for script, message in (
        ("echo no archive >made.tgz", r"@some/art 1.2.0 \(npm\) came damaged"),
        ("exit 0", r"npm left 0 files for @some/art 1.2.0 \(npm\)"),
    ):
        write_client(tmp_path / "bin", "npm", script)
        with pytest.raises(ValueError, match=message):
            fetch(PACKAGE, tmp_path / "cache" / "art")
    assert not any((tmp_path / "cache").iterdir())


def test_debian_packages(tmp_path, monkeypatch):
    """apt-get leaves an archive in its working directory, dpkg-deb unpacks it; lists are renewed by root alone."""
    made = archive(tmp_path / "source", {"usr/share/a.txt": "one"})
    package = Package("apt", "art", "", r"package/usr/share/a\.txt", "GPL-2")
    log, renewed = tmp_path / "log", tmp_path / "renewed"
    write_client(
        tmp_path / "bin", "apt-get",
        f'echo "$1" >>{log}; [ "$1" = update ] && touch {renewed} && exit; [ -e {renewed} ] || '
        f'{{ echo "E: Unable to locate package art" >&2; exit 100; }}; cp {made} art_1.deb',
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match=r"this release of the distribution, has no such package.*sudo apt-get update"):
        fetch(package, tmp_path / "cache" / "art")
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    write_client(tmp_path / "bin", "dpkg-deb", "echo not a Debian archive >&2; exit 2")
    with pytest.raises(ValueError, match=r"dpkg-deb could not get art \(apt\): not a Debian archive"):
        fetch(package, tmp_path / "cache" / "art")
    write_client(tmp_path / "bin", "dpkg-deb", 'gzip -dc "$2"')
    folder = fetch(package, tmp_path / "cache" / "art")
    assert (folder / "package/usr/share/a.txt").read_text() == "one"
    assert log.read_text().split() == ["download", "download", "update", "download", "download"]


def test_iconify_drawings_become_files_named_by_code_points(npm, tmp_path):
    icons = {"red-apple": {"body": "<path/>"}, "sun": {"body": "<circle/>"}, "logo": {"body": "<g/>"}}
    aliases = {"star-of-day": {"parent": "sun"}, "turned": {"parent": "sun", "rotate": 1}}
    table = {"width": 64, "height": 32, "icons": icons, "aliases": aliases}
    codes = {"1f34e": "red-apple", "2600": "star-of-day", "2601": "cloud", "2602": "turned"}
    npm({"icons.json": json.dumps(table), "chars.json": json.dumps(codes)})
    folder = emoji_art.fetch(emoji_art.ICONIFY_VENDORS["emojione"], tmp_path / "cache")
    files = {path.name: path.read_text() for path in (folder / "svg").iterdir()}
    assert files.keys() == {"1f34e.svg", "2600.svg"}
    assert 'viewBox="0 0 64 32"' in files["2600.svg"] and "<circle/>" in files["2600.svg"]
