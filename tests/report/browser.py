"""Headless Chromium, driven through ChromeDriver's HTTP interface (W3C WebDriver) with the standard library alone."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the standard gives element references
_KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Space": "\ue00d"}
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--mute-audio",
)


def need() -> tuple[str, str]:
    """Paths of Chromium and its driver. Without them a test fails in CI and is skipped elsewhere."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        message = "no Chromium with ChromeDriver; Debian: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return browser, driver


class Browser:
    """One window. A context manager: leaving it ends browser and driver."""

    def __enter__(self) -> "Browser":
        browser, driver = need()
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            log = folder / "driver.log"
            process = subprocess.Popen([driver, "--port=0", f"--log-path={log}"], stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            port = next(
                line.rpartition("port ")[2].strip(" .\n") for line in process.stdout if "successfully on port" in line
            )
            self._url = f"http://127.0.0.1:{port}/session"
            options = {"binary": browser, "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wishes = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._call("POST", "", {"capabilities": {"alwaysMatch": wishes}})
            self._url += f"/{session['sessionId']}"
            stack.callback(self._call, "DELETE", "")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a page from the disk in a window of this size, px of CSS."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        self._call("POST", "/url", {"url": file.resolve().as_uri()})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that `script` returns; its arguments stand in `arguments`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """The first true value of `script`."""
        end_s = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end_s, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """A real click in the middle of the element, which must not be covered by another."""
        element = self._call("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]
        self._call("POST", f"/element/{element}/click", {})

    def press(self, *keys: str) -> None:
        """Keys one after the other, to whatever has the focus."""
        strokes = [{"type": kind, "value": _KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def errors(self) -> list[str]:
        """What the page complained of, refused requests included."""
        found = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, file: Path) -> None:
        import base64

        file.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].partition("\n")[0]) from None
