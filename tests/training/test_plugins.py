"""`--plugin`: what a file or module registers is a valid choice of the scripts."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_dynsparse import DynSparseTrainingArguments
from hf_dynsparse.topology import SCORES
from hf_dynsparse.training.flags import ScriptArguments
from hf_dynsparse.training.plugins import load_plugins
from hf_dynsparse.training.scripts import parse_arguments


EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins" / "fresh_gradient.py"


@dataclass
class Arguments(ScriptArguments, DynSparseTrainingArguments):
    """As a script has them."""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file that registers a score of the name of the folder of this test."""
    name = f"score_{abs(hash(str(tmp_path)))}"
    monkeypatch.setitem(SCORES, name, None)
    monkeypatch.delitem(SCORES, name)
    file = tmp_path / f"{name}.py"
    file.write_text(
        f"from hf_dynsparse import register_score\nregister_score({name!r}, lambda blocks: blocks.values, 'values')\n"
    )
    return file


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    return parse_arguments(Arguments)[0]


@pytest.mark.parametrize("how", ["file", "module", "json"])
def test_its_names_can_be_chosen(plugin, how, tmp_path, monkeypatch):
    name, given = plugin.stem, str(plugin)
    if how == "module":
        monkeypatch.syspath_prepend(tmp_path)
        given = name
    flags = ["--output_dir", tmp_path, "--prune_score", name, "--plugin", given]
    if how == "json":
        flags = [tmp_path / "arguments.json"]
        flags[0].write_text(json.dumps({"output_dir": str(tmp_path), "prune_score": name, "plugin": [given]}))
    for _ in range(2):  # a second time finds it there
        args = parse(monkeypatch, *flags)
        assert (args.prune_score, args.plugin) == (name, [given])


def test_without_it_the_error_says_how(plugin, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--output_dir", tmp_path, "--prune_score", plugin.stem)
    error = capsys.readouterr().err
    assert f"invalid choice: '{plugin.stem}'" in error
    assert "give its file as `--plugin`" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py", "must name a file that exists. Got .*nowhere.py"),
        ("no_such_module_of_mine", "a module that Python finds, .* Got 'no_such_module_of_mine'. Install it"),
    ],
)
def test_one_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        load_plugins(["--plugin", name])


def test_what_a_plugin_lacks_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "lacking_plugin.py").write_text("import no_such_module_of_mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module_of_mine'"):
        load_plugins(["--plugin", "lacking_plugin"])


def test_the_tutorial(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_dynsparse.training.plugins._LOADED", set())
    monkeypatch.setitem(SCORES, "fresh_gradient", None)
    monkeypatch.delitem(SCORES, "fresh_gradient")
    args = parse(monkeypatch, "--output_dir", tmp_path, "--regrow_rule", "fresh_gradient", "--plugin", EXAMPLE)
    assert args.topology_settings().needs >= {"gradient", "ever_active"}
