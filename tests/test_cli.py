"""The command `hf-dynsparse`: what it prints and writes, and one line for every mistake."""

import json
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from loopback import loopback_hub
from safetensors import safe_open
from toy import toy_model, toy_tokenizer
from transformers import BertForMaskedLM

import hf_dynsparse
from hf_dynsparse import cli, inspect_checkpoint, sparse_layers
from hf_dynsparse.saved_model import load_model
from hf_dynsparse.topology_frames import Frame, write_frame


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "toy"
    toy_model().save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    """What the command prints."""
    cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return printed.out


def fail(capsys, *arguments):
    """What the command says before it ends with status 2: one line, after the usual prefix."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    lines = [line for line in printed.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert printed.err.endswith(f"{lines[0]}\n")
    assert lines[0].startswith("hf-dynsparse: error: ")
    return lines[0].removeprefix("hf-dynsparse: error: ")


def test_the_command_is_installed_under_its_name():
    setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    module, function = re.search(r'"console_scripts": \["hf-dynsparse=([\w.]+):(\w+)"\]', setup).groups()
    assert getattr(import_module(module), function) is cli.main


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_dynsparse", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_dynsparse", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{hf_dynsparse.__version__}\n")


@pytest.mark.parametrize("command", ["inspect", "estimate", "convert", "push", "card", "animate"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    examples = printed.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:  # each of them is understood
        words = example.split()
        assert words[:2] == ["hf-dynsparse", command]
        assert cli._parser().parse_args(words[1:]).run
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.search(rf"^    {command} +\w", capsys.readouterr().out, re.MULTILINE)


def test_inspect(saved, tmp_path, capsys):
    table, report, picture = tmp_path / "table", tmp_path / "report.json", tmp_path / "blocks.png"
    table = run(capsys, "inspect", saved, "--json", report, "--picture", picture)
    assert table == f"{inspect_checkpoint(saved)}\n"
    assert json.loads(report.read_text()) == inspect_checkpoint(saved).to_dict()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_estimate(tmp_path, capsys):
    file = tmp_path / "estimate.json"
    arguments = ["--sparsity", "0.5", "--block_size", "1x4", "--distribution", "erk", "--vocab_size", "64"]
    run_of = ["--max_seq_length", "16", "--max_steps", "100", "--batch_size", "2", "--dense_learning_rate", "0.1"]
    topology = ["--num_topology_updates", "7", "--pruning_ratio", "1", "--pruning_schedule", "linear", "--readmit"]
    printed = run(capsys, "estimate", "--preset", "tiny", *arguments, *run_of, *topology, "--json", file)
    config = hf_dynsparse.DynSparseBertConfig.preset(
        "tiny", sparsity=0.5, block_size=(1, 4), distribution="erk", vocab_size=64
    )
    expected = hf_dynsparse.estimate_run(
        config,
        seq_len=16,
        max_steps=100,
        batch_size=2,
        num_topology_updates=7,
        pruning_ratio=1.0,
        schedule="linear",
        readmit=True,
        dense_learning_rate=0.1,
    )
    assert printed == f"{expected}\n"
    assert json.loads(file.read_text()) == expected.to_dict()


def test_estimate_needs_no_more_than_a_size(capsys):
    printed = run(capsys, "estimate", "--preset", "base")
    assert printed == f"{hf_dynsparse.estimate_run(hf_dynsparse.DynSparseBertConfig.preset('base'))}\n"


def test_convert_there_and_back(saved, tmp_path, capsys):
    assert run(capsys, "convert", saved, tmp_path / "dense", "--to", "dense") == f"{tmp_path / 'dense'}: written\n"
    assert type(load_model(tmp_path / "dense")) is BertForMaskedLM
    options = ["--sparsity", "0.5", "--block_size", "2x4", "--distribution", "erk"]
    run(capsys, "convert", tmp_path / "dense", tmp_path / "sparse", "--to", "sparse", *options)
    config = load_model(tmp_path / "sparse").config
    assert (config.sparsity, config.block_shape, config.distribution) == (0.5, (2, 4), "erk")
    run(capsys, "convert", saved, tmp_path / "bsr.safetensors", "--to", "bsr")
    with safe_open(tmp_path / "bsr.safetensors", framework="pt") as tensors:
        assert "bert.encoder.layer.1.output.dense.weight.crow_indices" in tensors.keys()  # noqa: SIM118


def test_convert_to_onnx(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # the export itself has tests, and takes seconds
    message = fail(capsys, "convert", saved, tmp_path / "model.onnx", "--to", "onnx")
    assert "pip install 'hf_dynsparse[onnx]'" in message


def test_to_the_hub_and_from_there(tmp_path):
    (tmp_path / "work").mkdir()
    with loopback_hub(tmp_path / "hub") as hub:
        found = hub.run("cli_worker.py", str(tmp_path / "work"), home="home")
    # Every option of `push` arrived.
    assert found["pushed"][0] == found["draft"] == 0
    assert found["pushed"][1].strip().endswith(f"/tester/mini/commit/{found['sha']}")
    assert (found["private"], found["title"]) == (True, "By command")
    assert {"model.safetensors", "tokenizer.json", "README.md", "modeling_dynsparse_bert.py"} <= {*found["files"]}
    assert found["branches"] == ["draft", "main"]
    # A repository is looked at from afar.
    assert found["inspected"] == [0, 0]
    assert found["same"]
    assert 0 < found["fetched"] < found["bytes"] / 4
    assert found["converted"] == [0, f"{tmp_path / 'work' / 'dense'}: written\n", []]
    assert found["logits"]
    assert found["tokenizer"]
    for name, problem in {
        "missing": "Got tester/missing: ",
        "revision": "Got tester/mini@v9: v9 is not a valid git identifier",
        "foreign": "Pushing to other/mini needs a token with the right to",
        "dense": "Only a sparse model can be pushed",
    }.items():
        status, printed, (line,) = found[name]
        assert (status, printed) == (2, "")
        assert line.startswith("hf-dynsparse: error: ")
        assert problem in line
    assert found["left"] == ["dense", "local.json", "mini", "report.json", "stock"]


def test_card(tmp_path, capsys):
    toy_model().save_pretrained(tmp_path)
    printed = run(capsys, "card", tmp_path)
    assert printed == f"{tmp_path / 'README.md'}\n"
    assert "dynsparse" in (tmp_path / "README.md").read_text()


def test_animate(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for update in range(3):
        write_frame(tmp_path, Frame("query", update, 5 * update, np.eye(4, dtype=bool)))
    assert run(capsys, "animate", tmp_path) == f"{tmp_path / 'topology.gif'}\n"
    other = tmp_path / "other.gif"
    assert run(capsys, "animate", tmp_path, "--output", other, "--seconds", "3") == f"{other}\n"
    for file, milliseconds in ((tmp_path / "topology.gif", 2660), (other, 1000)):
        with image.open(file) as picture:
            assert picture.n_frames == 3
            assert picture.info["duration"] == milliseconds


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frob"], "invalid choice: 'frob'"),
        (["inspect"], "the following arguments are required: PATH_OR_REPO"),
        (["inspect", "no where"], "A model must be a folder with a config.json or a repository of the Hub. Got no wh"),
        (["estimate", "--preset", "huge"], "invalid choice: 'huge'"),
        (["estimate", "--preset", "base", "--block_size", "7"], "`block_size` must divide both sides of `layer.0."),
        (["estimate", "--preset", "base", "--block_size", "axb"], "argument --block_size: `--block_size` must be a n"),
        (["estimate", "--preset", "base", "--sparsity", "1"], "`sparsity` is the share of inactive positions and"),
        (["estimate", "--preset", "base", "--max_steps", "-3"], "argument --max_steps: must be a number from 1. Got"),
        (["estimate", "--preset", "base", "--max_steps", "3", "--num_topology_updates", "3"], "`num_updates` must l"),
        (["convert", "SAVED", "TARGET"], "the following arguments are required: --to"),
        (["convert", "SAVED", "SAVED", "--to", "dense"], "The target must not exist yet"),
        (["convert", "SAVED", "TARGET", "--to", "dense", "--sparsity", "0.5"], "--sparsity needs --to sparse. Got --"),
        (["convert", "SAVED", "TARGET", "--to", "sparse"], "`source` must be dense"),
        (["card", "TARGET"], ""),
        (["animate", "SAVED"], "without topology_history. Train with examples/run_mlm_dynsparse.py"),
        (["animate", "no where"], "RUN_FOLDER must hold a history of the topology. Got no where without"),
        (["animate", "SAVED", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["push", "TARGET", "user/name"], "Only a folder that `save_pretrained` wrote can be pushed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, problem, saved, tmp_path, capsys):
    places = {"SAVED": saved, "TARGET": tmp_path / "target"}
    message = fail(capsys, *(places.get(argument, argument) for argument in arguments))
    assert message.startswith(problem) or problem in message
    assert list(tmp_path.iterdir()) == []


def test_animation_without_pillow(tmp_path, capsys, monkeypatch):
    write_frame(tmp_path, Frame("query", 0, 0, np.eye(4, dtype=bool)))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install hf_dynsparse[plots]" in fail(capsys, "animate", tmp_path)


def test_a_dense_model_has_no_picture(saved, tmp_path, capsys):
    run(capsys, "convert", saved, tmp_path / "dense", "--to", "dense")
    assert not sparse_layers(load_model(tmp_path / "dense"))
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path / "dense"), "--picture", str(tmp_path / "blocks.png")])
    assert "a dense model has no block map" in capsys.readouterr().err


def test_a_damaged_file_is_one_line(saved, tmp_path, capsys):
    dense = tmp_path / "dense"
    run(capsys, "convert", saved, dense, "--to", "dense")
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "is cut off" in fail(capsys, "inspect", dense)
    fail(capsys, "convert", dense, tmp_path / "sparse", "--to", "sparse", "--block_size", "4")
    fail(capsys, "convert", dense, tmp_path / "again", "--to", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
