#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[glue,study]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Fine-tune many models on many GLUE tasks, and compare: one table, one picture.

    # sparse pre-trained models: dense control, pattern locked, made dense, evolving
    python examples/finetune_study.py --glue_dir glue_data --output_dir runs/glue --tasks mrpc stsb --seeds 0 1 2 \
        --start dense=runs/dense b16=runs/b16 --modes locked dense dynamic
    # a dense pre-trained model, made sparse in many ways, with and without its fine-tuned self as a teacher
    python examples/finetune_study.py --glue_dir glue_data --output_dir runs/pruned --tasks sst2 --seeds 0 \
        --start bert=bert-base-uncased --sparsities 0.5 0.9 --block_sizes 1 16 1x4 --teacher
    # the same, but the fine-tuned dense model itself is pruned by examples of the task, and learns from its dense self
    python examples/finetune_study.py --glue_dir glue_data --output_dir runs/pruned --tasks sst2 --seeds 0 \
        --start bert=bert-base-uncased --sparsities 0.5 0.9 --block_sizes 1 16 1x4 --from_dense_run \
        --sparse_flags "--calibration_samples 2048 --distillation_layers all"

Runs that are finished already are skipped, so an interrupted study goes on where it stopped. Writes a folder a run,
results.json, table.md and, after --picture, accuracy against sparsity.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from study.jobs import Job, run_jobs
from transformers import AutoConfig

from hf_dynsparse.data import GLUE_TASKS
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import saved_sparsity
from hf_dynsparse.optim.recipes import FINETUNE_MODES
from hf_dynsparse.reports.pictures.runs import plot_sparsity_sweep
from hf_dynsparse.reports.tables import markdown_table


SCRIPT = Path(__file__).with_name("run_glue_dynsparse.py")


class Run(NamedTuple):
    """One fine-tuning run."""

    arm: str
    task: str
    seed: int
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its place in the study's folder."""
        return f"{self.task}/{self.arm}/seed-{self.seed}"


def main() -> None:
    """Plan, run what is missing, collect."""
    args = parse_arguments()
    waves = plan(args)
    output = Path(args.output_dir)
    missing = [[job(run, args) for run in wave if not is_finished(output / run.folder)] for wave in waves]
    failed = run_jobs(missing, output, is_finished, jobs=args.jobs) if any(missing) else []
    results = collect(output, [run for wave in waves for run in wave])
    write_atomically(output / "results.json", json.dumps(results, indent=2) + "\n")
    table = format_table(results, args.tasks)
    write_atomically(output / "table.md", table + "\n")
    print(table)
    if args.picture:
        draw(results, args)
    if failed:
        sys.exit("\n  ".join([f"{len(failed)} of {sum(map(len, waves))} runs failed; each has a .log:", *failed]))


