"""The headers by which `uv run examples/…` installs what a script needs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import EXAMPLES


ROOT = EXAMPLES.parent
SETUP = (ROOT / "setup.py").read_text()
EXTRAS = set(re.findall(r'^extras\["(\w+)"\]', SETUP, re.MULTILINE))


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_header_names_this_package_and_extras_that_it_has(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env python", "# /// script"]
    block = lines[2 : lines.index("# ///")]
    header: dict[str, Any] = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in block))
    (needed,) = header["dependencies"]
    named = re.fullmatch(r"hf_dynsparse(?:\[([\w,]+)\])?", needed)
    assert named
    assert set(filter(None, (named[1] or "").split(","))) <= EXTRAS
    assert f'python_requires="{header["requires-python"]}"' in SETUP
    source = header["tool"]["uv"]["sources"]["hf_dynsparse"]["path"]
    assert (script.parent / source).resolve() == ROOT.resolve()
