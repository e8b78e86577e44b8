"""The tables of a page: what a run has done, with which settings and kernels, in numbers that people read."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..durations import format_time
from ..facts import seconds_so_far
from ..inspection import CheckpointReport


UNITS = {"G": 1e9, "M": 1e6, "K": 1e3, "": 0.0}
KERNEL = ("shape", "block_shape", "nnzb", "tokens", "dtype", "device", "threads", "backend", "why")


def summary_rows(facts: Mapping[str, Any], report: CheckpointReport | None, state: str) -> list[list[str]]:
    """
    Labels and texts, which are empty where nothing is known.

    Args:
        facts (`Mapping[str, Any]`): see [`read_facts`]; what they lack of a run that goes on stands in its log.
        report (`CheckpointReport`, *optional*): its last model.
        state (`str`): of the run.
    """
    last = {key: value for entry in facts.get("history") or [] for key, value in entry.items()}
    logged = {name.partition("/")[2] or name.replace("eval_context", "context"): last[name] for name in last}
    known = {**logged, "seconds": seconds_so_far(last), **{key: facts[key] for key in facts if facts[key] is not None}}
    rows: dict[str, Any] = {"state": state, **(_model_rows(report) if report else {})}
    rows |= {"mode": known.get("mode"), "started from": known.get("start")}
    rows["data"] = (known.get("data") or {}).get("name")
    rows |= {name: known.get(name) for name in ("steps", "epochs")}
    rows |= {"tokens": large(known.get("tokens")), "training FLOPs": large(known.get("flops"))}
    if known.get("flops") and known.get("dense_flops"):
        rows["of dense FLOPs"] = f"{known['flops'] / known['dense_flops']:.1%}"
    rows |= {"training time": duration(known.get("seconds")), "tokens per second": known.get("tokens_per_second")}
    rows |= {"evaluation loss": known.get("eval_loss")}
    rows |= {name: known.get(name.replace(" ", "_")) for name in ("perplexity", "context gain")}
    scores = known.get("metrics") or {}
    rows |= {name.replace("_", " "): score for name, score in scores.items() if name != "loss"}
    if known.get("plateau_left_tokens"):
        left = large(known["plateau_left_tokens"]), duration(known.get("plateau_left_seconds"))
        rows["left the plateau after"] = "{} tokens, {}".format(*left)
    if report and report.layers:
        coverage = known.get("coverage")
        rows |= {"DOF coverage": coverage and f"{coverage:.1%}", "topology updates": known.get("topology_updates")}
    rows |= {"learning rate": facts.get("learning_rate")}  # the highest; the log has that of each step
    rows |= {name: known.get(name) for name in ("seed", "processes", "hardware")}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in (known.get("versions") or {}).items())
    return [[name, readable(value)] for name, value in rows.items()]


def _model_rows(report: CheckpointReport) -> dict[str, str]:
    rows = {"model": report.architecture, "sparsity": "dense", "block": "", "file": f"{report.bytes / 1e6:.4g} MB"}
    if report.layers:
        blocks = sorted({layer.cells(" x ")[2] for layer in report.layers})
        rows |= {"sparsity": f"{report.sparsity:.4f}", "block": ", ".join(blocks)}
        rows["file"] += f", {report.bytes / report.dense_bytes:.1%} of dense"
    return rows


def setting_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """The training arguments and the settings of the topology."""
    given = {**(facts.get("arguments") or {}), **(facts.get("topology") or {})}
    return [[name, readable(value)] for name, value in given.items()]


def kernel_rows(choices: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The headings, and a row for each product; nothing if there are no choices."""
    rows = []
    for choice in choices:
        sides = {name: " x ".join(map(str, choice.get(name) or ())) for name in ("shape", "block_shape")}
        values = (readable({**choice, **sides}.get(name)) for name in KERNEL)
        rows.append(["backward" if choice.get("backward") else "forward", *values])
    return [["pass", *(name.replace("_shape", "") for name in KERNEL)], *rows] if rows else []


def readable(value: Any) -> str:
    """A number with few digits; anything else as it is, and nothing for `None`."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def large(number: float | None) -> str | None:
    """Such as 10.2 M, or 3.15e+13."""
    if number is None or number >= 1e12:
        return None if number is None else f"{number:.3g}"
    letter, unit = next(item for item in UNITS.items() if number >= item[1])
    return f"{number / (unit or 1):.3g} {letter}".strip()


def duration(seconds: float | None) -> str | None:
    """Such as 46 min, or 3 h 20 min."""
    if seconds is None:
        return None
    return f"{seconds:.3g} s" if seconds < 120 else format_time(seconds)
