"""What a wheel and a source archive hold: with a compiler, and without."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_dynsparse.ops import int8, native


ROOT = Path(__file__).parents[1]

# Writes an empty file where a compiler or linker would write its result, and says so.
STAND_IN = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2" && echo "wrote $2"; fi
    shift
done
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins for a compiler are shell scripts")


def copy_tree(to: Path) -> Path:
    """What the archives are made of, libraries built in place included: those belong into none."""
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", "build", "dist", ".*")
    return shutil.copytree(ROOT, to, ignore=lambda folder, names: ignored(folder, names) | _others(folder, names))


def _others(folder: str, names: list[str]) -> set[str]:
    wanted = (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "csrc",
        "src",
        "tests",
        "examples",
        "docs",
    )
    return set(names).difference(wanted) if Path(folder) == ROOT else set()


def build(tree: Path, compiler: str, *commands: str) -> str:
    """Run `setup.py` with `compiler` as all of them; what it printed."""
    tools = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), compiler)
    done = subprocess.run(
        [sys.executable, "setup.py", *commands],
        cwd=tree,
        env={**os.environ, **tools},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def the_wheel(tree: Path) -> tuple[str, list[str]]:
    """Name and files of the only wheel that was built."""
    (wheel,) = tree.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, archive.namelist()


def test_without_a_compiler_the_wheel_has_no_libraries_and_the_archive_all_sources(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    printed = build(tree, "false", "sdist", "bdist_wheel")
    assert 'building extension "hf_dynsparse.ops._native_portable" failed' in printed
    _, files = the_wheel(tree)
    page = {f"hf_dynsparse/reports/page/{name}" for name in ("page.html", "page.js", "style.css")}
    assert {"hf_dynsparse/ops/native.py", "hf_dynsparse_cli.py", *page} <= set(files)
    # `hf-dynsparse train` finds in the package what a checkout has beside it.
    examples = {path.relative_to(tree).as_posix() for path in (tree / "examples").rglob("*.*")}
    assert {"examples/run_mlm_dynsparse.py", "examples/study/report.html", "examples/accelerate/cpu.yaml"} <= examples
    assert examples == {file.removeprefix("hf_dynsparse/") for file in files if "/examples/" in file}
    assert [file for file in files if file.endswith((".so", ".cpp", ".hpp"))] == []
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as sources:
        packed = {name.partition("/")[2] for name in sources.getnames()}
    needed = {
        path.relative_to(tree).as_posix()
        for folder, pattern in (("csrc", "*.[ch]pp"), ("src", "*.py"), ("tests", "*.py"), ("docs", "*.*"))
        for path in (tree / folder).rglob(pattern)
    } | examples
    assert (
        {"docs/images/pareto.png", "csrc/block_sparse.cpp", "csrc/vectors.hpp", "tests/helpers.py"} <= needed <= packed
    )
    assert {f"src/{file}" for file in page} <= packed
    assert [name for name in packed if name.endswith(".so")] == []


def test_with_a_compiler_the_wheel_has_a_library_per_instruction_set_and_serves_every_python(tmp_path: Path) -> None:
    stand_in = tmp_path / "compiler"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    tree = copy_tree(tmp_path / "tree")
    for library in tree.rglob("*.so"):
        library.unlink()
    printed = build(tree, str(stand_in), "bdist_wheel")
    name, files = the_wheel(tree)
    assert name.split("-")[2:4] == ["py3", "none"]
    assert not name.endswith("-any.whl")
    libraries = {
        f"hf_dynsparse/ops/_{name}_{variant}.so"
        for name, module in {"native": native, "native_int8": int8}.items()
        for variant in (module.VARIANTS.values() if platform.machine() in ("x86_64", "AMD64") else ["portable"])
    }
    assert {file for file in files if file.endswith(".so")} == libraries
    objects = [line for line in printed.splitlines() if line.startswith("wrote ") and line.endswith(".o")]
    assert len(set(objects)) == len(objects) == len(libraries)  # sources are shared, but each has an object of its own
