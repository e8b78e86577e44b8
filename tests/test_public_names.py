"""The public names of the package: where they are, and that most of them are imported when they are first used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_dynsparse


def test_each_name_is_that_of_its_module_for_python_and_for_type_checkers():
    tree = ast.parse(Path(hf_dynsparse.__file__).read_text(encoding="utf-8"))
    found = {
        name.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for name in node.names
        if not name.asname
    }
    assert sorted(found) == sorted(hf_dynsparse.__all__)
    assert found.items() >= hf_dynsparse._MODULE_OF.items()
    for name, module in found.items():
        assert getattr(hf_dynsparse, name) is getattr(import_module(module, "hf_dynsparse"), name)


def test_a_name_that_is_not_there():
    assert {*hf_dynsparse.__all__, "hub", "__version__"} <= {*dir(hf_dynsparse)}
    assert hf_dynsparse.hub.push_folder
    with pytest.raises(AttributeError, match="module 'hf_dynsparse' has no attribute 'sparsifi_'"):
        hf_dynsparse.sparsifi_  # noqa: B018


def test_importing_registers_the_models_and_no_more():
    code = """if True:
        import sys
        import hf_dynsparse
        from transformers import AutoConfig, AutoModelForMaskedLM
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        config = AutoConfig.for_model("dynsparse_bert")
        print(AutoModelForMaskedLM._model_mapping[type(config)].__name__)
        print(*(name for name in AUTO_QUANTIZER_MAPPING if "dynsparse" in name))
        print(*(name for name in ("datasets", "evaluate", "transformers.trainer", "hf_dynsparse.training",
                                  "hf_dynsparse.reports", "hf_dynsparse.hub") if name in sys.modules))
        from hf_dynsparse import *
        print(DynSparseTrainer.__name__)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["DynSparseBertForMaskedLM", "dynsparse dynsparse_int8", "", "DynSparseTrainer"]
