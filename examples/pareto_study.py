#!/usr/bin/env python
"""
Pre-train many models from one plan, and draw loss against training FLOPs and seconds (arXiv:2108.06277, figures 1 to 13).

    python examples/pareto_study.py examples/studies/two_cores.yaml --output_dir runs/study \
        --train_file train.txt.gz --validation_file valid.txt.gz --jobs 2

The plan is a YAML file:

    flags: {max_steps: 2000, max_seq_length: 64}       # of run_mlm_dynsparse.py, for every run
    sweeps:                                            # each is the product of its lists
      - {preset: [tiny, mini], method: dense, learning_rate: [5.0e-4, 1.0e-3]}
      - {preset: mini, sparsity: 0.9, block_size: [1, 16], method: [static, dynsparse], seed: [0, 1]}

The keys of a sweep are flags of run_mlm_dynsparse.py too, or `size`, a name from a table `sizes` of flags; `method:
dense` is the dense twin. The first run trains the vocabulary of all. Flags after the known ones
go to every run. Finished runs are skipped, so an interrupted study goes on where it stopped, and a longer plan adds to a
shorter one.
"""

import argparse
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm


SCRIPT = Path(__file__).with_name("run_mlm_dynsparse.py")
ONCE = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": "true"}


class Run(NamedTuple):
    """One run: its settings, in the order of the plan."""

    settings: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Its folder: readable, and the same for the same settings."""
        plain = {"preset", "size", "method"}
        return "_".join(value if key in plain else f"{key}={value}" for key, value in self.settings)

    def flags(self, sizes: dict[str, dict[str, Any]]) -> list[str]:
        """Of run_mlm_dynsparse.py."""
        flags = []
        for key, value in self.settings:
            if key == "size":
                flags += [f"--{flag}={setting}" for flag, setting in sizes[value].items()]
            elif key != "method":
                flags += [f"--{key}", value]
            elif value == "dense":
                flags.append("--dense_baseline")
            elif value == "static":
                flags.append("--static")
            elif value != "dynsparse":
                flags += ["--method", value]
        return flags


def main() -> None:
    """Plan, run what is missing."""
    args, rest = parse_arguments()
    plan = yaml.safe_load(Path(args.study).read_text())
    runs = list(plan_runs(plan))
    common = [f"--{key}={value}" for key, value in {**ONCE, **plan.get("flags", {})}.items()] + rest
    output = Path(args.output_dir)
    failed = []
    cores: list[int] = list(range(args.jobs))
    lock = threading.Lock()

    def execute(run: Run) -> tuple[Run, str | None]:
        folder = output / run.name
        if (folder / "summary.json").exists():
            return run, None
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            core = cores.pop()
        command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *common, *run.flags(plan.get("sizes", {}))]
        if run != runs[0]:
            command += ["--tokenizer_name", str(output / runs[0].name / "tokenizer")]
        if args.pin:
            command = ["taskset", "-c", str(core), *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        with lock:
            cores.append(core)
        Path(f"{folder}.log").write_text(done.stdout)
        return run, None if done.returncode == 0 else (done.stdout.strip().splitlines() or ["no output"])[-1]

    with tqdm(total=len(runs), unit="run") as progress, ThreadPoolExecutor(args.jobs) as pool:
        for run, error in itertools.chain([execute(runs[0])], pool.map(execute, runs[1:])):
            progress.update()
            if error:
                failed.append(run)
                progress.write(f"{run.name} failed, see {output / run.name}.log: {error}")
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed.")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """From the command line; what is not known goes to every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="the plan, a YAML file")
    parser.add_argument("--output_dir", required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--pin", action="store_true", help="one core for each run")
    return parser.parse_known_args()


def plan_runs(plan: dict[str, Any]) -> Iterator[Run]:
    """The products of all sweeps, each run once."""
    seen = set()
    for sweep in plan["sweeps"]:
        axes = [value if isinstance(value, list) else [value] for value in sweep.values()]
        for values in itertools.product(*axes):
            run = Run(tuple((key, str(value)) for key, value in zip(sweep, values, strict=True)))
            if run not in seen:
                seen.add(run)
                yield run


if __name__ == "__main__":
    main()
