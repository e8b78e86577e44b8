"""The plan of a study: a YAML file of sweeps, and the runs that they stand for."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml


PLAN_KEYS = {"flags": dict, "sizes": dict, "sweeps": list}
WORDS = {"preset", "size", "method"}  # values that need no name beside them


class Run(NamedTuple):
    """One run: its settings, in the order of the plan."""

    settings: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Its folder: readable, and the same for the same settings."""
        settings = (value if key in WORDS else f"{key}={value}" for key, value in self.settings)
        return re.sub(r"[^\w.,=+-]", "", "_".join(settings))  # no wildcards or slashes in the name of a folder

    def flags(self, sizes: dict[str, dict[str, Any]]) -> list[str]:
        """Of run_mlm_dynsparse.py."""
        flags = []
        for key, value in self.settings:
            if key == "size":
                flags += [f"--{flag}={setting}" for flag, setting in sizes[value].items()]
            elif key != "method":
                flags += [f"--{key}", value]
            elif value == "dense":
                flags.append("--dense_baseline")
            elif value == "static":
                flags.append("--static")
            elif value != "dynsparse":
                flags += ["--method", value]
        return flags

    def without(self, *keys: str) -> "Run":
        """The same with these settings left out."""
        return Run(tuple((key, value) for key, value in self.settings if key not in keys))

    @property
    def typed(self) -> dict[str, Any]:
        """The settings, with numbers for numbers."""
        return {key: value if key in WORDS else typed(value) for key, value in self.settings}


def read_plan(file: str | Path) -> dict[str, Any]:
    """
    The plan, with what may be left out.

    Raises:
        ValueError: naming what is not as it should be.
    """
    plan = read_yaml(file)
    if not isinstance(plan, dict) or not plan.get("sweeps"):
        raise ValueError(f"The plan must hold a list `sweeps`. Got none in {file}.")
    for key, value in plan.items():
        if key not in PLAN_KEYS:
            raise ValueError(f"The plan may hold {', '.join(PLAN_KEYS)}. Got `{key}` in {file}.")
        if not isinstance(value, PLAN_KEYS[key]):
            raise ValueError(f"`{key}` of the plan must be a {PLAN_KEYS[key].__name__}. Got {value!r}.")
    plan = {"flags": {}, "sizes": {}, **plan}
    for sweep in plan["sweeps"]:
        if not isinstance(sweep, dict):
            raise ValueError(
                f"A sweep must be a table of flags, such as {{preset: mini, seed: [0, 1]}}. Got {sweep!r}."
            )
        for size in as_list(sweep.get("size", [])):
            if size not in plan["sizes"]:
                raise ValueError(
                    f"`size` must be one of {', '.join(plan['sizes']) or 'none: `sizes` is empty'}. Got {size!r}."
                )
    return plan


def read_yaml(file: str | Path) -> Any:
    """
    What a plan holds, unchecked.

    Raises:
        ValueError: if it is not YAML.
    """
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The plan must be YAML. Got {file}: {' '.join(str(error).split())}") from error


def plan_runs(plan: dict[str, Any]) -> Iterator[Run]:
    """The products of all sweeps, each run once."""
    seen = set()
    for sweep in plan["sweeps"]:
        for values in itertools.product(*map(as_list, sweep.values())):
            run = Run(tuple((key, str(value)) for key, value in zip(sweep, values, strict=True)))
            if run not in seen:
                seen.add(run)
                yield run


def typed(value: str) -> Any:
    """A number where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return {"True": True, "False": False, "None": None}.get(value, value)


def as_list(value: Any) -> list[Any]:
    """One setting, or several."""
    return value if isinstance(value, list) else [value]
