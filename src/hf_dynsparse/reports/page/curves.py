"""The curves of a log."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..facts import seconds_so_far, task_metrics


MAX_POINTS = 1000  # of a curve; of a longer log every second entry is drawn, every third, ...

# All that an evaluation scores comes on top, under its own name.
LABELS = {
    "loss": "training loss",
    "eval_loss": "evaluation loss",
    "learning_rate": "learning rate",
    "dynsparse/coverage": "DOF coverage",
    "dynsparse/newborn_share": "newborn share",
    "dynsparse/newborn_survival": "newborn survival",
    "dynsparse/pruning_ratio": "pruning ratio",
    "dynsparse/sparsity": "sparsity",
    "dynsparse/tokens_per_second": "tokens per second, mean so far",
}


def log_curves(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Of each quantity in a log its `key` there, a `label`, and `points`: step, tokens, seconds, FLOPs and value, with
    `None` for what is not known.
    """
    curves: dict[str, list[list[float | None]]] = {}
    for entry in history:
        costs = entry.get("step"), entry.get("dynsparse/tokens"), seconds_so_far(entry), entry.get("dynsparse/flops")
        place = [None if cost is None else _rounded(cost) for cost in costs]
        for name in dict.fromkeys([*LABELS, *(f"eval_{score}" for score in task_metrics(dict(entry)))]):
            if place[0] is not None and entry.get(name) is not None and math.isfinite(entry[name]):
                curves.setdefault(name, []).append([*place, _rounded(entry[name])])
    return [{"key": name, "label": _label(name), "points": _thinned(points)} for name, points in curves.items()]


def _label(curve: str) -> str:
    return LABELS.get(curve) or curve.removeprefix("eval_").replace("_", " ")


def _thinned(points: list[Any]) -> list[Any]:
    """From the last one backwards, which is always drawn."""
    return points[:: -max(1, -(-len(points) // MAX_POINTS))][::-1]


def _rounded(number: float) -> float:
    """Six digits are more than a picture shows."""
    return float(f"{number:.6g}")
