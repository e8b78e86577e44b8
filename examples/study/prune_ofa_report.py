"""What Prune Once for All costs and saves: scores, bytes and patterns of dense, pruned, and pruned int8 models."""

import json
import zlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from study.prune_ofa import StageRun

from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.data import GLUE_TASKS
from hf_dynsparse.nn.linear import sparse_layers
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.reports.pictures.style import COLOURS, picture
from hf_dynsparse.reports.tables import markdown_table
from hf_dynsparse.training.summary import smaller


MODELS = {"task_teacher": "dense", "transfer": "pruned", "quantize": "pruned + int8"}
ENCODER = ".layer."  # part of the names of its tensors, in BERT and others
BYTES = ("encoder_bytes", "checkpoint_bytes")
OWN_SCORES = {"f1": "f1", "accuracy": "accuracy", "mse": "minus mse"}  # of tasks that are not GLUE, and their metric
Result = dict[str, Any]


def collect_results(runs: Sequence[StageRun], output: Path) -> list[Result]:
    """
    A row for each model of a task, the dense one first.

    Args:
        runs (`Sequence[StageRun]`): those that are finished.
        output (`Path`): folder of the study.

    Returns:
        `list[dict]`: `task`, `variant` (`None` for dense), `model`, `score` (mean of the task's metrics, in percent),
        `lost` (points against dense), `encoder_bytes` and `checkpoint_bytes` (of the tensors in the file, indices and
        scales included: of the encoder, and of all), `smaller` and `checkpoint_smaller` (dense bytes over these),
        `sparsity`, `checksum` of the pattern and whether it is `locked`: the same
        as in the sparse model that it was trained from; and how it was trained and where.
    """
    rows = [read_result(run, output) for run in runs if run.stage in MODELS]
    rows.sort(key=lambda row: (row["task"], row["variant"] or "", list(MODELS.values()).index(row["model"])))
    found = {(row["task"], row["variant"], row["model"]): row for row in rows}
    for row in rows:
        dense = found.get((row["task"], None, "dense"))
        row["lost"] = dense and dense["score"] - row["score"]
        row["smaller"] = dense and dense["encoder_bytes"] / row["encoder_bytes"]
        row["checkpoint_smaller"] = dense and dense["checkpoint_bytes"] / row["checkpoint_bytes"]
    return rows


def read_result(run: StageRun, output: Path) -> Result:
    """One row, but for what compares it with others."""
    folder, start = output / run.name, Path(str(run.flags.get("model_name_or_path")))
    summary = json.loads((folder / "summary.json").read_text())
    checksum = topology_checksum(folder)
    before = topology_checksum(start) if run.variant and (start / "config.json").is_file() else None
    return {
        "task": run.task,
        "variant": run.variant,
        "model": MODELS[run.stage],
        "score": score_of(str(run.task), summary["metrics"]),
        "metrics": summary["metrics"],
        "encoder_bytes": checkpoint_bytes(folder, ENCODER),
        "checkpoint_bytes": checkpoint_bytes(folder),
        "sparsity": summary["sparsity"],
        "checksum": checksum,
        "locked": None if before is None else checksum == before,
        **{
            key: summary[key]
            for key in ("epochs", "steps", "seconds", "seed", "learning_rate", "hardware", "versions")
        },
        "folder": run.name,
    }


def score_of(task: str, metrics: Mapping[str, float]) -> float:
    """The mean of the task's metrics, in percent; of numbers of one's own minus the mean square error."""
    if task == "squad":
        return metrics["f1"]  # in percent already
    if task in GLUE_TASKS:
        return 100 * fmean(metrics[name] for name in GLUE_TASKS[task].metrics)
    return 100 * metrics["accuracy"] if "accuracy" in metrics else -metrics["mse"]


def topology_checksum(folder: str | Path) -> str | None:
    """CRC-32 of which blocks of a saved model are active, whatever the order of its slots; `None` of a dense one."""
    layers = sparse_layers(load_model(folder))
    checksum = 0
    for layer in layers.values():
        checksum = zlib.crc32(layer.block_index.sort().values.numpy().tobytes(), checksum)
    return f"{checksum:08x}" if layers else None


