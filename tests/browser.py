"A page in a real browser, for the tests of what people look at."
import os
import shutil
import subprocess
import warnings

import pytest

NAMES = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def executable() -> str:
    "The first browser that starts. Where there is none, tests are skipped, loudly, or fail if SAGE_NB_BROWSER is `required`."
    for path in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:  # some systems have a command that only tells how to install it
            return path
    if os.environ.get("SAGE_NB_BROWSER") == "required":
        pytest.fail("no browser that starts, so what people look at cannot be tested: install chromium, or unset SAGE_NB_BROWSER", pytrace=False)
    warnings.warn("NO BROWSER: what people look at is NOT TESTED; install chromium", stacklevel=1)
    pytest.skip("no browser: install chromium, or this is not tested")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    "A browser with an empty profile."
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=path, headless=True, args=QUIET)
        browser.set_default_timeout(300_000)  # ms; no test is about time
        yield browser
        browser.close()


@pytest.fixture
def page(context):
    "A page that notes what goes wrong in it: `page.errors`, the errors that it told on the console, threw, or met in fetching; `page.requests`, all that it asked for."
    page = context.new_page()
    page.errors, page.requests = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("requestfailed", lambda request: page.errors.append(f"{request.url}: {request.failure}"))
    page.on("request", lambda request: page.requests.append(request.url))
    yield page
    page.close()
