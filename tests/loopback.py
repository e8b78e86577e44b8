"""A Hub on 127.0.0.1, in a process of its own, and scripts that run against it: `hub_server/` has the server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parent
USERS = ("tester:hf_write:write", "tester:hf_read:read", "other:hf_other:write")


@dataclass
class LoopbackHub:
    """
    Args:
        url (`str`): its endpoint; `huggingface_hub` reads that when it is imported, hence the scripts.
        folder (`Path`): for the server's store and the scripts' caches.
    """

    url: str
    folder: Path

    def run(self, script: str, *arguments: str, home: str, xet: bool = False) -> Any:
        """What `tests/<script>` reports, run with the cache `home`."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / home),
            "HF_TOKEN": "hf_write",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
        }
        return run_script(script, *arguments, **environment)


def run_script(script: str, *arguments: str, **environment: str) -> Any:
    """What `tests/<script>` writes as JSON into the file that is its first argument."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    report = Path(environment["HF_HOME"]).with_suffix(".json")
    done = subprocess.run(
        [sys.executable, str(TESTS / script), str(report), *arguments],
        env={**kept, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@contextmanager
def loopback_hub(folder: Path) -> Iterator[LoopbackHub]:
    """Start the server, and stop it."""
    folder.mkdir(parents=True, exist_ok=True)
    url_file = folder / "url"
    users = [part for user in USERS for part in ("--user", user)]
    server = subprocess.Popen(
        [
            *(sys.executable, str(TESTS / "hub_server" / "hub_server.py")),
            *("--root", str(folder / "store"), "--url-file", str(url_file), *users),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not url_file.exists() and server.poll() is None:
            time.sleep(0.02)
        yield LoopbackHub(url_file.read_text(), folder)
    finally:
        server.terminate()
        server.wait()
