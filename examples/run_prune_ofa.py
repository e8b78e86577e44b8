#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[glue,plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Prune Once for All (arXiv:2111.05754): from a dense model to sparse int8 models of many tasks, from one plan.

    # text, sentences and labels of your own: one command, no plan
    python examples/run_prune_ofa.py --model_name_or_path bert-base-uncased --sparsity 0.9 --train_file text.txt \
        --task_train_file train.csv --task_validation_file dev.csv --output_dir runs/own
    # without text the model is fine-tuned first, and pruned by examples of the task
    python examples/run_prune_ofa.py --model_name_or_path bert-base-uncased --task_train_file train.csv \
        --task_validation_file dev.csv --text_column_names title,body --label_column_name stars --output_dir runs/own
    # GLUE, or several tasks and variants, from a plan
    python examples/run_prune_ofa.py --plan examples/prune_ofa/two_cores.yaml --output_dir runs/prune_ofa \
        --train_file train.txt.gz --validation_file valid.txt.gz --glue_dir glue_data
    python examples/run_prune_ofa.py ... --stage teacher prune     # only these
    python examples/run_prune_ofa.py ... --stage report            # from the runs that are finished, at any time
    python examples/run_prune_ofa.py ... --dry_run                 # the commands of the missing runs

    teacher       pre-train the dense model, from scratch or from a checkpoint
    prune         prune it while it is pre-trained further and learns from its dense self
    task_teacher  fine-tune the dense model on each task
    gradual       instead of `prune`: prune it while it is fine-tuned
    transfer      fine-tune the pruned model with its pattern locked; it learns from the dense one of the task
    quantize      the same with weights and inputs rounded to int8; saves the int8 model
    report        scores, bytes and patterns of dense, pruned, and pruned int8 models

The plan is a YAML file: a table of flags for each stage to run, `defaults` for all of them, `tasks` (GLUE, squad, or
any name with a train_file and a validation_file), and `variants`, each the product of its lists:

    defaults: {seed: 0}
    teacher: {preset: mini, max_steps: 2000}         # flags of run_mlm_dynsparse.py
    prune: {max_steps: 2000}
    task_teacher: {learning_rate: 5.0e-5}            # of run_glue_dynsparse.py or run_qa_dynsparse.py
    transfer: {learning_rate: 2.0e-4, num_train_epochs: 4}
    quantize: {learning_rate: 2.0e-5, num_train_epochs: 2}
    tasks: {sst2: {max_train_samples: 4000}, squad: {max_seq_length: 128, transfer: {num_train_epochs: 6}}}
    variants: [{sparsity: [0.85, 0.9], block_size: [1, 1x4]}]

Finished runs are skipped and interrupted ones go on from their last checkpoint, so the same command completes a study.
Writes a folder and a log a run, results.json, table.md and scores.png.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import run_glue_dynsparse as glue
import run_mlm_dynsparse as mlm
import run_qa_dynsparse as qa
from study.jobs import Job, StudyParser, logged_command, naming, run_jobs
from study.prune_ofa import GLUE, MLM, QA, STAGES, StageRun, plan_prune_ofa, read_prune_ofa_plan
from study.prune_ofa_report import collect_results, format_results, format_smallest, plot_results
from transformers import AutoConfig

from hf_dynsparse.blocks.sizes import check_sparsity, parse_block_size
from hf_dynsparse.data.classification import find_columns, load_sentences
from hf_dynsparse.data.questions import load_questions
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import is_dense
from hf_dynsparse.training.scripts import check_topology, one_line_errors
from hf_dynsparse.training.threads import default_threads


SCRIPTS: dict[str, ModuleType] = {MLM: mlm, GLUE: glue, QA: qa}
# Stages of a wave do not wait for each other.
WAVES = (("teacher",), ("prune", "task_teacher"), ("gradual",), ("transfer",), ("quantize",))

# Flags of run_glue_dynsparse.py, and what they are called here.
OWN_TASK = {
    "train_file": "task_train_file",
    "validation_file": "task_validation_file",
    "text_column_names": "text_column_names",
    "label_column_name": "label_column_name",
}
PLANS = Path(__file__).parent / "prune_ofa"

# Flags that change no result.
INERT = ("--num_threads", "--output_dir")


