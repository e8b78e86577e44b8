"""`write_page`: one HTML file that shows runs side by side, and needs nothing besides a browser."""

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..facts import PLATEAU
from .collect import collect_run


logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAP_BYTES = 2_000_000  # of all block maps of a page


def write_page(folders: Sequence[str | Path], output: str | Path, texts: Sequence[str] | None = None) -> None:
    """
    Write the page of one or several runs.

    Args:
        folders (`Sequence[str | Path]`): output folders of runs, finished or not; or saved models.
        output (`str` or `Path`): the HTML file.
        texts (`Sequence[str]`, *optional*): with `[MASK]`, to be filled by the models; by default a few.

    Raises:
        ValueError: if a folder holds nothing of a run, is named twice, or has a damaged file.

    Example:
        ```python
        >>> write_page(["runs/static", "runs/dynamic"], "report.html")
        ```
    """
    _write(_collect(folders, texts, {}), output)


def watch_page(
    folders: Sequence[str | Path],
    output: str | Path,
    seconds: float,
    texts: Sequence[str] | None = None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """
    Write the page again every so many seconds, and have an open one load itself again, until all runs are finished or
    the process is interrupted.

    Args:
        seconds (`float`): between two pages.
        written (`Callable`): called when the first page is there.

    Raises:
        ValueError: as `write_page`, of the first page. Later, a file that is just being replaced is read again.
    """
    finished: dict[Path, dict[str, Any]] = {}
    runs = _collect(folders, texts, finished)
    try:
        _write(runs, output, seconds)
        written()
        while not all(run["finished"] for run in runs):
            time.sleep(seconds)
            try:
                runs = _collect(folders, texts, finished)
            except (OSError, ValueError) as error:  # of a checkpoint that the run has just removed
                logger.warning("The page stays as it is until the next time: %s", error)
                continue
            _write(runs, output, seconds)
    except KeyboardInterrupt:
        pass
    _write(runs, output)  # for good: it loads no more


def names_of(folders: Sequence[Path]) -> list[str]:
    """As much of the ends of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        again = next(folder for folder, path in zip(folders, parts, strict=True) if parts.count(path) > 1)
        raise ValueError(f"A page shows each run once. Got {again} twice. Name it once.")
    depth = next(depth for depth in range(1, 1000) if len({path[-depth:] for path in parts}) == len(parts))
    return ["/".join(path[-depth:]) for path in parts]


def _collect(
    folders: Sequence[str | Path], texts: Sequence[str] | None, finished: dict[Path, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of all runs; those that are `finished` are read once."""
    paths = [Path(folder) for folder in folders]
    runs = []
    for path, name in zip(paths, names_of(paths), strict=True):
        run = finished.get(path) or collect_run(path, name, MAP_BYTES // len(paths), texts)
        if run["finished"]:
            finished[path] = run
        runs.append(run)
    return runs


def _write(runs: Sequence[dict[str, Any]], output: str | Path, reload: float | None = None) -> None:
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    data = json.dumps({"runs": runs, "plateau": PLATEAU, "reload": reload, "made": made}, separators=(",", ":"))
    parts = {
        "TITLE": escape(", ".join(run["name"] for run in runs)),
        "STYLE": (HERE / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": "".join((HERE / name).read_text(encoding="utf-8") for name in ("charts.js", "maps.js", "page.js")),
        "DATA": data.replace("<", "\\u003c"),  # no text in it can end the element that holds it
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    write_atomically(output, re.sub("@(TITLE|STYLE|SCRIPT|DATA)@", lambda found: parts[found[1]], page))
