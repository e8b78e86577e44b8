#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
"""
A table from finished runs of run_earlybert.py; seconds are compared with the dense run of the same task and seed.

    python examples/compare_earlybert.py runs/sst2-none runs/sst2-search runs/sst2-random:0
"""

import argparse
import json
from pathlib import Path

from hf_dynsparse.reports.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    args = parser.parse_args()
    missing = [str(run) for run in args.runs if not (run / "summary.json").is_file()]
    if missing:
        parser.error(f"every run must be finished and hold a summary.json. Got none in {', '.join(missing)}")
    summaries = [(run.name, json.loads((run / "summary.json").read_text())) for run in args.runs]
    if others := [name for name, run in summaries if "earlybert" not in run]:
        parser.error(f"every run must be one of run_earlybert.py. Got {', '.join(others)}")
    dense = {key(run): run for _, run in summaries if run["earlybert"]["ticket"] == "none"}
    columns = ["run", "heads", "neurons", "score", "epochs", "search s", "training s", "total s", "of dense"]
    rows = []
    for name, run in summaries:
        ticket, twin = run["earlybert"], dense.get(key(run))
        rows.append(
            [
                name,
                *(share(ticket, part) for part in ("heads", "neurons")),
                score(run),
                f"{run['epochs']:.3g}",
                f"{ticket.get('search_seconds', 0.0):.0f}",
                f"{ticket['train_seconds']:.0f}",
                f"{ticket['total_seconds']:.0f}",
                f"{ticket['total_seconds'] / twin['earlybert']['total_seconds']:.2f}" if twin else "-",
            ]
        )
    print(markdown_table(columns, rows))
    _, some = summaries[0]
    versions = ", ".join(f"{package} {version}" for package, version in some["versions"].items())
    print(f"\n{some['hardware']}, {versions}.")


def key(run: dict) -> tuple:
    """What two runs must share to be compared."""
    return run.get("task"), run["seed"], run["hardware"]


def share(ticket: dict, part: str) -> str:
    """How many units stay; of the dense model all."""
    return f"{sum(ticket[part])} of {sum(ticket[f'num_{part}'])}" if part in ticket else "all"


def score(run: dict) -> str:
    """The metrics of a task, or the loss of masked language modelling."""
    scores = {name: value for name, value in run.get("metrics", {}).items() if name != "loss"}
    return ", ".join(f"{name} {value:.4f}" for name, value in (scores or {"loss": run["eval_loss"]}).items())


if __name__ == "__main__":
    main()
