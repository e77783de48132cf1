"""A headless Chromium, driven through its own debugging pipe (DevTools protocol, JSON and a zero
byte a message): no server, no driver, no package."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

_COMMAND = (
    "chromium",
    "--headless",
    "--no-sandbox",  # as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
    # A network that is off: no proxy answers there, and names are not resolved.
    "--proxy-server=127.0.0.1:9",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
_DEADLINE_SECONDS = 300


def is_missing() -> str:
    """Why no browser can be started here, or ""."""
    return "" if shutil.which("chromium") else "chromium is not installed"


class Chromium:
    """One browser with one page; `requests`, `errors` hold what the page asked for and said."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        self._stderr = profile / "stderr.txt"
        # The browser reads from descriptor 3 and writes to 4, which may be taken here.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (to_browser, from_browser)]
        wired = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                ["bash", "-c", wired, "bash", *_COMMAND, f"--user-data-dir={profile}"],
                pass_fds=ends,
                stderr=stderr,
                start_new_session=True,
            )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._ask(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def open(self, path: Path, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Opens a file as a person would, and waits until its script has read its data."""
        self.requests.clear()
        self.errors.clear()
        self.set_scheme(dark=dark)
        self.resize(width, height)
        self._ask("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("document.body && 'ready' in document.body.dataset")

    def set_scheme(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._ask("Emulation.setDeviceMetricsOverride", **metrics)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, or the promise that it gives, comes to."""
        answer = self._ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + _DEADLINE_SECONDS
        while not self.value(expression):
            if time.monotonic() > end:
                raise AssertionError(f"never came true: {expression}; errors: {self.errors}")
            time.sleep(0.02)

    def screenshot(self) -> bytes:
        """A PNG of what is in the window, once it is painted."""
        frames = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
        self.value(f"{frames}.then(() => 0)")
        shot = self._ask("Page.captureScreenshot")
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        """Ends the browser with all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=_DEADLINE_SECONDS)
        os.close(self._in)
        os.close(self._out)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message(method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._take_event(answer)

    def _next_message(self, method: str) -> dict[str, Any]:
        end = time.monotonic() + _DEADLINE_SECONDS
        while b"\0" not in self._buffer:
            left = max(end - time.monotonic(), 0)
            if not select.select([self._in], [], [], left)[0]:
                raise AssertionError(f"the browser did not answer {method} in time")
            content = os.read(self._in, 1 << 20)
            if not content:
                stderr = self._stderr.read_text(errors="replace")[-1000:]
                raise AssertionError(f"the browser has ended: {stderr}")
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _take_event(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(str(parameters["args"]))
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(str(parameters["entry"]))
