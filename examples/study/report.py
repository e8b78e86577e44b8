"""The report of a study: a Markdown table, and one HTML file that holds table, pictures and plan."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from study.analysis import Configuration, cost_ratio, dense_family, loss_at_cost, order, series, size_of, title

from hf_dynsparse.files import write_atomically
from hf_dynsparse.reports.tables import markdown_table


TEMPLATES = Path(__file__).parent
COSTS = ("flops", "seconds")


def write_report(
    configurations: Sequence[Configuration],
    path: str | Path,
    pictures: Mapping[str, str],
    *,
    plan: str = "",
    commands: Sequence[str] = (),
) -> None:
    """
    Write a report that needs no other file and no network.

    Args:
        configurations (`Sequence[Configuration]`): see [`best_configurations`].
        path (`str` or `Path`): the HTML file; the pictures lie beside it.
        pictures (`Mapping[str, str]`): file name -> what it shows: see [`draw_study`].
        plan (`str`, *optional*): text of the plan.
        commands (`Sequence[str]`, *optional*): what was run.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [run for each in configurations for run in each.runs]
    rows = table_rows(configurations)
    page = environment.get_template("report.html").render(
        rows=rows,
        note=note(configurations),
        ratios=ratios(configurations),
        sweeps=[(title(each), each.sweep, each.learning_rate) for each in configurations if len(each.sweep) > 1],
        pictures=[
            (base64.b64encode((Path(path).parent / name).read_bytes()).decode(), caption)
            for name, caption in pictures.items()
        ],
        plan=plan,
        commands=commands,
        facts={
            "Configurations": str(len(rows)),
            "Seeds": _distinct(run.settings["seed"] for run in runs),
            "Hardware": _distinct(run.results["hardware"] for run in runs),
            "Versions": _distinct(run.results["versions"] for run in runs),
        },
    )
    write_atomically(path, page)


def format_table(configurations: Sequence[Configuration]) -> str:
    """The rows of [`table_rows`] in Markdown, and a note on how to read them."""
    rows = table_rows(configurations)
    table = markdown_table(rows[0], (row.values() for row in rows), right=range(1, len(rows[0])))
    return f"{table}\n\n{note(configurations)}"


def table_rows(configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    """
    Column -> cell, a row a configuration, by rising FLOPs, each at its best learning rate, beside what the dense
    family reaches for the same FLOPs, and pays for the same loss.
    """
    family = {cost: dense_family(configurations, cost) for cost in COSTS}
    rows = []
    for each in sorted(configurations, key=lambda each: (each.mean("flops"), each.loss)):
        flops = each.mean("flops")
        against = {
            "dense at equal FLOPs": _cell(loss_at_cost(family["flops"], flops), ".4f"),
            "FLOPs ratio at equal loss": _cell(cost_ratio(each, family["flops"], "flops"), ".2f"),
            "seconds ratio": _cell(cost_ratio(each, family["seconds"], "seconds"), ".2f"),
        }
        rows.append(
            {
                "configuration": title(each),
                "learning rate": f"{each.learning_rate:g}{_edge(each)}",
                "loss": f"{each.loss:.4f}" + ("" if each.spread is None else f" ± {each.spread:.4f}"),
                "context gain": _cell(each.mean("context_gain"), ".2f"),
                "seeds": str(len(each.runs)),
                "FLOPs": f"{flops:.3e}",
                "of dense": f"{flops / each.mean('dense_flops'):.1%}",
                "seconds": f"{each.mean('seconds'):.1f}",
                "coverage": "-" if each.is_dense else f"{each.mean('coverage'):.1%}",
                "newborn": _cell(each.mean("newborn_share"), ".1%"),
                **(dict.fromkeys(against, "-") if each.is_dense or each.is_probe else against),
            }
        )
    return rows


def note(configurations: Sequence[Configuration]) -> str:
    """How to read the table."""
    sources = _distinct(run.results["seconds_from"] for each in configurations for run in each.runs)
    return (
        "Loss in nats, mean over the seeds ± their standard deviation. Context gain: nats over the "
        "frequencies of pieces at masked positions; under 0.1 a model has learnt little else. A learning rate with < "
        f"or > is the lowest or highest that was tried. Seconds: {sources}. Ratio: what a configuration costs over "
        "what the dense family, interpolated in the logarithm of its cost, costs at the same loss. Nothing is "
        "extrapolated: “outside” means that no dense model is as good, or none as bad."
    )


def ratios(configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    """The headline: FLOPs at equal loss relative to the dense family, a row a family, a column a block size."""
    family = dense_family(configurations)
    lines, _ = series(configurations)
    blocks = list(dict.fromkeys(kind.block_size for kind in sorted(lines, key=lambda kind: order(kind.block_size))))
    rows: dict[str, dict[str, str]] = {}
    for kind, line in lines.items():
        for each in line:
            name = f"{size_of(each.settings)}, {kind.method}, s = {kind.sparsity:g}"
            row = rows.setdefault(
                name, {"FLOPs ratio at equal loss": name, **{f"B = {block}": "-" for block in blocks}}
            )
            row[f"B = {kind.block_size}"] = _cell(cost_ratio(each, family), ".2f")
    return list(rows.values())


def _edge(configuration: Configuration) -> str:
    rates = list(configuration.sweep)
    if len(rates) < 2:
        return ""
    return {rates[0]: " <", rates[-1]: " >"}.get(configuration.learning_rate, "")


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "outside"
    return "-" if math.isnan(value) else format(value, form)


def _distinct(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(map(str, values)))
