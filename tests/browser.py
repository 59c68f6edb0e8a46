"A page in a real browser, for the tests of what people look at."
import os
import shutil
import warnings

import pytest

CHROMIUM = next(filter(None, ["/usr/bin/chromium" if os.access("/usr/bin/chromium", os.X_OK) else None, *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    "A browser with an empty profile; where there is none, the tests are skipped, loudly."
    if CHROMIUM is None:
        warnings.warn("NO BROWSER: what people look at is NOT TESTED; install chromium", stacklevel=1)
        pytest.skip("no browser: install chromium, or this is not tested")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True, args=QUIET)
        browser.set_default_timeout(300_000)  # ms; no test is about time
        yield browser
        browser.close()


@pytest.fixture
def page(context):
    "A page that notes what goes wrong in it: `page.errors`, what it said on the console, threw or could not fetch; `page.requests`, all that it asked for."
    page = context.new_page()
    page.errors, page.requests = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("requestfailed", lambda request: page.errors.append(f"{request.url}: {request.failure}"))
    page.on("request", lambda request: page.requests.append(request.url))
    yield page
    page.close()
