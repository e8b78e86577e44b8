"""Plan files: the flags of a training script, in YAML or JSON. What the command line says goes before."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml


SUFFIXES = (".yaml", ".yml", ".json")


def split_plan(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """
    The flags in the plan file that is the first of the arguments, if it is one, and the arguments after it. Numbers
    and words of a plan come as text, for a parser to read as it reads the command line.

    Raises:
        ValueError: if the file holds no table of flags.
    """
    if not argv or not argv[0].endswith(SUFFIXES):
        return {}, list(argv)
    text = Path(argv[0]).read_text(encoding="utf-8")
    try:
        if argv[0].endswith(".json"):
            plan, words = json.loads(text), {}
        else:  # `no` is false in YAML, and 1e-3 a word: both are meant as they are written
            plan, words = yaml.safe_load(text), yaml.load(text, Loader=yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"A plan must be YAML or JSON. Got {argv[0]}: {' '.join(str(error).split())}") from error
    if not isinstance(plan, dict):
        raise ValueError(f"A plan must be a table of flags, such as `preset: mini`. Got {argv[0]}, which holds none.")
    flags = {
        name: value if value is None or isinstance(value, dict | list) else str(words.get(name, value))
        for name, value in plan.items()
    }
    return flags, list(argv[1:])


def check_plan(plan: dict[str, Any], known: Collection[str]) -> None:
    """
    Raises:
        ValueError: for a name that is not `known`.
    """
    for name in plan:
        if name not in known:
            raise ValueError(f"A plan must hold flags of --help, without their dashes. Got `{name}`. Correct it.")
