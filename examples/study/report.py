"""The report of a study: a Markdown table, and one HTML file that holds table, pictures and plan."""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from study.analysis import Configuration, cost_ratio_interval, dense_family, loss_at_cost, series, size_of
from study.intervals import Interval
from study.pairs import find_pairs
from study.words import order, title

from hf_dynsparse.files import write_atomically
from hf_dynsparse.reports.tables import markdown_table


TEMPLATES = Path(__file__).parent
COSTS = ("flops", "seconds")
DIFFERENCES = ("eval_loss", "context_gain")
PAIR_NOTE = (
    "Runs that differ in the method and in nothing else, seed by seed: what the dynamic one has less of loss, and "
    "more of context gain, in nats. Positive: it is better. 95 % interval of the mean over the seeds, by Student's t; "
    "a single seed has none. “Alone”: a seed without a partner, which does not count."
)


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
        pairs=pair_rows(configurations),
        pair_note=PAIR_NOTE,
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
    """The rows of [`table_rows`] and of [`pair_rows`] in Markdown, and notes on how to read them."""
    parts = [_markdown(table_rows(configurations), 1), note(configurations)]
    if pairs := pair_rows(configurations):
        parts += [_markdown(pairs, 2), PAIR_NOTE]
    return "\n\n".join(parts)


def table_rows(configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    """
    Column -> cell, a row a configuration, by rising FLOPs, each at its best learning rate, beside what the dense
    family reaches for the same FLOPs, and pays for the same loss.
    """
    family = dense_family(configurations)
    rows = []
    for each in sorted(configurations, key=lambda each: (each.mean("flops"), each.loss)):
        flops = each.mean("flops")
        against = {
            "dense at equal FLOPs": _cell(loss_at_cost(family, flops), ".4f"),
            "FLOPs ratio at equal loss": _with_ends(cost_ratio_interval(each, configurations), ".2f"),
            "seconds ratio": _with_ends(cost_ratio_interval(each, configurations, "seconds"), ".2f"),
        }
        rows.append(
            {
                "configuration": title(each),
                "learning rate": f"{each.learning_rate:g}{_edge(each)}",
                "loss": f"{each.loss:.4f}" + ("" if each.spread is None else f" ± {each.spread:.4f}"),
                "context gain": _cell(each.mean("context_gain"), ".2f") + _plateau(each),
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


def pair_rows(configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    """Column -> cell, a row for each dynamic configuration beside its static partner; see [`find_pairs`]."""
    rows = []
    for each in find_pairs(configurations):
        loss, gain = each.interval("eval_loss"), each.interval("context_gain")
        rows.append(
            {
                "pair": each.common,
                "differs in": each.differs,
                "learning rate": each.learning_rates,
                "loss, static - dynamic": _cell(loss.mean, "+.4f"),
                "95 % interval": _ends(loss, "+.4f"),
                "context gain, dynamic - static": _cell(gain.mean, "+.3f"),
                "95 % interval of it": _ends(gain, "+.3f"),
                "seeds": ", ".join(map(str, each.seeds)) + "".join(f"; {seed} alone" for seed in each.alone),
                "newborn": _cell(each.of_dynamic("newborn_share"), ".1%"),
                "coverage": _cell(each.of_dynamic("coverage"), ".1%"),
                "on the plateau": f"{each.on_plateau} of {2 * len(each.pairs)} runs" if each.on_plateau else "-",
            }
        )
    return rows


def results(configurations: Sequence[Configuration]) -> str:
    """The differences of pairs and the ratios at equal loss as numbers, in JSON."""
    pairs = [
        {
            **{"pair": each.common, "differs_in": each.differs, "seeds": each.seeds, "alone": each.alone},
            **{name: _numbers(each.interval(name)) | {"by_seed": each.differences(name)} for name in DIFFERENCES},
            **{name: each.of_dynamic(name) for name in ("newborn_share", "coverage")},
            "runs_on_plateau": each.on_plateau,
        }
        for each in find_pairs(configurations)
    ]
    ratios = [
        {"configuration": title(each)}
        | {cost: _numbers(cost_ratio_interval(each, configurations, cost)) for cost in COSTS}
        for each in configurations
        if not each.is_dense and not each.is_probe
    ]
    return json.dumps(_finite({"pairs": pairs, "ratios_at_equal_loss": ratios}), indent=2)


def note(configurations: Sequence[Configuration]) -> str:
    """How to read the table."""
    sources = _distinct(run.results["seconds_from"] for each in configurations for run in each.runs)
    return (
        "Loss in nats, mean over the seeds ± their standard deviation. Context gain: nats over the frequencies of "
        "pieces at masked positions; under 0.1 a model has learnt little else: it is on the plateau. A learning rate "
        f"with < or > is the lowest or highest that was tried. Seconds: {sources}. Ratio: what a configuration costs "
        "over what the dense family, interpolated in the logarithm of its cost, costs at the same loss, with a 95 % "
        "interval over the seeds, each against the dense family of the same seed where that is complete. Nothing is "
        "extrapolated: “outside” means that no dense model is as good, or none as bad."
    )


def ratios(configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    """The headline: FLOPs at equal loss relative to the dense family, a row a family, a column a block size."""
    lines, _ = series(configurations)
    blocks = list(dict.fromkeys(kind.block_size for kind in sorted(lines, key=lambda kind: order(kind.block_size))))
    rows: dict[str, dict[str, str]] = {}
    for kind, line in lines.items():
        for each in line:
            name = f"{size_of(each.settings)}, {kind.method}, s = {kind.sparsity:g}"
            row = rows.setdefault(
                name, {"FLOPs ratio at equal loss": name, **{f"B = {block}": "-" for block in blocks}}
            )
            row[f"B = {kind.block_size}"] = _with_ends(cost_ratio_interval(each, configurations), ".2f")
    return list(rows.values())


def _edge(configuration: Configuration) -> str:
    rates = list(configuration.sweep)
    if len(rates) < 2:
        return ""
    return {rates[0]: " <", rates[-1]: " >"}.get(configuration.learning_rate, "")


def _plateau(configuration: Configuration) -> str:
    on_plateau, count = configuration.on_plateau, len(configuration.runs)
    return "" if not on_plateau else " plateau" if on_plateau == count else f" plateau: {on_plateau} of {count}"


def _ends(interval: Interval, form: str) -> str:
    if interval.count == 1:
        return "one seed"
    if interval.low is None or interval.high is None or math.isnan(interval.mean):
        return "-"
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _with_ends(interval: Interval | None, form: str) -> str:
    ends = "" if interval is None or interval.low is None else f" ({_ends(interval, form)})"
    return _cell(None if interval is None else interval.mean, form) + ends


def _numbers(interval: Interval | None) -> dict[str, Any]:
    return {} if interval is None else interval._asdict()


def _finite(value: Any) -> Any:
    """The same for JSON, which has no number that is none."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(rows: Sequence[Mapping[str, str]], left: int) -> str:
    return markdown_table(rows[0], (row.values() for row in rows), right=range(left, len(rows[0])))


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "outside"
    return "-" if math.isnan(value) else format(value, form)


def _distinct(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(map(str, values)))
