"""A headless Chromium, driven over two pipes (the DevTools protocol), for tests of pages: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class Browser:
    """One page. profile: a folder for what the browser writes."""

    def __init__(self, profile: Path, width: int = 1400, height: int = 900) -> None:
        read, mine = os.pipe()
        theirs, write = os.pipe()
        # The browser reads commands from descriptor 3 and writes to 4.
        command = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # Pages within the page belong to the same process, so that they can be asked as well.
        flags += ["--disable-features=IsolateSandboxedIframes", "--disable-site-isolation-trials"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *flags, f"--window-size={width},{height}", "about:blank"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self._commands, self._answers, self._count, self._session = os.fdopen(mine, "wb"), theirs, 0, ""
        self._left = b""
        (target,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer, _, self._left = self._left.partition(b"\0") if b"\0" in self._left else (b"", b"", self._left)
            if not answer:
                read = os.read(self._answers, 1 << 20)
                assert read, "the browser has ended"
                self._left += read
                continue
            content = json.loads(answer)
            if content.get("id") == self._count:
                assert "error" not in content, content
                return content["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Its value, once that is true."""
        end = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"{expression}: never true. The page:\n{self.ask('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def says(self, *texts: str) -> None:
        """Wait until the page shows all of these texts."""
        for text in texts:
            self.wait(f"document.body.innerText.includes({json.dumps(text)})")

    def click(self, text: str) -> None:
        """With the mouse, on the first link, button, tab or entry of a list with that text."""
        every = "[...document.querySelectorAll('a, button, summary, [role=tab], [role=treeitem], li')]"
        found = f"{every}.find(e => e.innerText.trim() === {json.dumps(text)})"
        self.wait(f"!!{found}")
        self.ask(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y = self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def frame_says(self, text: str, seconds: float = 60) -> None:
        """Wait until the first page within the page shows this text."""
        end = time.monotonic() + seconds
        while text not in (said := self._frame()):
            assert time.monotonic() < end, f"the inner page says {said!r}"
            time.sleep(0.1)

    def _frame(self) -> str:
        found = self.call("Page.getFrameTree")["frameTree"].get("childFrames", [])
        if not found:
            return ""
        world = self.call("Page.createIsolatedWorld", frameId=found[0]["frame"]["id"])["executionContextId"]
        asked = {"expression": "document.body.innerText", "returnByValue": True, "contextId": world}
        return str(self.call("Runtime.evaluate", **asked)["result"].get("value"))

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._commands.close()
        os.close(self._answers)
