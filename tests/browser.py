"""A Chromium without a window, by its debugging protocol over two pipes: JSON, and a zero byte after each message."""

import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest


class Page:
    """
    An empty page.

    Args:
        complaints (`list[str]`): what a console would show: errors, warnings, what a policy forbids.
    """

    def __init__(self, to_browser: BinaryIO, from_browser: BinaryIO) -> None:
        self.complaints: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._session: dict[str, str] = {}
        self._number = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of the promise that is the value of a script."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in `profile`; the test is skipped where there is no Chromium."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    program = next(found, None) or pytest.skip("no Chromium on the PATH")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    (reads, we_write), (we_read, writes) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]  # out of the way of 3 and 4
    process = subprocess.Popen(
        [program, *flags],
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=lambda: [os.dup2(end, number) for end, number in zip(theirs, (3, 4), strict=True)],
    )
    for end in (reads, writes, *theirs):
        os.close(end)
    timer = threading.Timer(60, process.kill)  # a browser that hangs answers no more, and ends the reading
    timer.start()
    try:
        with open(we_write, "wb", buffering=0) as to_browser, open(we_read, "rb") as from_browser:
            yield Page(to_browser, from_browser)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
