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

    def point(self, selector: str, across: float = 0.5, down: float = 0.5, until: float | None = None) -> None:
        """Move the mouse over an element, to these shares of its width and height; with `until`, drag it to that share of the width."""
        script = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        box = self.run(script + "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]")
        left, top, width, height = box
        moves = [{"type": "pointerMove", "x": round(left + width * across), "y": round(top + height * down)}]
        if until is not None:
            end = {"type": "pointerMove", "x": round(left + width * until), "y": round(top + height * down), "duration": 100}
            moves += [{"type": "pointerDown", "button": 0}, end, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves}
        self.send("POST", "/actions", {"actions": [mouse]})

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
