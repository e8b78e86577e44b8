"""Settings in words: the names of configurations, and what sets one apart from others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from study.runs import TOPOLOGY


if TYPE_CHECKING:
    from study.analysis import Configuration

SHORT = {"sparsity": "s", "block_size": "B", "num_topology_updates": "n", "pruning_ratio": "pr"}


def label(configurations: Sequence[Configuration], ignored: Iterable[str] = ()) -> list[str]:
    """A short name of each: the settings in which they differ."""
    left = [less(each.settings, *ignored) for each in configurations]
    keys = dict.fromkeys(("size", "preset", "method", *(key for settings in left for key in settings)))
    shown = []
    for key in keys:
        # A static run has no topology settings.
        having = [
            settings
            for each, settings in zip(configurations, left, strict=True)
            if key not in TOPOLOGY or each.settings["method"] != "static"
        ]
        if len({key_of(settings.get(key)) for settings in having}) > 1:
            shown.append(key)
    return [words((key, settings.get(key)) for key in shown) for settings in left]


def describe(key: str, value: Any) -> str:
    """One setting in a label: the values of some speak for themselves, others are named."""
    if value is None or value is False or (key == "sparsity" and not value):
        return ""
    if key in ("size", "preset", "method", "regrow_rule", "prune_score", "pruning_schedule"):
        return str(value)
    if value is True:
        return key
    number = f"{value:g}" if isinstance(value, float) else value
    return f"{SHORT.get(key, key)}={number}"


def title(configuration: Configuration) -> str:
    """Its name in tables: what the plan gives it."""
    return words(configuration.plan.items())


def words(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings one after the other."""
    return " ".join(filter(None, (describe(key, value) for key, value in settings)))


def less(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Settings without some."""
    return {key: value for key, value in settings.items() if key not in keys}


def key_of(settings: Any) -> str:
    """The same for equal settings, whatever their order; what is not set, or off, is as if it were not there."""
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if value is not None and value is not False}
    return json.dumps(settings, sort_keys=True)


def order(value: Any) -> tuple[bool, Any]:
    """Numbers by size, also those in strings, then words."""
    try:
        return False, float(value)
    except ValueError:
        return True, str(value)


def difference(settings: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """What sets settings apart from others, in words."""
    pairs = {key: (settings.get(key), plain.get(key)) for key in (*settings, *plain)}
    differing = [key for key, (own, other) in pairs.items() if key_of({key: own}) != key_of({key: other})]
    return " ".join(describe(key, settings.get(key)) or f"no {key}" for key in differing)
