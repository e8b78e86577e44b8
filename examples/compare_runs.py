#!/usr/bin/env python
"""
A table and a picture from finished runs of run_mlm_dynsparse.py.

    python examples/compare_runs.py runs/dense runs/static runs/dynsparse --picture comparison.png
"""

import argparse
import json
from pathlib import Path

from hf_dynsparse.reports.pictures.runs import plot_comparison
from hf_dynsparse.reports.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    parser.add_argument("--picture", type=Path, help="where to draw evaluation loss against training FLOPs")
    args = parser.parse_args()
    missing = [str(run) for run in args.runs if not (run / "summary.json").is_file()]
    if missing:
        parser.error(f"every run must be finished and hold a summary.json. Got none in {', '.join(missing)}")
    summaries = {run.name: json.loads((run / "summary.json").read_text()) for run in args.runs}
    columns = ["run", "B", "evaluation loss", "context gain", "training FLOPs", "of dense", "coverage", "updates"]
    rows = []
    for name, run in summaries.items():
        block = run["block_size"] if run["sparsity"] else "-"
        rows.append(
            [
                name,
                block,
                f"{run['eval_loss']:.4f}",
                "-" if run.get("context_gain") is None else f"{run['context_gain']:.2f}",
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
    print(f"\n{some['steps']} steps, seed {some['seed']}, {some['hardware']}, {versions}.")
    if args.picture:
        histories = {
            run.name: json.loads((run / "trainer_state.json").read_text())["log_history"] for run in args.runs
        }
        plot_comparison(histories, args.picture, title="Masked-language-modelling loss")


if __name__ == "__main__":
    main()
