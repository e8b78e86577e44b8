"""
The commands of README.md and docs/, pasted into a shell that runs no programs but says what it would have run: scripts
and files of this repository exist, and their own parsers take flags and values. What stands for more (... or …) is
left out.
"""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser

import hf_dynsparse_cli
from hf_dynsparse import cli


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))]
PAGES += [*sorted(ROOT.glob("model_cards/**/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
OURS = ("benchmarks", "docs", "examples", "hub_kernel", "tests")
OTHERS = {"auditwheel", "cibuildwheel", "hf", "mkdocs", "tensorboard", "trackio", "unzip"}
REST = ("…", "...")  # of a command line, as it was before
# No program is found; the shell names it and its arguments instead, past pipes and redirections; * stays what it is.
SHELL = """exec 3>&1; PATH=/nowhere; set -uf
command_not_found_handle() { printf '%s\\0' "$@" $'\\n' >&3; }
"""


def shell_blocks(page: Path) -> Iterator[str]:
    """Blocks in bash, and what stands behind a dollar in those that show the output too."""
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if language == "bash":
            yield block
        elif not language:
            yield "\n".join(re.findall(r"^\$ (.*)", block, re.MULTILINE))


def programs(block: str, folder: Path) -> list[list[str]]:
    """What a shell in an empty folder would run: programs with their arguments."""
    done = subprocess.run(["bash", "-c", SHELL + block], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), f"{block}\n{done.stderr}"
    return [line.split("\0")[:-1] for line in done.stdout.split("\n\0")[:-1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_pasted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.path", [*sys.path, str(ROOT / "examples" / "study")])
    for block in shell_blocks(page):
        for program in programs(block, tmp_path):
            check_program(*(word for word in program if word not in REST))


def check_program(name: str, *words: str) -> None:
    ours = [word for word in words if word.partition("/")[0] in OURS and "/" in word]
    assert [word for word in ours if not (ROOT / word).exists()] == []
    if name == "accelerate":
        assert words[0] == "launch", words
        launched = read(launch_command_parser(), words[1:])
        check_python(["-m"] * bool(launched.module) + [launched.training_script, *launched.training_script_args])
    elif name == "torchrun":
        check_python(words[words.index("-m") :])
    elif name in ("python", "python3", "uv"):
        check_python(words[1:] if name == "uv" else words)
    elif name == "hf-dynsparse":
        check_command(*words)
    elif name == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= {*targets}
    elif name == "pip":
        extras = re.findall(r'^extras\["(\w+)"\]', (ROOT / "setup.py").read_text(), re.MULTILINE)
        asked = re.findall(r"(?:\.|hf_dynsparse)\[([\w,]+)\]", " ".join(words))
        assert {extra for group in asked for extra in group.split(",")} <= {*extras}
    else:
        assert name in OTHERS, f"{name} {' '.join(words)}"


def check_python(words: list[str]) -> None:
    """A script of ours, or the package as a module."""
    if words[:2] == ["-m", "hf_dynsparse"]:
        check_command(*words[2:])
    elif words[0].startswith(("examples/", "benchmarks/")):
        check_script(Path(words[0]).stem, words[1:])
    else:
        assert words[0] in ("-", "-m") or words[0].startswith(("hub_kernel/", "tests/")), words


def check_command(name: str, *words: str) -> None:
    if name == "train":
        check_script(hf_dynsparse_cli.TASKS[words[0]][0], words[1:])
    elif words != ("--help",):
        read(cli._parser(), [name, *words])


def check_script(name: str, words: list[str] | tuple[str, ...]) -> None:
    if words and words[0].endswith(".yaml") and name.startswith("run_"):
        words = words[1:]  # a plan
    earlybert = name == "run_earlybert" and "--mlm" in words
    parser = parser_of(name, *["--mlm"] * earlybert)
    rest = read(parser, words, "rest").rest
    if name in ("demo", "pareto_study"):  # the rest is for every run
        check_script("run_mlm_dynsparse", rest)
    else:
        assert rest == [], f"{name} has no {' '.join(rest)}"


@cache
def parser_of(name: str, *words: str) -> argparse.ArgumentParser:
    """The parser by which a script reads its command line. Nothing else of the script runs."""

    class Found(BaseException):
        pass

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        if not parser.add_help:
            return read_for_real(parser, *args, **kwargs)  # that of `load_plugins`
        raise Found(parser)

    read_for_real = argparse.ArgumentParser.parse_known_args
    script = importlib.import_module(name)
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), mock.patch("sys.argv", [name, *words]):
        try:
            script.main()
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{name} reads no command line")


def read(parser: argparse.ArgumentParser, words: list[str] | tuple[str, ...], rest: str = "") -> argparse.Namespace:
    """What a command line says. Nothing is required, for … may say it; what is left over goes into `rest`."""
    words = [word for word in words if word not in ("--help", "--help_all")]
    with mock.patch.object(type(parser), "error", _fail):
        for action in parser._actions:
            action.required = False
            if "--plugin" in words and action.choices:
                action.choices = None  # a plug-in may bring it
        if not rest:
            return parser.parse_args(words)
        given, left = parser.parse_known_args(words)
    return argparse.Namespace(**vars(given), **{rest: left})


def _fail(parser: argparse.ArgumentParser, message: str) -> None:
    raise AssertionError(f"{parser.prog}: {message}")


@pytest.mark.parametrize(
    "words",
    [
        "python examples/run_mlm.py",
        "hf-dynsparse train mlm --sparse 0.9",
        "accelerate launch --cores 2 examples/run_mlm_dynsparse.py",
        "hf-dynsparse inspect model --pictures maps.png",
        "hf-dynsparse train glue --finetune_mode frozen",
        "accelerate launch examples/demo.py --max_steps many",
        "make demos",
        "pip install hf_dynsparse[int8]",
        "rm -r runs",
    ],
)
def test_a_mistake_is_found(words: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_program(*words.split())
