"""Debian's Chromium for tests that look at pages: installed with apt-get where it is missing, driven by Selenium.

    python -m tests.support.browser     installs it
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.data import programs
from examples.data.clients import run_client
from tests.support.waiting import HANG_SECONDS

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
    "--window-size=1280,1000", "--autoplay-policy=no-user-gesture-required", "--mute-audio",
)  # fmt: skip


#: Milliseconds for the start of the browser, a page, and a script, in place of limits that a busy machine may reach.
_PATIENCE = int(1000 * HANG_SECONDS)


def install() -> None:
    """Installs Chromium and its driver where they are missing.

    Raises:
        ValueError: that is not possible, or one is of another release than the other.
    """
    programs.install({"chromium": "chromium", "chromedriver": "chromium-driver"})
    browser, driver = (_release(program) for program in ("chromium", "chromedriver"))
    if browser != driver:
        raise ValueError(f"chromium is {browser} and chromedriver {driver}; install both of one release")


def _release(program: str) -> str:
    said = run_client([program, "--version"], "its version")
    found = re.search(r"\b(\d+)\.\d+\.\d+", said)
    return found[1] if found else f"of no known release ({said.strip()})"


@contextmanager
def chromium(profile: Path) -> Iterator:
    """A browser window, 1280 × 1000 pixels, as Selenium's driver; it logs every request and message of its pages.

    Args:
        profile: a new, empty folder.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.timeouts = {"script": _PATIENCE, "pageLoad": _PATIENCE}
    options.add_experimental_option("browserStartupTimeout", _PATIENCE)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


if __name__ == "__main__":
    try:
        install()
    except ValueError as error:
        sys.exit(f"no browser: {error}")
