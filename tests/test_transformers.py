"""The installed transformers has every name that the package relies on, with the parameters it relies on."""

import ast
import importlib
import inspect
import logging
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import transformers

import hf_dynsparse
from hf_dynsparse import _transformers as seam


PACKAGE = Path(hf_dynsparse.__file__).parent
SOURCES = {file: file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py") if file.name != "_transformers.py"}


def import_name(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def parameters(method):
    """Those of a function as they are written in the table: without types and defaults."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(stars.get(p.kind, "") + p.name for p in inspect.signature(method).parameters.values())


def overrides():
    """Every method of a class of this package that a class of transformers has too: both functions."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "hf_dynsparse."):
        if "._native" in module.name or module.name.endswith("__main__"):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not (inspect.isclass(cls) and cls.__module__ == module.name):
                continue
            for name, ours in vars(cls).items():
                ours = getattr(ours, "__func__", ours)
                for base in cls.__mro__[1:]:
                    theirs = vars(base).get(name)
                    if inspect.isfunction(ours) and base.__module__.startswith("transformers.") and theirs is not None:
                        yield f"{cls.__name__}.{name}", ours, getattr(theirs, "__func__", theirs)
                        break


@pytest.mark.parametrize("name", seam.__all__)
def test_an_imported_name_exists(name):
    assert getattr(seam, name) is not None
    assert any(re.search(rf"\b{name}\b", source) for source in SOURCES.values()), f"{name} is not used: remove it"


def test_other_names_do_not_come_through():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = seam.Trainer


@pytest.mark.parametrize(
    ("cls", "method", "expected"),
    [(cls, method, expected) for cls, methods in seam.OVERRIDDEN.items() for method, expected in methods.items()],
)
def test_an_overridden_method_has_its_parameters(cls, method, expected):
    assert parameters(getattr(import_name(cls), method)) == expected


def test_every_override_fits_and_the_private_ones_are_in_the_table():
    listed = {method for methods in seam.OVERRIDDEN.values() for method in methods}
    private = set()
    for name, ours, theirs in overrides():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("_") and not leaf.startswith("__"):
            private.add(leaf)
        if leaf == "__init__" or not inspect.isfunction(theirs):
            continue
        mine = inspect.signature(ours).parameters
        kinds = {parameter.kind for parameter in mine.values()}
        for parameter in inspect.signature(theirs).parameters.values():  # may be given, so it must be taken
            by_name = parameter.name in mine or inspect.Parameter.VAR_KEYWORD in kinds
            assert by_name or parameter.name == "self" or inspect.Parameter.VAR_POSITIONAL in kinds, (name, parameter)
    assert private == listed


@pytest.mark.parametrize("name", seam.TOUCHED)
def test_a_private_attribute_is_where_the_table_says(name):
    module = importlib.import_module(f"transformers.{seam.TOUCHED[name]}")
    assert re.search(rf"\b{name}\b", inspect.getsource(module))
    assert any(re.search(rf"\b{name}\b", source) for source in SOURCES.values()), f"{name} is not used: remove it"


def test_every_private_attribute_is_in_the_table():
    theirs = "".join(
        inspect.getsource(importlib.import_module(f"transformers.{module}")) for module in set(seam.TOUCHED.values())
    )
    nodes = [node for source in SOURCES.values() for node in ast.walk(ast.parse(source))]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    accesses = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)]
    ours |= {a.attr for a in accesses if isinstance(a.ctx, ast.Store) and ast.unparse(a.value) == "self"}
    foreign = {access.attr for access in accesses} - ours
    module, tensor = torch.nn.Module(), torch.empty(0)
    unlisted = {name for name in foreign - set(seam.TOUCHED) if re.search(rf"\b{name}\b", theirs)}
    assert not {name for name in unlisted if not hasattr(module, name) and not hasattr(tensor, name)}


def test_the_range_is_that_of_setup_py():
    (major, minor), newest = seam.OLDEST, seam.NEWEST_TESTED
    assert newest >= seam.OLDEST
    setup = Path(__file__).parents[1] / "setup.py"
    assert f'"transformers>={major}.{minor},<{major + 1}"' in setup.read_text(encoding="utf-8")
    constraints = Path(__file__).parents[1] / "constraints.txt"
    (pinned,) = re.findall(r"^transformers==(\d+)\.(\d+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    assert seam.OLDEST <= tuple(map(int, pinned)) <= newest


@pytest.mark.parametrize("installed", [transformers.__version__, "5.23.0", "5.24.3", "5.24.0.dev0"])
def test_a_tested_version_is_silent(installed, caplog):
    seam.check_version(installed)
    assert not caplog.records


@pytest.mark.parametrize("installed", ["5.25.0", "5.100.1", "6.0.0.dev0"])
def test_a_newer_version_is_worth_a_warning(installed, caplog):
    with caplog.at_level(logging.WARNING):
        seam.check_version(installed)
    (record,) = caplog.records
    text = r"is tested with transformers 5\.23 to 5\.24\. Got .*: pip install 'transformers>=5\.23,<5\.25'\.$"
    assert re.search(text, record.getMessage())


def test_an_older_version_is_refused():
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or newer\. Got 5\.22\.4\. .*pip install"):
        seam.check_version("5.22.4")