def format_results(results: Sequence[Result]) -> str:
    """The rows in Markdown, and how they came about."""
    columns = {
        "task": lambda row: f"{row['task']} ({_metrics(row)})",
        "model": lambda row: f"{row['model']} {_readable(row['variant'])}".strip(),
        "score": lambda row: f"{row['score']:.2f}",
        "lost": lambda row: _number(row["lost"], "+.2f") if row["variant"] else "-",
        "encoder kB": lambda row: f"{row['encoder_bytes'] / 1e3:,.1f}",
        "smaller": lambda row: _number(row["smaller"], ".1f", "x"),
        "file kB": lambda row: f"{row['checkpoint_bytes'] / 1e3:,.1f}",
        "file smaller": lambda row: _number(row["checkpoint_smaller"], ".1f", "x"),
        "sparsity": lambda row: f"{row['sparsity']:.4f}",
        "pattern": lambda row: (
            (row["checksum"] or "-") + {None: "", True: " locked", False: " CHANGED"}[row["locked"]]
        ),
    }
    rows = ([cell(row) for cell in columns.values()] for row in results)
    about = {
        "seed": sorted({str(row["seed"]) for row in results}),
        "hardware": sorted({row["hardware"] for row in results}),
        "versions": sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in results}),
    }
    lines = [
        markdown_table(columns, rows, right=range(2, len(columns) - 1)),
        "",
        "Bytes: tensors of the encoder in the file, block indices and scales included; of the whole file with "
        "embeddings and head. Pattern: CRC-32 of all block indices; `locked` where it is that of the model before "
        "this training.",
        "; ".join(f"{name}: {' / '.join(values)}" for name, values in about.items()),
    ]
    return "\n".join(lines)


def format_smallest(results: Sequence[Result], output: Path) -> str:
    """A line for the last model of each task and variant: where it is, what it scores, and how much smaller it is."""
    last = {(row["task"], row["variant"]): row for row in results if row["variant"]}
    lines = []
    for row in last.values():
        dense = next((other for other in results if (other["task"], other["variant"]) == (row["task"], None)), None)
        sizes = "" if dense is None else f"; {smaller({**row, **{f'dense_{name}': dense[name] for name in BYTES}})}"
        lost = "" if dense is None else f", {row['lost']:+.2f} lost"
        lines.append(f"{output / row['folder']}: {row['model']}, {row['score']:.2f}{lost}{sizes}")
    return "\n".join(lines)


def plot_results(results: Sequence[Result], path: str | PathLike[str]) -> None:
    """
    Draw score against bytes of the encoder: a colour a task, from its dense model over the pruned one to the int8 one
    of each variant.

    Args:
        results (`Sequence[dict]`): of [`collect_results`].
        path (`str` or `PathLike`): file to write; its suffix chooses the format.
    """
    markers = dict(zip(MODELS.values(), "sod", strict=True))
    tasks = list(dict.fromkeys(row["task"] for row in results))
    with picture(path, 1, 1, (6.2, 4.0), "") as (_, axes):
        for place, task in enumerate(tasks):
            own = [row for row in results if row["task"] == task]
            variants = list(dict.fromkeys(row["variant"] for row in own if row["variant"])) or [None]
            for number, variant in enumerate(variants):
                line = [row for row in own if row["variant"] in (None, variant)]
                points = [row["encoder_bytes"] / 1e6 for row in line], [row["score"] for row in line]
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(*points, color=colour, linewidth=1.2, label="_" if number else task)
                for row, size, score in zip(line, *points, strict=True):
                    axes.plot(size, score, marker=markers[row["model"]], color=colour, label="_")
        for model, marker in markers.items():
            axes.plot([], [], marker=marker, color="#808080", linestyle="", label=model)
        axes.set(xscale="log", xlabel="encoder in the file (MB)", ylabel="score")
        sizes = sorted({f"{row['encoder_bytes'] / 1e6:.2g}" for row in results}, key=float)
        axes.set_xticks([float(size) for size in sizes], [f"{float(size):g}" for size in sizes])
        axes.minorticks_off()
        axes.legend(frameon=False)


def _metrics(row: Result) -> str:
    if row["task"] in GLUE_TASKS:
        return "/".join(GLUE_TASKS[row["task"]].metrics)
    return next(words for name, words in OWN_SCORES.items() if name in row["metrics"])


def _readable(variant: str | None) -> str:
    return (variant or "").replace("sparsity=", "s=").replace("_block_size=", " B=").replace("_", " ")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
