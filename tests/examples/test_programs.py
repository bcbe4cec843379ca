"""Programs of the distribution: what is installed, what is asked for, and what cannot be had."""

from __future__ import annotations

import subprocess

import pytest

from examples.data import programs


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """Commands that would have run; only apt-get is there, and the user is root."""
    made: list[list[str]] = []

    def run(command, **_):
        made.append(command)
        return subprocess.CompletedProcess(command, 100 if "absent" in command else 0, "", "E: no package absent\n")

    monkeypatch.setattr(programs.subprocess, "run", run)
    monkeypatch.setattr(programs.shutil, "which", lambda name: name if name in ("apt-get", "here") else None)
    monkeypatch.setattr(programs.os, "geteuid", lambda: 0)
    return made


def test_only_what_is_missing_is_installed(calls):
    programs.install({"here": "here"})
    assert calls == []
    programs.install({"here": "here", "chromedriver": "chromium-driver", "chromium": "chromium"})
    assert [call[:2] for call in calls] == [["apt-get", "update"], ["apt-get", "install"]]
    assert calls[1][-2:] == ["chromium", "chromium-driver"]


def test_what_cannot_be_installed_is_named(calls, monkeypatch):
    with pytest.raises(ValueError, match="apt-get could not install absent: E: no package absent"):
        programs.install({"absent": "absent"})
    monkeypatch.setattr(programs.os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="needs root: sudo apt-get install chromium"):
        programs.install({"chromium": "chromium"})
    assert len(calls) == 2, "a user without the right does not try"
