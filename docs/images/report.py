"""docs/images/report.png, report-sees.png and runs.png: what the report of a real run looks like, photographed in a headless Chromium.

    ssl-locat report runs && PYTHONPATH=tests python docs/images/report.py runs quickstart docs/images
"""

import base64
import io
import sys
from pathlib import Path

from browser import Browser, open_browser
from PIL import Image


def picture(browser: Browser, path: Path, top: str, height: int, width: int = 1280) -> None:
    """From the element `top` downwards."""
    browser.resize(width, height)
    browser.run(f"document.querySelector({top!r}).scrollIntoView({{behavior: 'instant'}})")
    browser.run("return new Promise(done => setTimeout(done, 500))")
    shot = Image.open(io.BytesIO(base64.b64decode(browser.cdp("Page.captureScreenshot", format="png")["data"])))
    shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)  # a third of the bytes


def main(runs: str, name: str, out: str) -> None:
    with open_browser() as browser:
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        browser.resize(1280, 1200)
        browser.open(Path(runs, name, "report.html").resolve().as_uri())
        browser.point(".chart .u-over", 0.6)
        picture(browser, Path(out, "report.png"), "h1", 1250)
        picture(browser, Path(out, "report-sees.png"), "#classes", 1500)
        browser.open(Path(runs, "report.html").resolve().as_uri())
        picture(browser, Path(out, "runs.png"), "h1", 260)


if __name__ == "__main__":
    main(*sys.argv[1:])
