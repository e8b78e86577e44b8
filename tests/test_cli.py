"""The command `hf-dynsparse`: what it prints and writes, and one line for every mistake."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.cli import extensions
from loopback import loopback_hub
from safetensors import safe_open
from toy import toy_model, toy_tokenizer
from transformers import BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import hf_dynsparse
import hf_dynsparse_cli
from hf_dynsparse import cli, inspect_checkpoint, sparse_layers, sparsify_
from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.topology.frames import Frame, write_frame


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "toy"
    toy_model().save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    """What the command prints."""
    hf_dynsparse_cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert "\r" not in printed.err  # a progress bar
    return printed.out


def fail(capsys, *arguments):
    """What the command says before it ends with status 2: one line, after the usual prefix."""
    with pytest.raises(SystemExit) as ended:
        hf_dynsparse_cli.main([str(argument) for argument in arguments])
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
    assert getattr(import_module(module), function) is hf_dynsparse_cli.main


def test_it_is_an_extension_of_hf(tmp_path, monkeypatch, capfd):
    """In a folder as `hf extensions install me/hf-dynsparse` leaves it."""
    script = tmp_path / ".local/share/hf/extensions/hf-dynsparse/venv/bin/hf-dynsparse"
    script.parent.mkdir(parents=True)
    run = f"{sys.executable} -c 'from hf_dynsparse_cli import main; main()'"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={Path(hf_dynsparse_cli.__file__).parent} exec {run} "$@"\n')
    script.chmod(0o755)
    where = ("me", "hf-dynsparse", "me/hf-dynsparse", "dynsparse", str(script))
    extensions.ExtensionManifest(*where, "python", datetime.now(UTC)).save(script.parents[2])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    assert extensions.dispatch_unknown_top_level_extension(["dynsparse", "--version"], set()) == 0
    assert capfd.readouterr().out == f"{hf_dynsparse.__version__}\n"


def test_hf_finds_what_the_extension_is_for(monkeypatch):
    root = Path(__file__).parents[1]

    def of_the_repository(method, url):
        return SimpleNamespace(text=(root / url.rpartition("/HEAD/")[2]).read_text(encoding="utf-8"))

    monkeypatch.setattr(extensions, "_github_request", of_the_repository)
    description = extensions._try_fetch_remote_description(owner="me", repo_name="hf-dynsparse")
    assert f'description="{description}"' in (root / "setup.py").read_text(encoding="utf-8")


def test_version_and_help_import_nothing():
    """Neither the package nor what it builds on: a fresh process, for this one has it all."""
    code = """if True:
        import sys
        from hf_dynsparse_cli import main
        main(["--version"])
        for given in (["--help"], ["train", "--help"]):
            try:
                main(given)
            except SystemExit as ended:
                assert not ended.code
        print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, *shown, modules = done.stdout.splitlines()
    assert version == hf_dynsparse.__version__
    for name in (*hf_dynsparse_cli.COMMANDS, *hf_dynsparse_cli.TASKS):
        assert any(re.match(rf" +{name} +\w", line) for line in shown), name
    assert "hf_dynsparse_cli" in modules.split()
    assert {"hf_dynsparse", "torch", "transformers", "numpy"}.isdisjoint(modules.split())


def test_every_command_is_listed():
    (commands,) = (action.choices for action in cli._parser()._actions if action.dest == "==SUPPRESS==")
    assert [*commands, "train"] == list(hf_dynsparse_cli.COMMANDS)


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_dynsparse", "--version"])
    runpy.run_module("hf_dynsparse", run_name="__main__")
    assert capsys.readouterr().out == f"{hf_dynsparse.__version__}\n"


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("task", hf_dynsparse_cli.TASKS)
def test_train_runs_the_script(task, installed, tmp_path, monkeypatch):
    """The main function of the script of that name, in the package or beside it, with the rest of the command line."""
    script, _ = hf_dynsparse_cli.TASKS[task]
    assert (Path(__file__).parents[1] / "examples" / f"{script}.py").is_file()
    package = tmp_path / "src" / "hf_dynsparse"
    examples = package / "examples" if installed else tmp_path / "examples"
    examples.mkdir(parents=True)
    (examples / f"{script}.py").write_text("import sys\ndef main(): sys.exit([__file__, *sys.argv])\n")
    monkeypatch.setattr(hf_dynsparse_cli, "PACKAGE", package)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, script, None)  # what another test has imported comes back at the end
    del sys.modules[script]
    with pytest.raises(SystemExit) as ended:
        hf_dynsparse_cli.main(["train", task, "--output_dir", "--help"])
    assert ended.value.code == [str(examples / f"{script}.py"), f"hf-dynsparse train {task}", "--output_dir", "--help"]


