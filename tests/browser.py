"""Open pages in a real browser, headless Chromium, as wide as a desk's screen or a phone: measure them, take pictures.

    with Browser() as browser:
        page = browser.open(path, width=420)
        page.value("document.title")         # what an expression of JavaScript gives
        page.picture(target)                 # the whole page as PNG

The browser speaks the DevTools protocol over two pipes, one JSON message after the other with a zero byte behind each.
So nothing but the browser is needed: no driver, no port.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: the pages are ours, and root may not have one.
OPTIONS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage --no-first-run"
# Two frames after everything is loaded, plotly has drawn, too.
DRAWN = """new Promise(done => {
  const soon = () => requestAnimationFrame(() => requestAnimationFrame(() => done(true)))
  document.readyState == 'complete' ? soon() : addEventListener('load', soon) })"""


def find_browser() -> str | None:
    """Return the path of a Chromium, or None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A headless Chromium that runs between `with` and its end."""

    def __enter__(self) -> Browser:
        program = find_browser()
        assert program, "ask find_browser first"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._in, its_out = os.pipe()
        its_in, self._out = os.pipe()
        # Chromium reads from file 3 and writes to file 4, whatever numbers the pipes have here.
        start = f'exec "$0" {OPTIONS} --user-data-dir="$1" --remote-debugging-pipe 3<&{its_in} 4>&{its_out}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", start, program, self._profile.name],  # sh knows no files beyond 9
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._number, self._rest = 0, b""
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:  # events, which nothing here asks for
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        parts = [self._rest]
        while b"\0" not in parts[-1]:
            parts.append(os.read(self._in, 1 << 20))
            assert parts[-1], "the browser has ended"
        text, _, self._rest = b"".join(parts).partition(b"\0")
        return json.loads(text)

    def open(self, path: Path, width: int) -> Page:
        """Open a file in a new tab and wait until it is drawn; up to 600 pixels as a phone shows it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width <= 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=path.resolve().as_uri())
        page = Page(self, session)
        assert page.value(DRAWN)
        return page


class Page:
    """One page that is open and drawn."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def value(self, expression: str) -> Any:
        """Evaluate JavaScript in the page; a promise gives what it comes to."""
        given = self._browser.call(
            "Runtime.evaluate", self._session, expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in given, given["exceptionDetails"]
        return given["result"].get("value")

    def picture(self, target: Path) -> None:
        """Write the whole page as PNG, beyond what the window shows, too."""
        given = self._browser.call("Page.captureScreenshot", self._session, captureBeyondViewport=True)
        target.write_bytes(base64.b64decode(given["data"]))