def parse_arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of the study")
    parser.add_argument("--glue_dir", help="folder with the official files; default: the Hub")
    parser.add_argument("--start", nargs="+", required=True, metavar="NAME=MODEL", help="what is fine-tuned")
    parser.add_argument("--tasks", nargs="+", required=True, choices=list(GLUE_TASKS), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--modes", nargs="+", default=["locked"], choices=list(FINETUNE_MODES), help="for models with sparse layers"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=[], help="for dense models: make them sparse")
    parser.add_argument("--block_sizes", nargs="+", default=["16"], help="with --sparsities: B or ROWSxCOLUMNS")
    parser.add_argument("--teacher", action="store_true", help="repeat sparse runs with the dense run as teacher")
    parser.add_argument(
        "--from_dense_run", action="store_true", help="sparse runs start from the dense run, and it is their teacher"
    )
    parser.add_argument("--flags", default="", help="further flags of run_glue_dynsparse.py for every run")
    parser.add_argument("--dense_flags", default="", help="for runs that train dense weights")
    parser.add_argument("--sparse_flags", default="", help="for runs that train sparse weights")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--picture", help="file for the picture of scores against sparsity")
    args = parser.parse_args()
    for start in args.start:
        if "=" not in start:
            parser.error(f"--start takes NAME=MODEL, for example b16=runs/b16. Got {start!r}.")
    return args


def plan(args: argparse.Namespace) -> list[list[Run]]:
    """All runs, in two waves: the second learns from the first."""
    first, second = [], []
    for start in args.start:
        name, model = start.split("=", 1)
        is_sparse = saved_sparsity(AutoConfig.from_pretrained(model)) > 0
        for task in args.tasks:
            for seed in args.seeds:
                dense = str(Path(args.output_dir) / Run(name, task, seed, ()).folder)
                for arm, flags in arms(name, is_sparse, args):
                    is_pruned = "--sparsity" in flags
                    begin = dense if is_pruned and args.from_dense_run else model
                    run = Run(arm, task, seed, ("--model_name_or_path", begin, *flags))
                    if begin is model:
                        first.append(run)
                    if is_pruned and (args.teacher or args.from_dense_run):
                        second.append(Run(f"{arm}-teacher", task, seed, (*run.flags, "--teacher", dense)))
    return [first, second]


def arms(name: str, is_sparse: bool, args: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is done with one model: name and flags."""
    dense, sparse = (tuple(shlex.split(flags)) for flags in (args.dense_flags, args.sparse_flags))
    if is_sparse:
        for mode in args.modes:
            yield f"{name}-{mode}", ("--finetune_mode", mode, *(dense if mode == "dense" else sparse))
        return
    yield name, dense
    for sparsity in args.sparsities:
        for block in args.block_sizes:
            flags = ("--sparsity", str(sparsity), "--block_size", block, *sparse)
            yield f"{name}-s{sparsity:g}-b{block}", flags


def job(run: Run, args: argparse.Namespace) -> Job:
    """The process that does it."""
    folder, glue = str(Path(args.output_dir, run.folder)), ["--glue_dir", args.glue_dir] if args.glue_dir else []
    common = ["--task_name", run.task, "--seed", str(run.seed), "--output_dir", folder, *glue]
    once = ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
    command = [sys.executable, str(SCRIPT), *common, *once, *run.flags, *shlex.split(args.flags)]
    return Job(run.folder, command)


def is_finished(folder: Path) -> bool:
    """Whether a run has written its numbers."""
    return (folder / "summary.json").exists()


def collect(output: Path, runs: list[Run]) -> list[dict[str, Any]]:
    """The summaries of the finished runs, each with its arm and its score: the mean of the task's metrics, x 100."""
    results = []
    for run in runs:
        file = output / run.folder / "summary.json"
        if file.exists():
            summary = json.loads(file.read_text())
            scores = [summary["metrics"][name] for name in GLUE_TASKS[run.task].metrics]
            results.append({"arm": run.arm, **summary, "score": 100 * statistics.fmean(scores)})
    return results


def format_table(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """A row an arm, a column a task: mean over the seeds, and the standard deviation if there are several."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    about: dict[str, dict[str, Any]] = {}
    for result in results:
        scores[result["arm"], result["task"]].append(result["score"])
        about.setdefault(result["arm"], result)
    names = [f"{task} ({'/'.join(GLUE_TASKS[task].metrics)})" for task in tasks]
    rows = []
    for arm, first in about.items():
        cells = []
        for task in tasks:
            found = scores[arm, task]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):.1f}{spread}" if found else "-")
        rows.append([arm, f"{first['sparsity']:.3f}", first["mode"], *cells])
    first = results[0] if results else {}
    versions = ", ".join(f"{k} {v}" for k, v in first.get("versions", {}).items())
    return f"{markdown_table(['run', 'sparsity', 'mode', *names], rows)}\n\n{first.get('hardware')}; {versions}"


def draw(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Score against sparsity, a panel a task, a line for each block size, with and without a teacher."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {task: defaultdict(list) for task in args.tasks}
    for result in results:
        blocks = "dense" if not result["block_shapes"] else "x".join(map(str, result["block_shapes"][0]))
        line = blocks + (", teacher" if result["teacher"] else "")
        panels[result["task"]][line].append((result["sparsity"], result["score"]))
    plot_sparsity_sweep(panels, args.picture)


if __name__ == "__main__":
    main()
