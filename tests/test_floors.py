"""The floors, enforced: a module imports from its own floor or lower, and only that floor's third-party packages."""

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
    never: Set[str] = frozenset()  # parts of the package that lie on an allowed floor, but not for this one


MODELS = {"torch", "transformers", "huggingface_hub", "safetensors"}
DATA = {"torch", "transformers", "datasets", "tokenizers", "numpy", "huggingface_hub", "tqdm"}
SCORES = {"sklearn", "scipy"}
TRAINER = {"torch", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy"}

# A file, or a folder with all that is in it unless a file of it is named as well.
PLACES = {
    "layout.py": Place(0, {"torch"}),
    "spreading.py": Place(0, {"torch"}),
    "distributions.py": Place(0, {"torch"}),
    "threads.py": Place(0, {"torch"}),
    "memory.py": Place(0, set()),
    "files.py": Place(0, set()),
    "run_lock.py": Place(0, {"filelock"}),
    "json_files.py": Place(0, set()),
    "topology_frames.py": Place(0, {"numpy"}),
    "ops/": Place(0, {"torch"}),
    "ops/triton.py": Place(0, {"torch", "triton"}),
    "ops/triton_kernels.py": Place(0, {"torch", "triton"}),
    "nn.py": Place(1, {"torch"}),
    "optim.py": Place(1, {"torch"}),
    "block_adam.py": Place(1, {"torch"}),
    "shards.py": Place(1, {"torch"}),
    "losses.py": Place(1, {"torch"}),
    "distillation.py": Place(1, {"torch"}),
    "topology/": Place(2, {"torch"}),
    "learning_rate.py": Place(2, set()),
    "body.py": Place(3, {"torch", "transformers"}),
    "flops.py": Place(3, {"torch", "transformers"}),
    "layer_tables.py": Place(3, {"torch", "transformers"}),
    "integrity.py": Place(3, MODELS),
    "completeness.py": Place(3, {"torch", "transformers"}),
    "peft.py": Place(3, {"torch", "transformers", "peft"}),
    "quantizer.py": Place(3, {"torch", "transformers"}, never={"topology/"}),
    "seeded_dropout.py": Place(3, {"torch", "transformers"}),
    "int8/": Place(3, {"torch", "transformers"}, never={"topology/"}),
    "early_bird/": Place(3, {"torch", "transformers"}, never={"topology/"}),
    "early_bird/callback.py": Place(4, TRAINER),
    "early_bird/__init__.py": Place(4, set()),
    "slimming.py": Place(3, {"torch", "transformers"}, never={"topology/"}),
    "models/": Place(3, MODELS, never={"topology/"}),  # a loaded model is a plain model
    "data/": Place(3, DATA, never={"topology/", "models/"}),
    "data/glue.py": Place(3, DATA | SCORES, never={"topology/", "models/"}),
    "remote_code/": Place(3, MODELS, never={"topology/"}),
    "hub/": Place(4, TRAINER),
    "trainer.py": Place(4, TRAINER),
    "finetuning.py": Place(4, TRAINER | {"evaluate"}),
    "arguments.py": Place(4, TRAINER),
    "callback.py": Place(4, TRAINER),
    "kernel_callback.py": Place(4, TRAINER),
    "run_callbacks.py": Place(4, TRAINER),
    "fsdp.py": Place(4, TRAINER),
    "checkpoint.py": Place(4, TRAINER),
    "resizing.py": Place(4, TRAINER),
    "safeguards.py": Place(4, TRAINER),
    "scripts.py": Place(4, TRAINER | {"datasets"}),
    "summary.py": Place(4, TRAINER),
    "topology_history.py": Place(4, TRAINER),
    "model_card.py": Place(4, TRAINER),
    "readme.py": Place(3, MODELS),
    "saved_model.py": Place(3, MODELS),
    "estimate.py": Place(4, TRAINER),
    "export.py": Place(4, TRAINER),
    "inspection.py": Place(4, TRAINER | {"fsspec"}),
    "plots.py": Place(5, {"matplotlib", "numpy"}),
    "study/": Place(5, {"matplotlib", "numpy", "jinja2", "yaml", "torch", "tqdm", "transformers"}),
    "plots_slimming.py": Place(5, {"matplotlib", "numpy"}),
    "plots_topology.py": Place(5, {"PIL", "numpy"}),
    "__init__.py": Place(6, set()),  # the public list
    "__main__.py": Place(6, set()),
    "cli.py": Place(6, {"huggingface_hub", "safetensors"}),
}
LAZY = {"matplotlib", "PIL", "sklearn", "scipy"}  # optional: imported where used; the package works without them


def place_of(file: str) -> str | None:
    """The entry of `PLACES` that `file`, a path inside the package, falls under."""
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
            if entry is not None and (PLACES[entry].floor > place.floor or entry in place.never):
                problems.append(f"{where}: {entry} is above it or barred to it")
        elif parts[0] not in place.third_party and parts[0] not in sys.stdlib_module_names:
            problems.append(f"{where}: its floor may import {sorted(place.third_party)} only")
        elif parts[0] in LAZY and at_top:
            problems.append(f"{where}: optional, so import it inside the function that needs it")
    return problems


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    assert place_of(file), (
        f"src/hf_dynsparse/{file} has no floor. Add it to PLACES in tests/test_floors.py, "
        "on the lowest floor that offers what it imports."
    )
    assert not violations(file, (PACKAGE / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("layout.py", "import numpy", "may import ['torch'] only"),
        ("layout.py", "def f():\n    from .nn import sparsify_", "nn.py is above it"),
        ("ops/tiled.py", "from .. import nn", "nn.py is above it"),
        ("ops/tiled.py", "from hf_dynsparse import __version__", "__init__.py is above it"),
        ("models/bert/new.py", "from ...topology.scores import l1", "topology/ is above it or barred"),
        ("data/new.py", "import hf_dynsparse.models.bert", "models/ is above it or barred"),
        ("plots.py", "import matplotlib.pyplot", "inside the function"),
    ],
)
def test_violation_is_seen(file, source, problem):
    (found,) = violations(file, source)
    assert problem in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn.py", "import math, torch.nn\nfrom .layout import BlockLayout\nfrom . import ops"),
        ("plots.py", "def f():\n    import matplotlib.pyplot as plt\n    import numpy"),
        (
            "models/bert/new.py",
            "from ...nn import sparsify_\nfrom .. import bert\nfrom transformers import BertConfig",
        ),
        ("topology/new.py", "from . import scores\nfrom ..nn import sparse_layers"),
        ("__init__.py", "from .trainer import DynSparseTrainer"),
    ],
)
def test_allowed_imports_pass(file, source):
    assert violations(file, source) == []


def test_unlisted_file_has_no_place():
    assert place_of("new.py") is None
    assert place_of("new/scores.py") is None
