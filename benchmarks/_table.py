"""Rows as lines of a markdown table: what a benchmark prints while it runs, and what the report repeats."""

from collections.abc import Callable
from typing import Any

from _cli import Row


Columns = dict[str, Callable[[Row], Any]]  # heading -> content; the width is that of the heading


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else format(scale * row[name], form)


def _faster(name: str) -> Callable[[Row], str]:
    return lambda row: f"{1 / row[name]:.2f}x" if row[name] else "-"


def _model(row: Row) -> str:
    block = "" if row["block_size"] is None else f" B={row['block_size']}"
    bias = f" + {row['position_bias']}" if row.get("position_bias") else ""
    return f"{row['preset']} {row['kind']}" + (f" s={row['sparsity']:g}{block}" if row["sparsity"] else "") + bias


COLUMNS: dict[str, Columns] = {
    "bench_linear": {
        "tokens": lambda row: row["tokens"],
        "out x in ": lambda row: f"{row['out']}x{row['in']}",
        "s   ": lambda row: row["sparsity"],
        "B  ": lambda row: row["block_size"] or "-",
        "backend           ": lambda row: row["backend"],
        "forward": _number("forward_ratio", ".3f"),
        "backward": _number("backward_ratio", ".3f"),
        "total": _number("total_ratio", ".3f"),
    },
    "bench_check": {
        "tokens": lambda row: row["tokens"],
        "B  ": lambda row: row["block_size"],
        "direction           ": lambda row: row["direction"],
        "us checked": _number("checked_seconds", ".2f", 1e6),
        "us unchecked": _number("unchecked_seconds", ".2f", 1e6),
        "of unchecked": _number("check_ratio", ".3f"),
        "us other": _number("other_seconds", ".2f", 1e6),
        "of other": _number("other_ratio", ".3f"),
    },
    "bench_step": {
        "model                  ": _model,
        "s a step": _number("seconds", ".3f"),
        "tokens/s": _number("tokens_per_second", ".0f"),
        "over dense": _faster("ratio_dense"),
        "over stock": _faster("ratio_stock"),
        "FLOPs": _number("flops_ratio", ".3f"),
        "peak MiB": _number("peak_memory_bytes", ".0f", 2**-20),
        "dropout": _number("dropout", "g"),
        "backend": lambda row: row["backend"],
    },
    "bench_inference": {
        "batch  ": lambda row: f"{row['batch']}x{row['seq_len']}",
        "model                  ": _model,
        "dtype   ": lambda row: row["dtype"],
        "seconds": _number("seconds", ".4f"),
        "of stock": _number("ratio_stock", ".3f"),
        "error ": _number("relative_error", ".0e"),
        "backend": lambda row: row["backend"],
    },
    "bench_sentences": {
        "batch": lambda row: row["batch"],
        "model           ": lambda row: row["model"],
        "s for 1,000": _number("seconds", ".3f"),
        "of the first": _number("ratio_first", ".3f"),
        "same answers": _number("same_predictions", ".1%"),
        "sparsity": _number("sparsity", ".3f"),
        "layers MB": _number("layer_bytes", ".3f", 1e-6),
        "backend": lambda row: row["backend"],
    },
    "bench_calibrated": {
        "B  ": lambda row: row["block_size"] or "-",
        "s   ": lambda row: row["sparsity"],
        "blocks by ": lambda row: row["method"],
        "score": _number("score", ".1f"),
        "seconds": _number("seconds", ".0f"),
        "peak MiB": _number("peak_memory_bytes", ".0f", 2**-20),
        "MB  ": _number("encoder_bytes", ".1f", 1e-6),
        "ms a sentence": _number("sentence_seconds", ".2f", 1e3),
    },
    "bench_choice": {
        "tokens": lambda row: row["tokens"],
        "out x in ": lambda row: f"{row['out']}x{row['in']}",
        "s   ": _number("sparsity", ".2f"),
        "B  ": lambda row: row["block_size"],
        "pass    ": lambda row: "backward" if row["backward"] else "forward",
        "idle     ": lambda row: row["idle_backend"],
        "loaded   ": lambda row: row["loaded_backend"],
        "agree": lambda row: "yes" if row["agree"] else "NO",
        "s idle": _number("idle_seconds", ".3f"),
        "s loaded": _number("loaded_seconds", ".3f"),
    },
}


def heading(columns: Columns) -> str:
    """The first two lines of the table."""
    return f"| {' | '.join(columns)} |\n|{'|'.join('-' * (len(name) + 2) for name in columns)}|"


def line(row: Row, columns: Columns) -> str:
    """One row."""
    cells = [f"{content(row)!s:{len(name)}}" for name, content in columns.items()]
    return f"| {' | '.join(cells)} |"
