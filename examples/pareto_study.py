#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[study]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Pre-train many models from one plan, and draw loss against training FLOPs and seconds (arXiv:2108.06277).

    python examples/pareto_study.py examples/studies/two_cores.yaml --output_dir runs/study \
        --train_file train.txt.gz --validation_file valid.txt.gz --jobs 2 --pin
    python examples/pareto_study.py ... --dry_run       # what is missing
    python examples/pareto_study.py ... --report_only   # from the runs that are finished, at any time

The plan is a YAML file:

    flags: {max_steps: 2000, max_seq_length: 64}       # of run_mlm_dynsparse.py, for every run
    sizes:                                             # names for groups of flags
      wide: {preset: tiny, config_overrides: "intermediate_size=1024"}
    sweeps:                                            # each is the product of its lists
      - {size: [tiny, wide], method: dense, learning_rate: [5.0e-4, 1.0e-3]}
      - {preset: mini, sparsity: 0.9, block_size: [1, 16], method: [static, dynsparse], seed: [0, 1]}

The keys of a sweep are flags of run_mlm_dynsparse.py too, or `size`; `method: dense` is the dense twin. The first run
trains the vocabulary of all. Flags that this script does not know go to every run. Finished runs are skipped, so an
interrupted study goes on where it stopped, and a longer plan adds to a shorter one.

Writes a folder a run and its log, results.parquet (a row a run), results.json (differences of pairs and ratios, with
intervals), table.md, pictures, and report.html, which holds all of it.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import run_mlm_dynsparse as mlm
from study.analysis import best_configurations
from study.jobs import Job, StudyParser, naming, run_jobs
from study.pictures import draw_study
from study.plan import Run, plan_runs, read_plan
from study.report import format_table, results, write_report
from study.runs import read_run, read_step_seconds

from hf_dynsparse.files import write_atomically
from hf_dynsparse.training.scripts import check_topology, one_line_errors
from hf_dynsparse.training.threads import default_threads, usable_cores


SCRIPT = Path(mlm.__file__)
ONCE = {"recipe": "paper", "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": "true"}
TUNED = ("seed", "learning_rate")  # no matter for the time of a step
# A run that is timed logs every step, evaluates little, saves nothing, and updates the topology this often.
TIMED = ["--logging_steps=1", "--max_eval_samples=8", "--save_strategy=no", "--topology_update_every=5"]
WHEN = ("num_topology_updates", "topology_update_every", "topology_first_step", "topology_last_step", "max_steps")


class Task(NamedTuple):
    """What is to be run: a folder inside the study, and the flags of run_mlm_dynsparse.py."""

    name: str
    flags: list[str]


