"""Chromium, driven by Playwright, where `scripts/setup_browser.sh` has brought both."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "bash scripts/setup_browser.sh brings it"


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Skips the test, saying why, where there is none."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no Chromium on the PATH: {HOW}")
    for folder in (ROOT / ".venv-browser").glob("lib/python3.11/site-packages"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # at the end: it adds Playwright and replaces nothing
    try:
        api = importlib.import_module("playwright.sync_api")
    except ModuleNotFoundError:
        pytest.skip(f"no Playwright: {HOW}")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=as_root)
        try:
            yield browser
        finally:
            browser.close()