def main() -> None:
    """Plan, check, run what is missing, report."""
    args = parse_arguments()
    output = Path(args.output_dir)
    with one_line_errors():
        plan = read_prune_ofa_plan(
            args.plan,
            args.model_name_or_path,
            own_task={name: getattr(args, flag) for name, flag in OWN_TASK.items() if getattr(args, flag)},
            variant={name: getattr(args, name) for name in ("sparsity", "block_size") if getattr(args, name)},
            calibration_samples=args.calibration_samples,
        )
        threads = args.threads or default_threads(args.jobs)
        plan["defaults"] = {"num_threads": threads, **plan["defaults"]}
        runs = plan_prune_ofa(plan, output, find_data(args))
        check_dense(plan["model_name_or_path"])
        check_runs(runs, output)
        chosen = choose_runs(runs, plan, args, output)
        check_tasks(chosen, output)

    warn_of_changes(runs, output)
    jobs = {run.name: Job(run.name, command(run, output), run.needs) for run in chosen}
    if args.dry_run:
        for job in jobs.values():
            print(shlex.join(job.command))
        return
    waves = [[jobs[run.name] for run in chosen if run.stage in stages] for stages in WAVES]
    failed = run_jobs(waves, output, is_finished, jobs=args.jobs) if chosen else []
    if not args.stage or "report" in args.stage:
        report(runs, output)
    if failed:
        sys.exit("\n  ".join([f"{len(failed)} of {len(chosen)} runs failed; each has a .log:", *failed]))


def parse_arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    own = "default for a task of your own: with --train_file prune on that text, else on the task"
    parser.add_argument("--plan", help=f"the stages, a YAML file; {own}")
    parser.add_argument("--output_dir", required=True, help="folder of the study")
    parser.add_argument("--model_name_or_path", help="the dense model to start from, instead of the plan's")
    parser.add_argument("--sparsity", type=float, nargs="+", help="instead of the plan's variants")
    parser.add_argument("--block_size", nargs="+", help="of these: side, or ROWSxCOLUMNS (default: 1)")
    calibration = "prune at once, by so many examples, such as 512, instead of step by step; then train on"
    parser.add_argument("--calibration_samples", type=int, metavar="N", help=calibration)
    formats = ".csv, .tsv, .json, .jsonl or .parquet, plain or .gz"
    parser.add_argument("--train_file", help=f"text to pre-train on: .txt, {formats}; default: built-in text")
    parser.add_argument("--validation_file", help="text to evaluate on")
    parser.add_argument("--task_train_file", help=f"a task of your own, text and labels to train on: {formats}")
    parser.add_argument("--task_validation_file", help="the same to evaluate on")
    parser.add_argument("--text_column_names", help="its column of text, or two with a comma between them for pairs")
    parser.add_argument("--label_column_name", help="its column of labels (default: label)")
    parser.add_argument("--glue_dir", help="folder with the official files; default: the Hub")
    parser.add_argument("--squad_train_file", help="questions to train on; default: rajpurkar/squad on the Hub")
    parser.add_argument("--squad_validation_file", help="questions to evaluate on")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "report"], help="only these; default: all of the plan")
    parser.add_argument("--task", nargs="+", help="only these of the plan")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each; default: its share of the cores")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the missing runs")
    args = parser.parse_args()
    for flag in ("jobs", "threads", "calibration_samples"):
        given = getattr(args, flag)
        if given is not None and given < 1:
            parser.error(f"--{flag} must be at least 1. Got {given}.")
    own = [flag for flag in OWN_TASK.values() if getattr(args, flag)]
    if own and not (args.task_train_file and args.task_validation_file):
        parser.error(f"A task of your own needs --task_train_file and --task_validation_file. Got --{own[0]} only.")
    if args.block_size and not args.sparsity:
        parser.error("--block_size is that of a --sparsity. Got it alone. Give both or none.")
    if args.plan is None:
        if not (own and args.model_name_or_path):
            parser.error(
                "Without --plan there must be a dense model and a task: --model_name_or_path, --task_train_file and "
                "--task_validation_file."
            )
        args.plan = PLANS / ("own_text.yaml" if args.train_file else "own_task.yaml")
    return args


