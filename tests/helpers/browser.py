"""Chromium without a screen, for tests of web pages."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
SECONDS = 90  # until a page shows what it should, on a busy machine


@contextmanager
def browser(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A page in a new browser. An error in its scripts fails the test."""
    errors: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        chromium.close()
    assert not errors


def shows(page: Page, *texts: str | re.Pattern[str]) -> None:
    """Waits until the page shows each of the texts."""
    for text in texts:
        expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * SECONDS)


def screenshot(page: Page, folder: Path, name: str) -> Path:
    """A PNG of the page, after animations have ended."""
    page.wait_for_timeout(1500)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    page.screenshot(path=str(path), animations="disabled")
    return path