@pytest.mark.parametrize("command", ["inspect", "estimate", "convert", "push", "card", "report", "animate", "fill"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        hf_dynsparse_cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    examples = printed.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:  # each of them is understood
        words = shlex.split(example)
        assert words[:2] == ["hf-dynsparse", command]
        assert cli._parser().parse_args(words[1:]).run


def test_inspect(saved, tmp_path, capsys):
    table, report, picture = tmp_path / "table", tmp_path / "report.json", tmp_path / "blocks.png"
    table = run(capsys, "inspect", saved, "--json", report, "--picture", picture)
    assert table == f"{inspect_checkpoint(saved)}\n"
    assert json.loads(report.read_text()) == inspect_checkpoint(saved).to_dict()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fill(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "copy")
    arguments = [saved, "--beside", tmp_path / "copy", "w1 [MASK]", "[MASK] w2", "--top", "2"]
    heading, *rows = run(capsys, "fill", *arguments).splitlines()
    assert heading.split() == ["text", str(saved), str(tmp_path / "copy")]
    for row, text in zip(rows, ("w1 [MASK]", "[MASK] w2"), strict=True):
        assert row.startswith(text)
        ours, theirs = re.findall(r"\S+ 0\.\d\d, \S+ 0\.\d\d", row)
        assert ours == theirs
    assert "must hold [MASK]" in fail(capsys, "fill", saved, "w1 w2")


def test_a_card_with_its_weights(saved, tmp_path, capsys):
    """In another folder, after which the model is named; over what stands there."""
    target = tmp_path / "model_cards" / "toy-card"
    target.mkdir(parents=True)
    (target / "tokenizer.json").write_text("old")
    assert run(capsys, "card", saved, "--to", target, "--with_weights") == f"{target / 'README.md'}\n"
    assert "# toy-card\n" in (target / "README.md").read_text()
    copied = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {path.name for path in target.iterdir()} == {*copied, "README.md"}
    for name in copied:
        assert (target / name).read_bytes() == (saved / name).read_bytes()
    assert "Give --to too" in fail(capsys, "card", saved, "--with_weights")


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
        pruning_schedule="linear",
        readmit=True,
        dense_learning_rate=0.1,
    )
    assert printed == f"{expected}\n"
    assert json.loads(file.read_text()) == expected.to_dict()


def test_estimate_by_a_trial(tmp_path, capsys, caplog):
    """A step of either twin takes time here; 1,000 tokens are 16 steps of 64."""
    file = tmp_path / "estimate.json"
    options = ["--vocab_size", "64", "--max_seq_length", "16", "--batch_size", "4", "--num_topology_updates", "0"]
    threads = torch.get_num_threads()
    printed = run(
        capsys, "estimate", "--preset", "tiny", *options, "--tokens", "1k", "--trial", "0.01", "--json", file
    )
    torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    for twin in ("sparse", "dense"):
        trial = report["trial"][twin]
        assert trial["seconds_of_the_run"] == pytest.approx(16 * trial["seconds_per_step"])
        assert trial["tokens_per_second"] == pytest.approx(64 / trial["seconds_per_step"])
        assert trial["seconds_per_checkpoint"] > 0
        assert report[twin]["training_flops"] == 64 * report[twin]["flops_per_sequence"]
    assert "\n\ntrial on this machine" in printed
    assert "Topology:" not in printed  # that of the trial, which updates none
    assert "\n  begun now, until" in printed
    assert "A run of 1,024 tokens is likely to end as a table of word frequencies" in caplog.text


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
    (tmp_path / "text.txt").write_text("".join(f"w{number} w{number % 7} w{number % 11}\n" for number in range(44)))
    options = ["--sparsity", "0.5", "--block_size", "4", "--calibration", tmp_path / "text.txt"]
    options += ["--calibration_samples", "40", "--save_statistics", tmp_path / "kept"]
    run(capsys, "convert", tmp_path / "dense", tmp_path / "fitted", *options)
    run(
        capsys,
        "convert",
        tmp_path / "dense",
        tmp_path / "again",
        "--block_size",
        "4",
        "--statistics",
        tmp_path / "kept",
    )
    bias = "bert.encoder.layer.1.output.dense.bias"
    of_dense, *others = (load_model(tmp_path / name).state_dict()[bias] for name in ("dense", "fitted", "again"))
    assert not any(torch.equal(of_dense, other) for other in others)
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
    # And all that is read of it is of one commit, whoever pushes meanwhile.
    assert found["moving"] == [0, 12, 12]
    assert found["moved"] == 24
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


def test_report(saved, tmp_path, capsys, monkeypatch):
    """A page in the folder of one run, here for several; opened once, whether it is watched or not."""
    opened = []
    monkeypatch.setattr(cli.webbrowser, "open", opened.append)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(saved, tmp_path / name)
        (tmp_path / name / "summary.json").write_text("{}")
    assert run(capsys, "report", "a", "--open") == f"{Path('a', 'report.html')}\n"
    assert run(capsys, "report", "a", "b", "--open", "--watch", "0.1") == "report.html\n"
    other = tmp_path / "other.html"
    assert run(capsys, "report", "a", "b", "--output", other) == f"{other}\n"
    assert opened == [(tmp_path / name).as_uri() for name in ("a/report.html", "report.html")]
    assert all("<h1" in Path(name).read_text() for name in ("a/report.html", "report.html", "other.html"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frob"], "invalid choice: 'frob'"),
        (["train"], "the following arguments are required: TASK"),
        (["train", "frob"], "argument TASK: invalid choice: 'frob'"),
        (["inspect"], "the following arguments are required: PATH_OR_REPO"),
        (["inspect", "no where"], "A model must be a folder with a config.json or a repository of the Hub. Got no wh"),
        (["estimate", "--preset", "huge"], "invalid choice: 'huge'"),
        (["estimate", "--preset", "base", "--block_size", "7"], "`block_size` must divide both sides of `layer.0."),
        (["estimate", "--preset", "base", "--block_size", "axb"], "argument --block_size: `--block_size` must be a n"),
        (["estimate", "--preset", "base", "--sparsity", "1"], "`sparsity` is the share of inactive positions and"),
        (["estimate", "--preset", "base", "--max_steps", "-3"], "argument --max_steps: must be a number from 1 to"),
        (
            ["estimate", "--preset", "base", "--max_steps", "3", "--num_topology_updates", "3"],
            "`num_topology_updates` mu",
        ),
        (
            ["estimate", "--preset", "base", "--max_steps", "9" * 30],
            "argument --max_steps: must be a number from 1 to",
        ),
        (
            ["estimate", "--preset", "base", "--num_topology_updates", "-5"],
            "must be a number from 0 to 1,000,000. Got",
        ),
        (["estimate", "--preset", "base", "--tokens", "60M"], "give --batch_size too. Got none"),
        (["estimate", "--preset", "base", "--tokens", "many"], "must be a number such as 900000, 60M or 1.5G. Got"),
        (["estimate", "--preset", "base", "--bf16"], "--bf16 is for the steps of a --trial. Got none"),
        (["estimate", "--preset", "base", "--trial", "0"], "argument --trial: must be positive and finite"),
        (["estimate", "--preset", "base", "--dense_learning_rate", "nan"], "must be positive and finite. Got 'nan'"),
        (["convert", "SAVED", "TARGET"], "the following arguments are required: --to"),
        (["convert", "SAVED", "SAVED", "--to", "dense"], "The target must not exist yet"),
        (["convert", "SAVED", "TARGET", "--to", "dense", "--sparsity", "0.5"], "--sparsity needs --to sparse. Got --"),
        (["convert", "SAVED", "TARGET", "--to", "sparse"], "`source` must be dense"),
        (["convert", "SAVED", "TARGET", "--calibration", "nowhere.txt"], "`source` must be dense"),
        (["convert", "SAVED", "TARGET", "--calibration_samples", "5"], "are lines of a --calibration FILE. Got none"),
        (["convert", "SAVED", "TARGET", "--to", "dense", "--calibration", "a.txt"], "--calibration needs --to sparse"),
        (["convert", "SAVED", "TARGET", "--save_statistics", "a"], "are those of a --calibration FILE. Got none"),
        (
            ["convert", "SAVED", "TARGET", "--statistics", "a", "--calibration", "a.txt"],
            "take the place of --calibration. Got both",
        ),
        (["card", "TARGET"], ""),
        (["animate", "SAVED"], "without topology_history. Train with examples/run_mlm_dynsparse.py"),
        (["animate", "no where"], "RUN_FOLDER must hold a history of the topology. Got no where without"),
        (["animate", "SAVED", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "no where"], "must have left something in its folder. Got no where without summary.json"),
        (["report", "SAVED", "SAVED"], "A page shows each run once. Got "),
        (["report", "SAVED", "--watch", "0"], "argument --watch: must be positive and finite. Got '0'"),
        (["report", "SAVED", "--fill", "no mask"], "A text must hold [MASK] where a word is missing"),
        (["push", "TARGET", "user/name"], "Only a folder that `save_pretrained` wrote can be pushed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, problem, saved, tmp_path, capsys):
    places = {"SAVED": saved, "TARGET": tmp_path / "target"}
    message = fail(capsys, *(places.get(argument, argument) for argument in arguments))
    assert message.startswith(problem) or problem in message
    assert list(tmp_path.iterdir()) == []


TOO_DEEP = "[" * 100_000
MALFORMED = [
    *(("config.json", text, "config.json must ") for text in ("", "{", "[]", "5", "null", TOO_DEEP, "\ud800")),
    *(("config.json", {"architectures": value}, "`architectures` in ") for value in (5, "x", {"a": 1}, [5], [[]])),
    *(
        ("config.json", {"architectures": [name]}, "`architectures` in config.json must name a class of")
        for name in ("pipeline", "Trainer", "BertTokenizer", "GPT2LMHeadModel", "PreTrainedModel", "__name__", "No")
    ),
    *(("config.json", {"quantization_config": value}, "`quantization_config` in ") for value in (5, "x", [1])),
    ("config.json", {"model_type": 5}, "`model_type` in "),
    ("config.json", {"model_type": "unheard_of"}, "code of a repository is not run here. Got 'unheard_of'"),
    ("config.json", {"hidden_size": "x"}, "config.json and weights must describe one model. Got "),
    ("config.json", {"nnzb": [1]}, "config.json and weights must describe one model. Got "),
    ("config.json", {"block_size": 5}, "`block_size` must divide both sides of "),
]
OF_STOCK = [
    {"block_size": "x"},
    {"sparsity": [0.5]},
    {"targets": 5},
    {"ignore": "x"},
    {"nnzb": [1]},
    {"nnzb": {"roberta.encoder.layer.0.attention.self.query": "8"}},
    {"unheard_of": 1},
]


def malformed(saved, folder, file, content):
    """A copy of a model in which a file holds a text, or other fields."""
    shutil.copytree(saved, folder)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / file).read_text()), **content})
    (folder / file).write_bytes(content.encode(errors="surrogatepass"))
    return folder


