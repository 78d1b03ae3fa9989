"""Chromium over the WebDriver protocol, as chromedriver speaks it: W3C WebDriver, and the DevTools behind it."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.system.conftest import UP_SECONDS, eventually
from tests.system.processes import free_address

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, TAB, LEFT = "\ue007", "\ue004", "\ue012"


def is_here() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One window. `close` ends it."""

    def __init__(self, profile: Path) -> None:
        address = free_address()
        port = address.rpartition(":")[2]
        self._driver = subprocess.Popen(["chromedriver", f"--port={port}", f"--log-path={profile}.log"])
        self._base = f"http://{address}"
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            eventually(self._is_up)
            # Where Chromium is slow to start, another session would find the profile in use.
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}}, UP_SECONDS)
        except BaseException:
            self._driver.terminate()
            raise
        self._base += f"/session/{made['sessionId']}"

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(10)

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    @property
    def url(self) -> str:
        return self._call("GET", "/url")

    def run(self, script: str, *arguments):
        """The value that `script` returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, css: str = "body") -> str:
        """What a person reads there; "" where there is no such element."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def click(self, css: str) -> None:
        self._call("POST", f"/element/{self._find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._call("POST", f"/element/{self._find(css)}/value", {"text": text})

    def choose(self, css: str, value: str) -> None:
        self.run("const e = document.querySelector(arguments[0]); e.value = arguments[1]", css, value)

    def press(self, *keys: str) -> None:
        downs_and_ups = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": downs_and_ups}]})

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """The size of the window, and which of light and dark the person prefers."""
        phone = width < 500
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme, still])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the browser has written to its console since the last call, such as violated policies."""
        return [line["message"] for line in self._call("POST", "/se/log", {"type": "browser"})]

    def tab(self) -> str:
        """The one that is shown, for `show`."""
        return self._call("GET", "/window")

    def new_tab(self) -> str:
        return self._call("POST", "/window/new", {"type": "tab"})["handle"]

    def show(self, tab: str) -> None:
        self._call("POST", "/window", {"handle": tab})

    def close_tab(self) -> None:
        self._call("DELETE", "/window")

    def wait(self, condition, seconds: float = 60.0) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, f"not within {seconds} s; the page says:\n{self.text()}"
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return self._call("GET", "/status")["ready"]
        except OSError:
            return False

    def _find(self, css: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": css})[_ELEMENT]

    def _devtools(self, command: str, **parameters) -> None:
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body=None, seconds: float = 60.0):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None
