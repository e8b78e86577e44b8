#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
"""
A table and a picture from finished runs of run_mlm_dynsparse.py.

    python examples/compare_runs.py runs/dense runs/static --picture flops.png --over_seconds time.png
"""

import argparse
import json
from pathlib import Path

from hf_dynsparse.reports.pictures.runs import plot_comparison, plot_over_seconds
from hf_dynsparse.reports.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    parser.add_argument("--picture", type=Path, help="where to draw evaluation loss against training FLOPs")
    parser.add_argument("--over_seconds", type=Path, help="where to draw loss and context gain against seconds")
    args = parser.parse_args()
    missing = [str(run) for run in args.runs if not (run / "summary.json").is_file()]
    if missing:
        parser.error(f"every run must be finished and hold a summary.json. Got none in {', '.join(missing)}")
    summaries = {run.name: json.loads((run / "summary.json").read_text()) for run in args.runs}
    columns = ["run", "B", "evaluation loss", "context gain", "M tokens", "seconds", "training FLOPs"]
    columns += ["of dense", "coverage", "updates"]
    rows = []
    for name, run in summaries.items():
        block = run["block_size"] if run["sparsity"] else "-"
        rows.append(
            [
                name,
                block,
                f"{run['eval_loss']:.4f}",
                "-" if run.get("context_gain") is None else f"{run['context_gain']:.2f}",
                f"{run['tokens'] / 1e6:.2f}",
                f"{run['seconds']:,.0f}",
                f"{run['flops']:.3e}",
                f"{run['flops'] / run['dense_flops']:.3f}",
                f"{run['coverage']:.3f}",
                run["topology_updates"],
                f"{run['encoder_bytes'] / run['dense_encoder_bytes']:.3f}",
                f"{run['learning_rate']:.3g}",
            ]
        )
    print(markdown_table([*columns, "encoder bytes", "learning rate"], rows))
    some = next(iter(summaries.values()))
    versions = ", ".join(f"{package} {version}" for package, version in some["versions"].items())
    print(f"\nSeed {some['seed']}, {some['hardware']}, {versions}.")
    if not args.picture and not args.over_seconds:
        return
    logs = {run.name: json.loads((run / "trainer_state.json").read_text())["log_history"] for run in args.runs}
    if args.picture:
        plot_comparison(logs, args.picture, title="Masked-language-modelling loss")
    if args.over_seconds:
        plot_over_seconds({name: (log, summaries[name]["seconds"]) for name, log in logs.items()}, args.over_seconds)


if __name__ == "__main__":
    main()