def find_data(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Flags that name the data of pre-training, of GLUE, and of SQuAD."""
    squad = {"train_file": args.squad_train_file, "validation_file": args.squad_validation_file}
    return {
        "text": {"train_file": args.train_file, "validation_file": args.validation_file},
        "glue": {"glue_dir": args.glue_dir},
        "squad": squad if any(squad.values()) else {"dataset_name": "rajpurkar/squad"},
    }


def check_dense(model_name_or_path: str | None) -> None:
    """
    Raises:
        ValueError: for a folder with a model that is sparse.
    """
    folder = model_name_or_path or ""
    if Path(folder, "config.json").is_file() and not is_dense(AutoConfig.from_pretrained(folder)):
        raise ValueError(f"The model to start from must be dense. Got {folder}, which is sparse.")


def check_runs(runs: Sequence[StageRun], output: Path) -> None:
    """
    Refuse, before anything runs, flags with which a run would stop at its start.

    Raises:
        ValueError: naming the run.
    """
    for run in runs:
        with naming(run.name):
            model_args, data_args, args = parse_run(run, output)
            if model_args.sparsity is not None:
                check_sparsity(model_args.sparsity)
            if model_args.block_size is not None:
                parse_block_size(model_args.block_size)
            SCRIPTS[run.script].check(model_args, data_args, args)
            if run.script == MLM:
                check_topology(args)
                if model_args.model_name_or_path is None:  # others start from a model that is not there yet
                    mlm.build_config(model_args, data_args, args, None)


def parse_run(run: StageRun, output: Path) -> tuple[Any, Any, Any]:
    """The arguments that its script will see."""
    return StudyParser(SCRIPTS[run.script].ARGUMENTS).parse_args_into_dataclasses(run.arguments(output))


def check_tasks(runs: Sequence[StageRun], output: Path) -> None:
    """
    Read the local files of the tasks, each once: pre-training takes long, and they are read after it.

    Raises:
        ValueError: naming the run.
    """
    read = set()
    for run in runs:
        if run.script == MLM or run.task in read:
            continue
        model_args, data_args, args = parse_run(run, output)
        with naming(run.name):
            if run.script == GLUE and (data_args.glue_dir or data_args.files):
                find_columns(load_sentences(data_args, cache_dir=model_args.cache_dir), data_args, args.splits)
            elif run.script == QA and data_args.train_file:
                load_questions(data_args, args.splits, cache_dir=model_args.cache_dir)
        read.add(run.task)


def choose_runs(
    runs: Sequence[StageRun], plan: dict[str, Any], args: argparse.Namespace, output: Path
) -> list[StageRun]:
    """
    The runs of the stages and tasks asked for that are not finished.

    Raises:
        ValueError: for a stage or task that the plan lacks, or a run that builds on one that is neither finished nor
            asked for.
    """
    for flag, known in (("stage", [*plan, "report"]), ("task", plan["tasks"])):
        if strange := [name for name in getattr(args, flag) or [] if name not in known]:
            raise ValueError(f"--{flag} must be of the plan. Got {', '.join(strange)}, which {args.plan} lacks.")
    chosen = [
        run
        for run in runs
        if (not args.stage or run.stage in args.stage)
        and (not args.task or run.task is None or run.task in args.task)
        and not is_finished(output / run.name)
    ]
    names = {run.name for run in chosen}
    for run in chosen:
        for needed in run.needs:
            if needed not in names and not is_finished(output / needed):
                raise ValueError(
                    f"{run.name} builds on {needed}, which is not finished in {output}. Got --stage "
                    f"{' '.join(args.stage)} alone. Run that stage too, or first."
                )
    return chosen


def warn_of_changes(runs: Sequence[StageRun], output: Path) -> None:
    """Say which finished runs are not what the plan would give now."""
    for run in runs:
        if is_finished(output / run.name):
            for words in changes(run, output):
                print(f"{run.name} is kept, but {words}. Delete its folder to run it again.", file=sys.stderr)


def changes(run: StageRun, output: Path) -> Iterator[str]:
    """In words: models that a finished run builds on and that are newer than it, and flags that were others."""
    finished = time_of(output / run.name)
    if newer := [name for name in run.needs if time_of(output / name) > finished]:
        yield f"{', '.join(newer)} was run again since, or is to be"
    had = logged_command(output / run.name)
    if had is None:
        return
    before, now = ({flag for flag in each if flag.startswith("--")} for each in (had, command(run, output)))
    lost, new = (sorted(flag for flag in some if not flag.startswith(INERT)) for some in (before - now, now - before))
    if lost or new:
        yield f"had {' '.join(lost) or 'nothing'}, the plan has {' '.join(new) or 'nothing'}"


def command(run: StageRun, output: Path) -> list[str]:
    """What is run."""
    return [
        *(sys.executable, SCRIPTS[run.script].__file__),
        *("--resume_from_checkpoint=last", "--disable_tqdm=true"),
        *run.arguments(output),
    ]


def is_finished(folder: Path) -> bool:
    """Whether a run has written all of its numbers."""
    with contextlib.suppress(OSError, ValueError):
        return not {"eval_loss", "metrics"}.isdisjoint(json.loads((folder / "summary.json").read_text()))
    return False


def time_of(folder: Path) -> float:
    """When a run was finished; never, as infinity, if it is not."""
    return (folder / "summary.json").stat().st_mtime if is_finished(folder) else math.inf


def report(runs: Sequence[StageRun], output: Path) -> None:
    """results.json, table.md and scores.png of what is finished."""
    results = collect_results([run for run in runs if is_finished(output / run.name)], output)
    if not results:
        print(f"Nothing to report: no task is finished in {output}.")
        return
    table = format_results(results)
    write_atomically(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(output / "table.md", table + "\n")
    with contextlib.suppress(ImportError):  # no picture without matplotlib
        plot_results(results, output / "scores.png")
    print(table, format_smallest(results, output), sep="\n\n")


if __name__ == "__main__":
    main()
