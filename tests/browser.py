"""A page in a real browser: `from browser import page  # noqa: F401`. Where no Chromium is there, tests that ask for it are skipped, and say so loudly."""
import shutil
import warnings

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def page():
    "A fresh page of a headless Chromium with an empty profile; `page.faults` collects console errors, uncaught errors and failed requests."
    if CHROMIUM is None:
        warnings.warn("NO BROWSER: tests in a browser are skipped; install chromium (`apt-get install chromium`) and run again")
        pytest.skip("NO BROWSER: install chromium (`apt-get install chromium`) and run again")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.faults = []
        page.on("console", lambda message: page.faults.append(f"console: {message.text}") if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(f"error: {error}"))
        page.on("requestfailed", lambda request: page.faults.append(f"failed: {request.url}"))
        yield page
        browser.close()
