"""A real browser, headless, told what to do over its DevTools pipe: no port, no driver, no library.

The other end of the pipe is this process: when it ends, however it ends, the browser does too.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.kit.lab import LONG, eventually

BINARY: Final = "chromium"

FLAGS: Final = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--mute-audio",
    "--no-proxy-server", "--lang=en",
)  # fmt: skip

_NOISE: Final = ("EventSource", "Failed to load resource")
"""What the browser itself says of answers that are no success; the tests ask for some."""


def find_browser() -> str:
    """The path of Chromium; empty if there is none."""
    return shutil.which(BINARY) or ""


class Browser:
    """One process, any number of tabs, each with cookies and storage of its own."""

    def __init__(self, folder: Path) -> None:
        pipes = (*os.pipe(), *os.pipe())
        # Away from 3 and 4, which DevTools speaks on; a shell is the one thing that puts them there after the fork.
        commands, self._commands, self._answers, answers = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes
        )
        for end in pipes:
            os.close(end)
        # The kernel's user namespaces may be closed to root's browser, as in a container.
        flags = [*FLAGS, *(["--no-sandbox"] if os.getuid() == 0 else []), f"--user-data-dir={folder}"]
        script = f'exec "$0" "$@" 3<&{commands} 4>&{answers} {commands}<&- {answers}>&-'
        with (folder / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, find_browser(), *flags, "about:blank"],
                pass_fds=(commands, answers), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        threading.Thread(target=self._read, name="browser", daemon=True).start()

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer. Fails on an error, or when none comes."""
        number = next(self._numbers)
        box = self._waiting[number] = queue.SimpleQueue()
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = box.get(timeout=2 * LONG)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def page(self, width: int = 1280, height: int = 900, *, dark: bool = False, scale: float = 1) -> Page:
        """A new tab in a profile of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height, scale)
        page.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        return page

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self._answers, 1 << 20)
            except OSError:
                return
            if not data:
                return
            *messages, rest = (rest + data).split(b"\0")
            for raw in messages:
                message = json.loads(raw)
                if "id" in message:
                    self._waiting.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].heard(message["method"], message["params"])


class Page:
    """One tab. ``problems``: what went wrong in it, scripts and styles that its policy refused included."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def heard(self, method: str, parameters: dict[str, Any]) -> None:
        """Something has happened in the tab."""
        text = ""
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details["text"]
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            text = parameters["entry"]["text"]
        elif method == "Page.javascriptDialogOpening":
            text = f"a dialog: {parameters['message']}"
        if text and not text.startswith(_NOISE):
            self.problems.append(text)

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """The value of an expression in the tab; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, timeout: float = LONG) -> Any:
        """The first true value of an expression."""
        try:
            return eventually(lambda: self.run(expression), timeout)
        except AssertionError:
            raise AssertionError(f"{expression}: never\n{self.problems}\n{self.text()}") from None

    def text(self, selector: str = "body") -> str:
        """What a person reads there; empty while there is no such element."""
        found: str = self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return found

    def says(self, words: str, selector: str = "body") -> str:
        """Wait until it says so; returns all that it says then."""
        self.wait(f"(document.querySelector({json.dumps(selector)})?.innerText ?? '').includes({json.dumps(words)})")
        return self.text(selector)

    def click(self, selector: str, words: str = "") -> None:
        """With the mouse, on the first that fits and says these words, once it is there."""
        find = f"""(() => {{
            const all = [...document.querySelectorAll({json.dumps(selector)})];
            const found = all.find((item) => item.checkVisibility() && item.innerText.includes({json.dumps(words)}));
            found?.scrollIntoView({{block: "center"}});
            const box = found?.getBoundingClientRect();
            return box && [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.wait(find)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """A PNG of what is in view, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser that is gone afterwards."""
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()