def main() -> None:
    """Plan, check, run what is missing, time, report."""
    args, rest = parse_arguments()
    output = Path(args.output_dir)
    with one_line_errors():
        plan = read_plan(args.study)
        runs = list(plan_runs(plan))
        tasks = plan_tasks(runs, plan, rest, args)
        timings = plan_timings(runs, plan, rest, args) if args.timing_steps else []
        if not args.report_only:
            check_tasks([*tasks, *timings])

    first = tasks[:1]  # trains the vocabulary of the others
    stages = [
        ("runs", [missing(first, output), missing(tasks[1:], output)], args.jobs),
        ("timing", [missing(timings, output)], 1),  # with nothing beside it
    ]
    if args.dry_run:
        for task in itertools.chain.from_iterable(wave for _, waves, _ in stages for wave in waves):
            print(shlex.join(command(task, output)))
        return
    if args.report_only:
        stages = []
    failed = [name for stage in stages if any(stage[1]) for name in execute_all(*stage, output, args.pin)]
    report(runs, output, Path(args.study).read_text(encoding="utf-8"), tasks)
    if failed:
        sys.exit("\n  ".join([f"{len(failed)} of {len(tasks) + len(timings)} runs failed; each has a .log:", *failed]))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """From the command line; what is not known goes to every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", help="the plan, a YAML file")
    parser.add_argument("--output_dir", required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--pin", action="store_true", help="each run keeps to its share of the cores")
    parser.add_argument(
        "--timing_steps",
        type=int,
        help="after all runs, time each configuration alone for so many steps; without it the time is what a run took "
        "beside the others",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the missing runs")
    parser.add_argument("--report_only", action="store_true", help="run nothing, report what is finished")
    args, rest = parser.parse_known_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1. Got {args.jobs}.")
    if args.timing_steps is not None and args.timing_steps < 20:
        parser.error(f"--timing_steps must be at least 20. Got {args.timing_steps}.")
    if args.pin and not hasattr(os, "sched_setaffinity"):
        parser.error(f"--pin needs a system that can bind processes to cores. Got {sys.platform}. Leave it out.")
    if args.pin and args.jobs > len(usable_cores()):
        parser.error(f"--pin needs a core for each of --jobs {args.jobs}. Got {len(usable_cores())} cores.")
    return args, rest


def plan_tasks(runs: Sequence[Run], plan: dict[str, Any], rest: list[str], args: argparse.Namespace) -> list[Task]:
    """What each run takes; all but the first use the vocabulary of the first, unless the plan names one."""
    common = common_flags(plan["flags"], rest, args)
    vocabulary = vocabulary_flag(runs, args)
    first, *others = ([*common, *run.flags(plan["sizes"])] for run in runs)
    flags = [first, *([vocabulary, *own] for own in others)]
    return [Task(run.name, own) for run, own in zip(runs, flags, strict=True)]


def plan_timings(runs: Sequence[Run], plan: dict[str, Any], rest: list[str], args: argparse.Namespace) -> list[Task]:
    """A short run for each configuration, whatever its seed and learning rate."""
    flags = {key: value for key, value in plan["flags"].items() if key not in WHEN}
    common = common_flags(flags, rest, args)
    vocabulary = vocabulary_flag(runs, args)
    timed: dict[str, Run] = {}
    for run in runs:
        timed.setdefault(timing_name(run), run)
    return [
        Task(
            name,
            [
                vocabulary,
                *common,
                *run.without(*WHEN).flags(plan["sizes"]),
                *TIMED,
                f"--max_steps={args.timing_steps}",
            ],
        )
        for name, run in timed.items()
    ]


def vocabulary_flag(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """The vocabulary that the first run trains."""
    return f"--tokenizer_name={Path(args.output_dir, runs[0].name, 'tokenizer')}"


def timing_name(run: Run) -> str:
    """The folder, inside the study, of the timed run of a configuration."""
    return f"timing/{run.without(*TUNED).name}"


def common_flags(flags: dict[str, Any], rest: list[str], args: argparse.Namespace) -> list[str]:
    """Flags of every run; later ones win."""
    given = {**ONCE, "num_threads": default_threads(args.jobs), **flags}
    return [*(f"--{key}={value}" for key, value in given.items()), *rest]


def check_tasks(tasks: Iterable[Task]) -> None:
    """
    Refuse, before anything runs, flags with which a run would stop at its start.

    Raises:
        ValueError: naming the run.
    """
    parser = StudyParser(mlm.ARGUMENTS)
    for name, flags in tasks:
        with naming(name):  # the vocabulary of the first run is not there yet
            model_args, data_args, args = parser.parse_args_into_dataclasses(flags)
            mlm.check(model_args, data_args, args)
            check_topology(args)
            mlm.build_config(model_args, data_args, args, None)


def is_finished(folder: Path) -> bool:
    """Whether a run has written all of its numbers."""
    with contextlib.suppress(OSError, ValueError):
        return "eval_loss" in json.loads((folder / "summary.json").read_text())
    return False


def missing(tasks: Iterable[Task], output: Path) -> list[Task]:
    """Those that are not finished."""
    return [task for task in tasks if not is_finished(output / task.name)]


def command(task: Task, output: Path) -> list[str]:
    """What is run."""
    return [sys.executable, str(SCRIPT), f"--output_dir={output / task.name}", *task.flags]


def execute_all(words: str, waves: list[list[Task]], jobs: int, output: Path, pin: bool) -> list[str]:
    """Run the tasks, wave after wave, `jobs` at a time; returns what went wrong."""
    commands = [[Job(task.name, command(task, output)) for task in wave] for wave in waves]
    return run_jobs(commands, output, is_finished, jobs=jobs, pin=pin, words=words)


def report(runs: Sequence[Run], output: Path, plan: str, tasks: Sequence[Task]) -> None:
    """Collect what is finished: results.parquet, results.json, pictures, table.md, report.html."""
    found = []
    for run in runs:
        if is_finished(output / run.name):
            timing = output / timing_name(run)
            found.append(
                read_run(output / run.name, run.typed, read_step_seconds(timing) if is_finished(timing) else None)
            )
    if not found:
        sys.exit(f"No run of the plan is finished in {output}.")
    table = pandas.DataFrame([run.row for run in found]).convert_dtypes()
    for column in table.select_dtypes("object"):  # of numbers and words
        table[column] = table[column].map(str, na_action="ignore")
    table.to_parquet(output / "results.parquet")
    configurations = best_configurations(found)
    pictures = draw_study(configurations, output)
    commands = [shlex.join(command(task, output)) for task in tasks]
    write_report(configurations, output / "report.html", pictures, plan=plan, commands=commands)
    write_atomically(output / "results.json", results(configurations) + "\n")
    text = format_table(configurations)
    write_atomically(output / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
