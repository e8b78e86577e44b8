"""Plug-ins of the training scripts: files and modules that register scores, regrow rules and methods of their own."""

import argparse
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers import HfArgumentParser

from ..topology.scores import OWN_NAMES
from .console import leave_to_first
from .plans import split_plan


PLUGIN_HELP = (
    "Modules or files.py of your own to import first: what they register, such as by `hf_dynsparse.register_score`, "
    "can then be chosen. A resumed run needs them again."
)

_LOADED: set[Path] = set()


def load_plugins(argv: Sequence[str]) -> None:
    """
    Import what `--plugin` names in the arguments of a script, or in its plan file. A file that was imported before is
    not imported again.

    Raises:
        ValueError: for a module or file that does not exist, or one that registers a name that is taken.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", nargs="+", action="extend", default=[])
    plan, flags = split_plan(argv)
    for name in parser.parse_known_args(flags)[0].plugin or plan.get("plugin") or []:
        if name.endswith(".py"):
            _load_file(Path(name))
        else:
            _load_module(name)


def _load_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the plug-in is there; what it imports is not
        raise ValueError(
            f"`--plugin` must name a module that Python finds, or a file that ends in .py. Got {name!r}. Install it, "
            "or give the path of its file."
        ) from None


def _load_file(path: Path) -> None:
    path = path.resolve()
    if path in _LOADED:
        return
    spec = importlib.util.spec_from_file_location(f"hf_dynsparse_plugin_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"`--plugin` must name a file that exists. Got {path}. Correct the path.")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    _LOADED.add(path)


class PluginParser(HfArgumentParser):
    """One that says, beside the names that can be chosen, how to add another."""

    def error(self, message: str) -> NoReturn:
        """End with one line, of several processes the first one's."""
        message = f"{leave_to_first()}{message}"
        super().error(f"{message}. {OWN_NAMES}" if "invalid choice" in message else message)
