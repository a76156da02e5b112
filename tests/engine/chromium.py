"""A real headless browser, driven over a pipe by Chromium's DevTools protocol, with nothing installed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LONGEST = 120.0  # seconds that any answer may take
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
    *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe", "--no-default-browser-check"),
)


def found() -> str | None:
    """Where a browser is; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One process with one page. What its page complains of and asks the network for is written down."""

    def __init__(self, profile: Path) -> None:
        path = found()
        assert path is not None, "there is no browser"
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        # The browser reads file descriptor 3 and writes 4; the shell puts ours there.
        words = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        high = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 20) for pipe in (theirs_in, theirs_out)]
        line = f'exec 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-; exec "$0" "$@"'
        self.log = (profile.parent / f"{profile.name}.log").open("wb")
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", line, *words],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        for pipe in (theirs_in, theirs_out, *high):
            os.close(pipe)
        self.number, self.rest, self.session = 0, b"", ""
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.loaded = 0

    def __enter__(self) -> "Browser":
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and all its processes."""
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            pass
        self.process.wait(30)
        for pipe in (self.out, self.into):
            os.close(pipe)
        self.log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        number = self.number
        while True:
            told = self.hear(method)
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def hear(self, what: str) -> dict[str, Any]:
        """The next message; events are written down."""
        end = time.monotonic() + LONGEST
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0, end - time.monotonic()))
            assert ready, f"the browser did not answer {what} within {LONGEST:.0f} s"
            block = os.read(self.into, 2**16)
            assert block, f"the browser ended during {what}, code {self.process.poll()}"
            self.rest += block
        line, _, self.rest = self.rest.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        method, values = told.get("method", ""), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"])[:2000])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append("console: " + json.dumps(values["args"])[:2000])
        elif method == "Log.entryAdded":
            self.errors.append(f"{values['entry']['level']}: {values['entry']['text']}")
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {values['message']}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded += 1
        return told

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there."""
        self.errors, self.asked, before = [], [], self.loaded
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.loaded == before:
            self.hear("loading the page")

    def value(self, script: str) -> Any:
        """What JavaScript gives in the page, after it has drawn two frames."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        told = self.call(
            "Runtime.evaluate",
            expression=f"{frames}.then(() => ({script}))",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def elsewhere(self) -> list[str]:
        """What was asked for besides the page itself and what is in it."""
        return [url for url in self.asked if not url.startswith(("data:", "file:"))] + [
            url for url in self.asked if url.startswith("file:")
        ][1:]

    def size(self, width: int, height: int, fine: float = 1, dark: bool = False) -> None:
        """The window, and whether the reader likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=fine,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, kind: str, x: float, y: float, clicks: int = 1, held: bool = False) -> None:
        """A move, press or release of the mouse."""
        button = "none" if kind == "mouseMoved" and not held else "left"
        pressed = int(held or kind == "mousePressed")
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=pressed, clickCount=clicks
        )

    def drag(self, x: float, to: float, y: float) -> None:
        """Press, move, let go."""
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseMoved", (x + to) / 2, y, held=True)
        self.mouse("mouseMoved", to, y, held=True)
        self.mouse("mouseReleased", to, y)

    def key(self, name: str) -> None:
        """A key that is pressed and let go; of letters and signs, what it writes."""
        text = {"text": name} if len(name) == 1 else {}
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Home": 36, "End": 35}
        code = codes.get(name, ord(name[0]))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def picture(self, path: Path, whole: bool = True) -> Path:
        """What the page looks like: all of it, or what the window shows."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))
        return path


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with Browser(folder / "profile") as running:
        yield running
