"""Programs of the distribution: what is installed, what is asked for, and what cannot be had."""

from __future__ import annotations

import subprocess

import pytest

from examples.data import clients, programs
from tests.support import browser


class Machine:
    """A Debian on which apt-get installs what its release has; the user is root."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.there = {"apt-get", "here"}
        self.release = {"chromium": {"chromium"}, "chromium-driver": {"chromedriver"}, "renamed": {"other"}}
        """Programs of each package."""
        self.network = True

    def which(self, name: str) -> str | None:
        return name if name in self.there else None

    def run(self, command: list[str], **_) -> subprocess.CompletedProcess:
        self.calls.append(command)
        if not self.network:
            return self.failed("E: Failed to fetch http://deb/x  Could not connect to deb:80. - connect (111)")
        if command[1] == "install":
            for package in command[command.index("DPkg::Lock::Timeout=1800") + 1 :]:
                if package not in self.release:
                    return self.failed(f"Reading lists\nE: Unable to locate package {package}")
                self.there |= self.release[package]
        return subprocess.CompletedProcess(command, 0, b"", b"")

    @staticmethod
    def failed(said: str) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 100, b"", said.encode())


@pytest.fixture
def machine(monkeypatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(clients.subprocess, "run", made.run)
    monkeypatch.setattr(programs.shutil, "which", made.which)
    monkeypatch.setattr(programs.os, "geteuid", lambda: 0)
    return made


def test_only_what_is_missing_is_installed(machine):
    programs.install({"here": "here"})
    assert machine.calls == []
    programs.install({"here": "here", "chromedriver": "chromium-driver", "chromium": "chromium"})
    assert [call[:2] for call in machine.calls] == [["apt-get", "update"], ["apt-get", "install"]]
    assert machine.calls[1][-2:] == ["chromium", "chromium-driver"]


def test_what_cannot_be_installed_is_named(machine, monkeypatch):
    cause = "could not get absent: its registry, or this release of the distribution, has no such package"
    with pytest.raises(ValueError, match=rf"{cause} \(E: Unable to locate package absent\)$"):
        programs.install({"absent": "absent"})
    monkeypatch.setattr(programs.os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="needs root: sudo apt-get install chromium"):
        programs.install({"chromium": "chromium"})
    assert len(machine.calls) == 2, "a user without the right does not try"
    machine.there.remove("apt-get")
    with pytest.raises(ValueError, match=r"^chromium not installed, and there is no apt-get"):
        programs.install({"chromium": "chromium"})


def test_a_package_without_the_program_is_named(machine):
    with pytest.raises(ValueError, match="installed renamed, but in this release that has no program wanted"):
        programs.install({"wanted": "renamed"})


def test_without_a_network_both_failures_are_said(machine):
    machine.network = False
    lists = "before that, apt-get could not get the lists of packages: the registry cannot be reached"
    with pytest.raises(ValueError, match=rf"apt-get could not get chromium: the registry cannot be reached.*; {lists}"):
        programs.install({"chromium": "chromium"})


def test_old_lists_may_do(machine, monkeypatch):
    """The network is there for the package, or its archive is on the disk: renewing the lists is only tried."""
    run = machine.run
    offline = Machine.failed("E: Could not resolve 'deb'")
    monkeypatch.setattr(clients.subprocess, "run", lambda c, **k: offline if c[1] == "update" else run(c, **k))
    programs.install({"chromium": "chromium"})
    assert "chromium" in machine.there


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("npm error code ETARGET\nnpm error notarget No matching version found for a@9.\nnpm error A complete log of "
         "this run can be found in: x", "this version is not, or no longer, in its registry (npm error notarget No"),
        ("npm ERR! code E404\nnpm ERR! 404 Not Found - GET https://host/a\nnpm ERR! 404", "its registry, or this"),
        ("npm error code ENOTFOUND\nnpm error network request to https://host/a failed", "the registry cannot be reac"),
        ("WARNING: Retrying: Failed to establish a new connection: [Errno 111]\nERROR: No matching distribution found "
         "for easy-vqa==1.0", "the registry cannot be reached"),
        ("ERROR: Could not find a version that satisfies the requirement a==9 (from versions: 1.0b1, 1.0)\nERROR: No "
         "matching distribution found for a==9", "this version is not, or no longer"),
        ("ERROR: Could not find a version that satisfies the requirement a==9 (from versions: none)", "the registry "
         "has no such package, or cannot be reached"),
        ("E: Failed to fetch http://host/a_1.deb  404  Not Found [IP: 1.2.3.4 80]", "this version is not, or no"),
        ("E: Temporary failure resolving 'host'", "the registry cannot be reached"),
        ("first\nnothing known\nnpm error A complete log of this run can be found in: x\n", "nothing known"),
        ("", "no message"),
    ],
)  # fmt: skip
def test_a_failure_is_explained(said, cause):
    """As npm 9 and 11, pip 23 and apt 2.6 say it."""
    assert clients.explain(said).startswith(cause)


@pytest.mark.parametrize(("driver", "fits"), [("150.0.7871.99", True), ("149.0.1.2", False), ("none at all", False)])
def test_browser_and_driver_are_of_one_release(machine, monkeypatch, driver, fits):
    machine.there |= {"chromium", "chromedriver"}
    said = {"chromium": "Chromium 150.0.7871.100 built on Debian", "chromedriver": f"ChromeDriver {driver} (x)"}
    run = lambda command, **_: subprocess.CompletedProcess(command, 0, said[command[0]].encode(), b"")  # noqa: E731
    monkeypatch.setattr(clients.subprocess, "run", run)
    if fits:
        browser.install()
    else:
        with pytest.raises(ValueError, match=r"chromium is 150 and chromedriver .*one release"):
            browser.install()
