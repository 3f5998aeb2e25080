"""A headless Chromium for tests, driven by chromedriver over the W3C WebDriver protocol: what a person's browser makes of a page."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

OPTIONS = {
    "goog:chromeOptions": {
        "binary": shutil.which("chromium") or shutil.which("google-chrome") or "",
        "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    },
    "goog:loggingPrefs": {"browser": "ALL"},
}


class Browser:
    def __init__(self, server: str):
        self.server, self.session = server, ""
        self.session = self.send("POST", "", {"capabilities": {"alwaysMatch": OPTIONS}})["sessionId"]

    def send(self, method: str, path: str, body: dict | None = None):
        url = f"{self.server}/session" + (f"/{self.session}" if self.session else "") + path
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        self.send("POST", "/url", {"url": url})

    def run(self, script: str):
        """The value of a script with a `return`."""
        return self.send("POST", "/execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int) -> None:
        # by the protocol of the developer tools: windows cannot be narrower than 500 px
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)

    def cdp(self, command: str, **parameters):
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, key: str) -> None:
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def complaints(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [entry["message"] for entry in self.send("POST", "/se/log", {"type": "browser"}) if entry["level"] != "INFO"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Skips the test where there is no Chromium."""
    if not shutil.which("chromedriver") or not OPTIONS["goog:chromeOptions"]["binary"]:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(line.rsplit(" ", 1)[1].strip(" .\n") for line in driver.stdout if "successfully on port" in line)
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.send("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