def files_of(folder):
    """What each file of a folder holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusals(capsys, folder, *commands):
    """What is said of a folder by each of the commands."""
    arguments = {
        "inspect": ["inspect", folder],
        "card": ["card", folder],
        "convert": ["convert", folder, folder.parent / "target", "--to", "dense"],
        "push": ["push", folder, "user/name"],
        "report": ["report", folder],
    }
    before = files_of(folder)
    for command in commands:
        yield command, fail(capsys, *arguments[command])
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert files_of(folder) == before


@pytest.mark.parametrize(("file", "content", "problem"), MALFORMED, ids=lambda value: str(value)[:40])
def test_a_malformed_configuration_is_one_line(file, content, problem, saved, tmp_path, capsys):
    folder = malformed(saved, tmp_path / "model", file, content)
    for command, message in refusals(capsys, folder, "inspect", "card", "convert", "push"):
        assert problem in message or (command == "push" and "Only safe files may be pushed" in message)
        assert len(message) < 600


@pytest.mark.parametrize("content", OF_STOCK, ids=str)
def test_a_malformed_entry_of_another_architecture_is_one_line(content, tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sparsify_(RobertaForMaskedLM(RobertaConfig(vocab_size=64, **sizes)), 8, 0.5).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(content)
    file.write_text(json.dumps(config))
    for _, message in refusals(capsys, tmp_path / "model", "inspect", "card", "convert", "push"):
        assert "`quantization_config` must be" in message or "in `quantization_config` must be" in message


@pytest.mark.parametrize(
    "weight_map", [5, [], {}, None, {"a": 5}, {"a": ["x"]}, {"a": "../x.safetensors"}, {"a": "x.bin"}], ids=str
)
def test_a_malformed_index_is_one_line(weight_map, tmp_path, capsys):
    toy_model().save_pretrained(tmp_path / "model", max_shard_size="15KB")
    file = tmp_path / "model" / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    for _, message in refusals(capsys, tmp_path / "model", "inspect", "convert", "push"):
        assert f"`weight_map` in {file} must " in message
    for text in ("", "{", "[]", TOO_DEEP):
        file.write_text(text)
        for command, message in refusals(capsys, tmp_path / "model", "inspect", "convert", "push"):
            assert f"{file} must " in message or (command == "push" and f"Got {file}, which is no JSON" in message)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("summary.json", text) for text in ("", "{", "5", TOO_DEEP, '{"steps": "many"}', '{"metrics": [1]}')),
        *(("summary.json", text) for text in ('{"data": 5}', '{"metrics": {"f1": "high"}}', '{"versions": null}')),
        *(("trainer_state.json", text) for text in ("", "[]", '{"log_history": 5}', '{"log_history": [5]}')),
        ("trainer_state.json", '{"stateful_callbacks": {"TopologyCallback": 5}}'),
        ("trainer_state.json", '{"log_history": [{"step": 1, "eval_loss": "low"}]}'),
    ],
    ids=lambda value: value[:50],
)
def test_a_malformed_file_of_a_run_is_one_line(file, text, saved, tmp_path, capsys, monkeypatch):
    if "versions" in text:
        text = json.dumps({**json.loads(text), "steps": 1, "hardware": "x", "tokens_per_second": 1.0})
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    commands = ("card", "push") if "versions" in text else ("card", "push", "report")
    for command, message in refusals(capsys, tmp_path / "model", *commands):
        assert str(tmp_path / "model") in message
        assert " must be " in message or " must hold " in message or "may be pushed" in message, command


def test_a_malformed_history_is_one_line(tmp_path, capsys):
    frame = {"blocks": np.packbits(np.eye(4, dtype=bool)), "grid": (4, 4), "about": np.array([0, 0]), "layer": "q"}
    write_frame(tmp_path, Frame("q", 1, 5, np.eye(4, dtype=bool)), {"k": np.eye(4, dtype=bool)})
    file = tmp_path / "topology_history" / "step-000000009.npz"
    changes = [{"grid": grid} for grid in ((4,), (-1, 4), (0, 0), (10**9, 10**9), (4.5, 4), ("a", "b"), (2, 8))]
    changes += [{"about": about} for about in ([1], ["a", "b"])] + [{"blocks": np.ones(2)}]
    others = {"other_layers": np.array(["k"]), "other_grids": np.array([(4, 4)]), "other_blocks": frame["blocks"]}
    changes += [{**others, name: value} for name, value in (("other_layers", ["k", "l"]), ("other_grids", [(4, 8)]))]
    for change in changes:
        np.savez_compressed(file, **{**frame, **change})
        assert "of a topology history must " in fail(capsys, "animate", tmp_path)
    np.savez_compressed(file, **frame)
    whole = file.read_bytes()
    for place in range(0, len(whole), 40):  # every fault of a zip file
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with suppress(SystemExit):
            hf_dynsparse_cli.main(["animate", str(tmp_path)])


@pytest.mark.parametrize("model_type", ["unheard_of", "dynsparse_bert"])
@pytest.mark.parametrize("command", ["inspect", "card", "convert", "sparse", "push"])
def test_code_of_a_repository_is_never_run(command, model_type, saved, tmp_path, capsys, monkeypatch):
    """Whatever stands on the standard input: nobody is asked."""
    code = "from pathlib import Path\nPath({!r}).write_text('run')\nclass Config: ...\nclass Model: ...\n"
    folder = malformed(saved, tmp_path / "model", "config.json", {"model_type": model_type})
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForMaskedLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(code.format(str(tmp_path / "mark")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code.format(str(tmp_path / "mark")))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = {
        "convert": ["convert", folder, tmp_path / "target", "--to", "dense"],
        "sparse": ["convert", folder, tmp_path / "target", "--to", "sparse"],
        "push": ["push", folder, "user/name"],
        "report": ["report", folder],
    }
    with suppress(SystemExit):
        hf_dynsparse_cli.main([str(argument) for argument in arguments.get(command, [command, folder])])
    said = capsys.readouterr()
    assert not (tmp_path / "mark").exists()
    assert ("code of a repository is not run here" in said.err) == (model_type == "unheard_of")


def test_animation_without_pillow(tmp_path, capsys, monkeypatch):
    write_frame(tmp_path, Frame("query", 0, 0, np.eye(4, dtype=bool)))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install hf_dynsparse[plots]" in fail(capsys, "animate", tmp_path)


def test_a_dense_model_has_no_picture(saved, tmp_path, capsys):
    run(capsys, "convert", saved, tmp_path / "dense", "--to", "dense")
    assert not sparse_layers(load_model(tmp_path / "dense"))
    with pytest.raises(SystemExit):
        hf_dynsparse_cli.main(["inspect", str(tmp_path / "dense"), "--picture", str(tmp_path / "blocks.png")])
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
