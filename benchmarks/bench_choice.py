#!/usr/bin/env python
"""
Which backend is chosen for the layers of BERTs and for 256 x 256: on this machine as it is, then with every core
loaded by other processes. Both should agree. Nothing is read from disk or kept there.

    python benchmarks/bench_choice.py                     # mini, base and 256x256, all threads; a minute
    python benchmarks/bench_choice.py --threads 1 --block_size 1 4 16 32
    python benchmarks/bench_choice.py --presets mini --out_in --tokens 1024
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _cli import Row, block_size, label, make_parser, pair, run, shared_fields
from _table import COLUMNS, heading, line

from hf_dynsparse import configure_kernels
from hf_dynsparse.models.bert.configuration_dynsparse_bert import PRESETS
from hf_dynsparse.ops import Problem, choose_backend, tuning


QUICK = {"presets": ["mini"], "tokens": [1024], "block_size": [4, 16]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=1)
    parser.add_argument("--presets", choices=tuple(PRESETS), nargs="*", default=["mini", "base"], help="(mini base)")
    parser.add_argument("--out_in", type=pair, nargs="*", default=[(256, 256)], help="more shapes (256x256)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="tokens of a batch (1024 4096)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9], help="shares of inactive positions (0.9)")
    parser.add_argument("--block_size", type=block_size, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per problem and turn: what was chosen idle and loaded, and how long it took."""
    problems = list(make_problems(args))
    print(heading(COLUMNS["bench_choice"]), flush=True)
    rows = []
    for _ in range(args.repeats):
        idle, loaded = choose(problems, nullcontext()), choose(problems, all_cores_loaded())
        for problem in problems:
            fields = {
                "problem": str(problem),
                "dtype": args.dtype,
                "out": problem.shape[0],
                "in": problem.shape[1],
                "block_size": label(
                    problem.block_shape if len(set(problem.block_shape)) > 1 else problem.block_shape[0]
                ),
                "sparsity": 1 - problem.density,
                "tokens": problem.tokens,
                "backward": problem.backward,
                "agree": idle[problem][0] == loaded[problem][0],
            }
            for name, (backend, seconds) in {"idle": idle[problem], "loaded": loaded[problem]}.items():
                fields |= {f"{name}_backend": backend, f"{name}_seconds": seconds}
            rows.append({**shared_fields(args), **fields})
            print(line(rows[-1], COLUMNS["bench_choice"]), flush=True)
    agree = sum(row["agree"] for row in rows)
    idle_seconds, loaded_seconds = (sum(row[f"{name}_seconds"] for row in rows) for name in ("idle", "loaded"))
    print(f"{agree} of {len(rows)} choices agree; {idle_seconds:.2f} s idle, {loaded_seconds:.2f} s loaded")
    return rows


def make_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Forward and backward of every shape with every block that divides it, tokens and sparsity; each once."""
    shapes = set(args.out_in)
    for name in args.presets:
        _, hidden, _, inner = PRESETS[name]
        shapes |= {(hidden, hidden), (inner, hidden), (hidden, inner)}
    for shape, size, tokens, sparsity in product(sorted(shapes), args.block_size, args.tokens, args.sparsity):
        rows, columns = (size, size) if isinstance(size, int) else size
        nnzb = round((1 - sparsity) * shape[0] * shape[1] / (rows * columns))
        for backward in (False, True):
            dtype = getattr(torch, args.dtype)
            yield Problem.make(args.device, dtype, (rows, columns), shape, nnzb, tokens, backward)


def choose(problems: list[Problem], load: AbstractContextManager[None]) -> dict[Problem, tuple[str, float]]:
    """Backend and seconds of choosing for each problem under `load`, as the first process on a machine would."""
    chosen, place = {}, tuning.cache_file
    with TemporaryDirectory() as folder, load:
        tuning.cache_file = lambda: Path(folder) / "kernels.json"
        configure_kernels(tuning="force")  # and forget what was chosen before
        for problem in problems:
            began = time.perf_counter()
            backend = choose_backend(problem).name
            chosen[problem] = backend, time.perf_counter() - began
    tuning.cache_file = place
    return chosen


@contextmanager
def all_cores_loaded() -> Iterator[None]:
    """As many processes that never rest as there are cores."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 1)]
    try:
        for other in others:
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


if __name__ == "__main__":
    main()
