"""
The command `hf-dynsparse`, as far as it goes without the package: its commands, its version and its help.

It lies beside the package, because importing any module of the package imports torch and transformers: seconds.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


PACKAGE = Path(__file__).with_name("hf_dynsparse")

COMMANDS = {
    "inspect": "what a saved model holds",
    "estimate": "what a run will take and reach",
    "convert": "dense to sparse, and sparse to dense, ONNX or BSR",
    "push": "put a saved model on the Hub",
    "card": "write the model card again",
    "report": "a page that shows one or several runs",
    "animate": "a moving picture of a run's topology",
    "fill": "the words that models put in the place of a mask",
    "train": "pre-train or fine-tune a model",
}

# What `train` trains, by which script of `examples/`.
TASKS = {
    "demo": ("demo", "pre-train a small sparse BERT, its dense twin in the same time, and compare them"),
    "mlm": ("run_mlm_dynsparse", "pre-train a sparse BERT by masked language modelling"),
    "glue": ("run_glue_dynsparse", "fine-tune on a GLUE task, or on sentences of your own"),
    "qa": ("run_qa_dynsparse", "fine-tune on SQuAD, or on questions of your own"),
    "embedding": ("run_embedding_dynsparse", "recover a sentence encoder from a dense one, without labels"),
    "earlybert": ("run_earlybert", "find the attention heads and neurons worth training, and train those"),
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, and examples that keep their line breaks."""

    def __init__(self, **kwargs: object) -> None:
        options: dict[str, object] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**(options | kwargs))  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hf-dynsparse: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command with the arguments `argv`, by default those of the process.

    Raises:
        SystemExit: with status 2 and one line on the standard error stream, if something is wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="hf-dynsparse",
        description="Train sparse models, look at them, convert and push them.",
        epilog="hf-dynsparse COMMAND --help shows examples.",
        usage="%(prog)s [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    args, _ = parser.parse_known_args(given[:1])
    if args.version:
        sys.stdout.write(f"{version()}\n")
    elif args.command is None:
        parser.error("the following arguments are required: COMMAND")
    elif args.command == "train":
        train(given[1:])
    else:
        importlib.import_module("hf_dynsparse.cli").run_command(given)


def version() -> str:
    """Of the package that stands beside this file, installed or not."""
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return found[1] if found else "unknown"


def train(given: list[str]) -> None:
    """Run a script of `examples/` with the rest of the command line, as `python examples/SCRIPT.py` would."""
    width = max(map(len, TASKS))
    parser = Parser(
        prog="hf-dynsparse train",
        description="Pre-train or fine-tune a model: the scripts of examples/, from any folder.",
        epilog="tasks:\n"
        + "".join(f"  {name:<{width}}  {about}; examples/{script}.py\n" for name, (script, about) in TASKS.items())
        + "\nexamples:\n"
        "  hf-dynsparse train mlm                      # built-in text, a small model\n"
        "  hf-dynsparse train glue --model_name_or_path dynsparse-mlm --task_name sst2\n"
        "  hf-dynsparse train mlm --help               # all flags of a task\n"
        "  accelerate launch -m hf_dynsparse train mlm # on several GPUs or machines",
        usage="%(prog)s [-h] TASK ...",
    )
    parser.add_argument("task", metavar="TASK", choices=TASKS, help=", ".join(TASKS))
    task = parser.parse_args(given[:1]).task
    # In an installed package the scripts are in it; in a checkout they are beside `src`.
    folder = PACKAGE / "examples"
    sys.path.insert(0, str(folder if folder.is_dir() else PACKAGE.parents[1] / "examples"))
    sys.argv = [f"hf-dynsparse train {task}", *given[1:]]
    importlib.import_module(TASKS[task][0]).main()
