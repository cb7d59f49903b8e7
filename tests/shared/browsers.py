"""A real browser for pages that we write: chromium without a window, which tells of every request and complaint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SENT, FAILED = "Network.requestWillBeSent", "Network.loadingFailed"
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser and its driver: apt-get install chromium chromium-driver"
)


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """A driver of selenium, its profile in the empty folder `profile`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("headless=new", "disable-gpu", "disable-background-networking", "no-first-run", "hide-scrollbars",
                 f"user-data-dir={profile}", "window-size=1200,900"):  # fmt: skip
        options.add_argument(f"--{word}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # chromium refuses to start as root with it
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def show(browser: Any, file: Path) -> None:
    """Open `file`; what was logged before is forgotten."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(file.as_uri())


def requests(browser: Any) -> set[str]:
    """What the page that is open asked for, less pictures inside it (data:) and what its own policy stopped."""
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = {}
    for m in messages:
        if m["method"] == SENT and m["params"]["documentURL"] == browser.current_url:  # not those of the first tab
            sent[m["params"]["requestId"]] = m["params"]["request"]["url"]
        elif m["method"] == FAILED and m["params"].get("blockedReason") == "csp":
            sent.pop(m["params"]["requestId"], None)
    return {url for url in sent.values() if not url.startswith("data:")}
