"""A headless Chromium, spoken to over the DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from base64 import b64decode
from contextlib import contextmanager
from itertools import count

import httpx
from websockets.sync.client import connect

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_browser(profile):
    """Start one with its profile in an empty folder, and end it."""
    command = [BINARY, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-sandbox"]
    command += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _poll(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        pages = f"http://127.0.0.1:{port}/json"
        page = _poll(lambda: next(one for one in httpx.get(pages).json() if one["type"] == "page"))
        with connect(page["webSocketDebuggerUrl"], max_size=None, open_timeout=30) as socket:
            yield Browser(socket)
    finally:
        process.kill()
        process.wait()


class Browser:
    """One page; what the browser logs of it, as errors of scripts and of the network, is kept in `logged`."""

    def __init__(self, socket):
        self._socket, self._numbers, self.logged = socket, count(1), []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=30))
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.logged.append(told["params"])

    def run(self, script):
        """Return the value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def wait(self, script, seconds=15):
        """Wait until an expression is true in the page."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < until, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, name, text):
        """Put a text into the field of an id."""
        self.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(str(text))}")

    def screenshot(self):
        """Return the whole page as PNG."""
        return b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


def _poll(get):
    """Return what `get` does as soon as it can."""
    for _ in range(300):
        try:
            return get()
        except (OSError, IndexError, StopIteration, httpx.TransportError):
            time.sleep(0.1)
    raise AssertionError("Chromium does not come up")
