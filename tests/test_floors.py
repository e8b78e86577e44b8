"""The floors, enforced: a room imports from lower floors, and only the third-party packages of its row."""

import ast
import sys
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "hf_dynsparse"


class Place(NamedTuple):
    floor: int
    third_party: Set[str]


MODELS = {"torch", "transformers", "huggingface_hub", "safetensors"}
TRAINER = MODELS | {"accelerate", "datasets", "evaluate", "numpy"}

# Rooms: files of the root, and folders with all that is in them.
PLACES = {
    "face": Place(10, {"huggingface_hub", "safetensors", "hf_dynsparse_cli"}),  # public names and the command line
    "training/": Place(9, TRAINER | {"tqdm", "yaml"}),
    "hub/": Place(8, MODELS),
    "reports/": Place(7, MODELS | {"numpy", "matplotlib", "PIL", "fsspec"}),
    "checkpoints/": Place(6, MODELS | {"filelock"}),
    "topology/": Place(5, {"torch", "numpy"}),  # knows nothing of transformers
    "compress/": Place(5, {"torch", "transformers"}),
    "models/": Place(4, MODELS | {"peft"}),  # below topology: a loaded model is a plain model
    "optim/": Place(4, {"torch"}),
    "nn/": Place(3, {"torch"}),
    "ops/": Place(2, {"torch", "triton"}),
    "calibration/": Place(2, {"torch", "safetensors", "tqdm"}),
    "blocks/": Place(1, {"torch"}),
    "data/": Place(
        1, {"torch", "transformers", "datasets", "tokenizers", "numpy", "huggingface_hub", "tqdm", "sklearn", "scipy"}
    ),
    "_transformers.py": Place(0, {"transformers"}),  # the seam: all that is used of it below its top
    "files.py": Place(0, set()),
}
FACE = {"__init__.py", "__main__.py", "cli.py"}
LAZY = {"matplotlib", "PIL", "sklearn", "scipy"}  # optional: imported where used; the package works without them


def place_of(file: str) -> str | None:
    """The entry of `PLACES` that `file`, a path inside the package, falls under."""
    if file in FACE:
        return "face"
    if file in PLACES:
        return file
    folder = file.split("/")[0] + "/"
    return folder if "/" in file and folder in PLACES else None


def file_of(parts: list[str]) -> str:
    """Path of the module that `hf_dynsparse.<parts>` names, or of the one that defines this name."""
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.is_dir():
            return "/".join([*parts, "__init__.py"])
        if path.with_suffix(".py").is_file():
            return "/".join(parts) + ".py"
        parts = parts[:-1]
    return "__init__.py"


def imports_of(file: str, tree: ast.Module) -> list[tuple[int, bool, list[str]]]:
    """Every import, wherever it stands: line, whether at the top of the module, and the dotted name in parts."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, node in tree.body, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["hf_dynsparse", *file.split("/")][: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [(node.lineno, node in tree.body, [*base, alias.name]) for alias in node.names]
    return found


def violations(file: str, source: str) -> list[str]:
    """What `file` imports and must not."""
    place = PLACES[place_of(file)]
    problems = []
    for line, at_top, parts in imports_of(file, ast.parse(source)):
        where = f"{file}:{line} imports {'.'.join(parts)}"
        if parts[0] == "hf_dynsparse":
            entry = place_of(file_of(parts[1:]))
            if entry not in (None, place_of(file)) and PLACES[entry].floor >= place.floor:
                problems.append(f"{where}: {entry} is not below it")
        elif parts[0] not in place.third_party and parts[0] not in sys.stdlib_module_names:
            problems.append(f"{where}: its floor may import {sorted(place.third_party)} only")
        elif parts[0] == "transformers" and len(parts) > 2 and file != "_transformers.py":
            problems.append(f"{where}: what is below the top of transformers comes from _transformers.py")
        elif parts[0] in LAZY and at_top:
            problems.append(f"{where}: optional, so import it inside the function that needs it")
    return problems


def test_the_command_begins_with_the_standard_library_alone():
    source = PACKAGE.with_name("hf_dynsparse_cli.py").read_text(encoding="utf-8")
    modules = {parts[0] for _, _, parts in imports_of("../hf_dynsparse_cli.py", ast.parse(source))}
    assert modules <= set(sys.stdlib_module_names)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    assert place_of(file), (
        f"src/hf_dynsparse/{file} has no floor. Add it to PLACES in tests/test_floors.py, "
        "or put it into the room that its idea belongs to."
    )
    assert not violations(file, (PACKAGE / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("blocks/layout.py", "import numpy", "may import ['torch'] only"),
        ("blocks/layout.py", "def f():\n    from ..nn import sparsify_", "nn/ is not below it"),
        ("ops/tiled.py", "from .. import nn", "nn/ is not below it"),
        ("ops/tiled.py", "from hf_dynsparse import __version__", "face is not below it"),
        ("models/bert/new.py", "from ...topology.scores import l1", "topology/ is not below it"),
        ("compress/new.py", "from ..topology.scores import l1", "topology/ is not below it"),
        ("models/new.py", "from transformers.utils import CONFIG_NAME", "comes from _transformers.py"),
        ("data/new.py", "import hf_dynsparse.models.bert", "models/ is not below it"),
        ("reports/pictures/runs.py", "import matplotlib.pyplot", "inside the function"),
    ],
)
def test_violation_is_seen(file, source, problem):
    (found,) = violations(file, source)
    assert problem in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn/linear.py", "import math, torch.nn\nfrom ..blocks.layout import BlockLayout\nfrom .. import ops"),
        ("reports/pictures/runs.py", "def f():\n    import matplotlib.pyplot as plt\n    import numpy"),
        (
            "models/bert/new.py",
            "from ...nn import sparsify_\nfrom .. import bert\nfrom transformers import BertConfig",
        ),
        ("topology/new.py", "from . import scores\nfrom ..nn import sparse_layers"),
        ("__init__.py", "from .training.trainer import DynSparseTrainer"),
    ],
)
def test_allowed_imports_pass(file, source):
    assert violations(file, source) == []


def test_unlisted_file_has_no_place():
    assert place_of("new.py") is None
    assert place_of("new/scores.py") is None
