"""
The core suite with the oldest and the newest transformers and torch, on the oldest and the newest Python.

    python tests/matrix.py                          # every cell, then docs/compatibility.md; skips cells that are done
    python tests/matrix.py --only 3.11/2.13/newest  # Python/torch/transformers; may be given several times
    python tests/matrix.py --list                   # the cells, what has been run, nothing else

Each cell gets a virtual environment and a copy of the working tree in a temporary folder, and the packages of
`constraints.txt` but torch and transformers. Only CPU builds of torch are installed unless `--cuda` is given: on Linux
they are the versions that end in `+cpu`, which PyTorch's own index has (PIP_EXTRA_INDEX_URL). What was run is kept in
`build/matrix`, one file a cell, and run again with `--again`.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "compatibility.md"

PYTHONS = ("3.11", "3.13")
TORCHES = ("2.13", "newest")
TRANSFORMERS = {"5.23": "transformers==5.23.*", "newest": "transformers>=5.23,<6"}
CELLS = [f"{python}/{torch}/{hub}" for python in PYTHONS for torch in TORCHES for hub in TRANSFORMERS]

# The core suite: the package itself, without examples, benchmarks and what takes more than ten seconds.
CORE = ["--ignore=tests/examples", "--ignore=tests/test_benchmarks.py", "-m", "not slow"]

HEADER = """\
# Compatibility

Written by `make matrix` (`tests/matrix.py`): the core suite, that is all tests but those of the examples, of the
benchmarks and those marked `slow`, each cell in a fresh environment with the other packages as in `constraints.txt`.

| Python | torch | transformers | passed | failed | skipped | minutes |
|---|---|---|---|---|---|---|
"""


class CellFailure(Exception):
    """Why a cell cannot be run."""


def run(*command: str | Path, cwd: Path | None = None, timeout: float = 1800) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise CellFailure(f"{' '.join(map(str, command[1:5]))} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def find_python(version: str) -> str:
    """An interpreter of that minor version: on the path, or one of pyenv's or uv's."""
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    if shutil.which("uv"):
        found += subprocess.run(["uv", "python", "find", version], capture_output=True, text=True).stdout.split()
    for candidate in map(str, filter(None, found)):
        told = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        if told.returncode == 0 and told.stdout.startswith(f"Python {version}."):
            return candidate
    raise CellFailure("this Python is not installed here")


def choose_torch(pip: list[str | Path], wanted: str, cuda: bool) -> str:
    """The newest build of torch in the column `wanted`, with its local label."""
    found = re.search(r"Available versions: (.*)", run(*pip, "index", "versions", "torch"))
    versions = found[1].split(", ") if found else []
    if not cuda and sys.platform == "linux":
        versions = [version for version in versions if version.endswith("+cpu")]
    base = re.compile(rf"{re.escape(TORCHES[0])}\.")
    fitting = [version for version in versions if bool(base.match(version)) == (wanted == TORCHES[0])]
    if wanted != TORCHES[0] and versions and base.match(versions[0]):
        fitting = []  # what is left is older
    if not fitting:
        newer = "none newer" if wanted != TORCHES[0] else "not"
        raise CellFailure(f"{newer} installable without CUDA" if not cuda else f"{newer} installable")
    return fitting[0]


def copy_tree(target: Path) -> None:
    """The files of the working tree that git knows or would add."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_cell(cell: str, cuda: bool, tests: list[str], minutes: float) -> dict[str, Any]:
    """Install and test one cell; what came out, or `error`."""
    python, torch, hub = cell.split("/")
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        place, tree = Path(folder), Path(folder) / "tree"
        run(find_python(python), "-m", "venv", place / "venv")
        binary = place / "venv" / "bin" / "python"
        pip = [binary, "-m", "pip", "--disable-pip-version-check"]
        run(*pip, "install", "--quiet", "--upgrade", "pip")
        build = choose_torch(pip, torch, cuda)
        copy_tree(tree)
        free = re.compile(r"(torch|triton|transformers|setuptools)==")
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        (place / "constraints.txt").write_text("\n".join(line for line in pinned if not free.match(line)))
        install = [*pip, "install", "--quiet", "--constraint", place / "constraints.txt"]
        run(*install, f"torch=={build}")
        run(*install, f"torch=={build}", TRANSFORMERS[hub], f"{tree}[test]")
        begin = time.monotonic()
        report = place / "report.xml"
        command = [binary, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", *CORE, *tests]
        try:
            log = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60 * minutes).stdout
        except subprocess.TimeoutExpired:
            raise CellFailure(f"not done after {minutes:g} minutes") from None
        if not report.exists():
            raise CellFailure(f"pytest did not run: {log.strip()[-2000:]}")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
        counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        names = "platform.python_version(), version('torch'), version('transformers')"
        told = run(binary, "-c", f"import platform; from importlib.metadata import version; print({names})")
        return {
            "versions": re.findall(r"[\w.+]+", told),
            "failed": failed,
            "skipped": counts["skipped"],
            "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "reasons": sorted({case.get("message") or "" for case in suite.iter("skipped")}),
        }


def write_table(results: dict[str, dict[str, Any]]) -> None:
    """`docs/compatibility.md` from all that has been run."""
    lines, notes = [], []
    for cell in CELLS:
        result = results.get(cell, {"error": "not run"})
        if "error" in result:
            lines.append(f"| {' | '.join(cell.split('/'))} | {result['error'].splitlines()[0]} | | | |")
            continue
        counts = f"{result['passed']} | {len(result['failed'])} | {result['skipped']} | {result['minutes']}"
        lines.append(f"| {' | '.join(result['versions'])} | {counts} |")
        notes += [f"- {cell}: `{name}` failed" for name in result["failed"]]
        notes += [f"- {cell}: skipped: {reason}" for reason in result["reasons"]]
    text = HEADER + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
    TABLE.write_text(f"{text}\n{platform.system()}, {platform.machine()}.\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the core suite over versions of Python, torch and transformers.")
    parser.add_argument("--only", action="append", choices=CELLS, metavar="CELL", help="Python/torch/transformers")
    parser.add_argument("--list", action="store_true", help="say what the cells are and what was run")
    parser.add_argument("--again", action="store_true", help="run cells that are done, too")
    parser.add_argument("--cuda", action="store_true", help="install CUDA builds of torch too: gigabytes")
    parser.add_argument("--minutes", type=float, default=60, help="limit for the tests of a cell")
    parser.add_argument("tests", nargs="*", help="flags and paths for pytest after `--`: a trial, which is not kept")
    chosen = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    files = {cell: RESULTS / f"{cell.replace('/', '_')}.json" for cell in CELLS}
    results = {cell: json.loads(file.read_text()) for cell, file in files.items() if file.exists()}
    for cell in CELLS if chosen.list else chosen.only or CELLS:
        if not chosen.list and (cell not in results or chosen.again or chosen.tests):
            print(f"{cell} …", flush=True)
            try:
                results[cell] = run_cell(cell, chosen.cuda, chosen.tests, chosen.minutes)
            except (CellFailure, subprocess.TimeoutExpired) as error:
                results[cell] = {"error": str(error)}
            if not chosen.tests:
                files[cell].write_text(json.dumps(results[cell], indent=2))
        print(f"{cell}: {json.dumps(results.get(cell, 'not run'))}", flush=True)
    if not chosen.list and not chosen.tests:
        write_table(results)
    sys.exit(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    main()
