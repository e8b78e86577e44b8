#!/usr/bin/env python
"""
What it costs to compare the operands of a product: microseconds of a layer with the comparison and without it, in
turn, and with `--other` beside the package in another folder of sources, each in processes of its own, in turn too.

    python benchmarks/bench_check.py --threads 1
    git archive OLD_COMMIT src | tar x -C ../old && cp src/hf_dynsparse/ops/*.so ../old/src/hf_dynsparse/ops/
    python benchmarks/bench_check.py --threads 1 --other ../old/src
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from _cli import BlockSize, Row, block_size, label, make_parser, pair, run, shared_fields
from _layers import LayerArm, check_layer
from _table import COLUMNS, heading, line
from _timing import choose_clock, median_seconds, sample_seconds

from hf_dynsparse import BlockSparseLinear
from hf_dynsparse.ops import autograd, block_sparse_linear, choice, operators


try:
    from hf_dynsparse.blocks.layout import layouts_of
except ImportError:  # an older package
    layouts_of = None

QUICK = {"tokens": [1], "block_size": [16], "repeats": 5}
SECONDS = ("checked_seconds", "unchecked_seconds")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=15)
    parser.add_argument("--out_in", type=pair, default=(768, 768), help="shape, such as 3072x768 (768x768)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 1024], help="tokens of a batch (1 1024)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="(0.9)")
    parser.add_argument("--block_size", type=block_size, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--other", type=Path, metavar="SRC", help="sources of the package to compare with")
    parser.add_argument("--turns", type=int, default=5, help="processes of each side, for --other (5)")
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per block size, number of tokens and direction."""
    print(heading(COLUMNS["bench_check"]), flush=True)
    return beside_the_other(args) if args.other else list(measure_here(args))


def measure_here(args: argparse.Namespace) -> Iterator[Row]:
    clock = choose_clock(args.device)
    for size, tokens, backward in product(args.block_size, args.tokens, (False, True)):
        arm = make_arm(args, size, tokens, backward)
        contexts = {"checked": nullcontext}
        if hasattr(choice, "KernelPlan"):  # an older package is put together otherwise
            contexts["unchecked"] = unchecked
        samples: dict[str, list[list[float]]] = {name: [] for name in contexts}
        for turn in range(args.repeats + 1):
            for name, context in contexts.items():
                with context():
                    seconds = sample_seconds(arm, clock)
                if turn:  # the first one warms up
                    samples[name].append([seconds])
        checked = median_seconds(samples["checked"])
        free = median_seconds(samples["unchecked"]) if "unchecked" in samples else None
        row = {
            **shared_fields(args),
            "dtype": "float32",
            "out": args.out_in[0],
            "in": args.out_in[1],
            "tokens": tokens,
            "sparsity": args.sparsity,
            "block_size": label(size),
            "direction": "forward and backward" if backward else "forward",
            "checked_seconds": checked,
            "unchecked_seconds": free,
            "other_seconds": None,
            "check_ratio": checked / free if free else None,
            "other_ratio": None,
        }
        if not args.other:
            print(line(row, COLUMNS["bench_check"]), flush=True)
        yield row


def make_arm(args: argparse.Namespace, size: BlockSize, tokens: int, backward: bool) -> Any:
    """A call of a layer as a user meets it."""
    out, width = args.out_in
    layer = BlockSparseLinear(width, out, size, args.sparsity, device=args.device)
    input = torch.randn(tokens, width, device=args.device, requires_grad=backward)
    grad = torch.randn(tokens, out, device=args.device) if backward else None
    check_layer(layer, layer.to_linear(), input, grad)
    arm = LayerArm(layer, input, grad)

    def call() -> None:
        for phase in arm.phases:
            phase()

    return call


@contextmanager
def unchecked() -> Iterator[None]:
    """
    Nothing is compared. A backend is found by what it depends on, and the orders of the blocks as they always are,
    both in one look-up.
    """
    known: dict[Any, Any] = {}

    def multiply(input: Any, values: Any, block_index: Any, bias: Any, out: int) -> torch.Tensor:
        key = input.shape, input.dtype, values.shape, out, torch.get_num_threads()
        if key not in known:
            checked_forward(input, values, block_index, bias, out)
            known[key] = found(choice.plan.served)
        backend, weight = known[key]
        return backend.dds(input, values, layouts_of(block_index)[weight], bias, False)

    def differentiate(grad: Any, input: Any, values: Any, block_index: Any, *wanted: bool) -> list[torch.Tensor]:
        key = grad.shape, input.shape, input.dtype, values.shape, torch.get_num_threads()
        if key not in known:
            checked_backward(grad, input, values, block_index, *wanted)
            known[key] = found(choice.plan.served)
        backend, weight = known[key]
        results = backend.backward(grad, input, values, layouts_of(block_index)[weight], wanted)
        return [result for result in results if result is not None]

    def forward(self: Any, input: Any) -> torch.Tensor:
        return block_sparse_linear(input, self.values, self.block_index, self.bias, self.out_features)

    checked_forward, checked_backward = operators.compute_linear, operators.compute_linear_backward
    with (
        mock.patch.object(autograd, "compute_linear", multiply),
        mock.patch.object(autograd, "compute_linear_backward", differentiate),
        mock.patch.object(BlockSparseLinear, "forward", forward),
    ):
        yield


def found(served: dict[Any, Any]) -> Any:
    """What was found last."""
    return next(reversed(served.values()))


def beside_the_other(args: argparse.Namespace) -> list[Row]:
    """Own and other sources in processes that take turns."""
    own = Path(operators.__file__).parents[2]
    found: dict[Path, list[list[Row]]] = {own: [], args.other.resolve(): []}
    for _ in range(args.turns):
        for source, runs in found.items():
            runs.append(measure_there(args, source))
    mine, others = found.values()
    rows = []
    for place, first in enumerate(mine[0]):
        of_mine, of_others = ([run[place] for run in runs] for runs in (mine, others))
        both = zip(of_mine, of_others, strict=True)
        row = {
            **first,
            **{name: median(run[name] for run in of_mine) for name in (*SECONDS, "check_ratio")},
            "other_seconds": median(run["checked_seconds"] for run in of_others),
            "other_ratio": median(one["checked_seconds"] / other["checked_seconds"] for one, other in both),
        }
        print(line(row, COLUMNS["bench_check"]), flush=True)
        rows.append(row)
    return rows


def measure_there(args: argparse.Namespace, source: Path) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--json", str(file), "--repeats", str(args.repeats)]
        command += ["--out_in", "x".join(map(str, args.out_in)), "--sparsity", str(args.sparsity)]
        command += [
            "--tokens",
            *map(str, args.tokens),
            "--block_size",
            *(str(label(size)) for size in args.block_size),
        ]
        command += ["--threads", str(torch.get_num_threads()), "--kernel_tuning", args.kernel_tuning]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(source)})
        return json.loads(file.read_text())["rows"]


if __name__ == "__main__":
    main()
