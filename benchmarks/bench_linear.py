#!/usr/bin/env python
"""
Seconds of one linear layer, forward and backward through autograd, over those of dense `F.linear` in the same dtype:
below 1 is faster than dense, 0.1 is all that 0.9 sparsity can give. Masked dense is timed beside it.

    python benchmarks/bench_linear.py --quick --threads 1
    python benchmarks/bench_linear.py --threads 1 --json linear.json       # the whole matrix, about ten minutes
    python benchmarks/bench_linear.py --out_in 768x768 --tokens 4096 --sparsity 0.9 --block_size 4 1x4 --dtype bfloat16
    python benchmarks/bench_linear.py --tokens 1 8 32 128 --forward_only   # inference of few tokens
    python benchmarks/bench_linear.py --quick --peers --threads 1          # other sparse packages, at B = 1

`--peers` is fairest with one thread: sparselab brings threads of its own, which get in the way of everyone else's.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product

import torch
from _cli import BlockSize, Row, block_size, label, make_parser, pair, run, shared_fields
from _layers import LayerArm, MaskedLinear, check_layer
from _peers import build_peers
from _table import COLUMNS, heading, line
from _timing import Samples, choose_clock, median_ratio, median_seconds, time_in_turn
from torch import nn

from hf_dynsparse import BlockSparseLinear, configure_kernels, topology_summary, use_backend
from hf_dynsparse.ops import BACKENDS, native


SHAPES = ("768x768", "3072x768", "768x3072", "512x512", "2048x512", "512x2048", "256x256", "1024x256")
QUICK = {
    "out_in": [(768, 768), (3072, 768)],
    "tokens": [1024],
    "sparsity": [0.9],
    "block_size": [1, 4, 16],
    "repeats": 5,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=7)
    parser.add_argument(
        "--out_in", type=pair, nargs="+", default=[*map(pair, SHAPES)], help="shapes, such as 3072x768"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024], help="tokens of a batch (4096 1024)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.99], help="(.5 .75 .9 .99)")
    parser.add_argument(
        "--block_size",
        type=block_size,
        nargs="+",
        default=[1, (1, 4), 4, 8, 16, 32, 64],
        help="sides, or rows x columns (1 1x4 4 8 16 32 64)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides (float32)")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="(auto)")
    parser.add_argument("--variant", choices=native.VARIANTS.values(), help="instruction set of the native backend")
    parser.add_argument("--forward_only", action="store_true", help="inference mode, no backward pass")
    parser.add_argument("--peers", action="store_true", help="also sparselab and sparseprop, at B = 1")
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per shape, number of tokens, sparsity and arm."""
    if args.peers and args.dtype != "float32":
        raise ValueError(f"`--peers` compares in float32, all they have. Got --dtype {args.dtype}.")
    print(heading(COLUMNS["bench_linear"]), flush=True)
    rows = []
    forced = nullcontext() if args.backend == "auto" else use_backend(args.backend)
    with forced, native.use_variant(args.variant) if args.variant else nullcontext():
        for tokens, shape, sparsity in product(args.tokens, args.out_in, args.sparsity):
            rows += measure_cell(args, tokens, shape, sparsity)
    return rows


def measure_cell(args: argparse.Namespace, tokens: int, shape: tuple[int, int], sparsity: float) -> list[Row]:
    """Dense, masked dense, every block size and the peers in turn, on one batch."""
    configure_kernels()  # forget what served other cells
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    input = torch.randn(tokens, shape[1], **options).requires_grad_(not args.forward_only)
    grad = None if args.forward_only else torch.randn(tokens, shape[0], **options)
    layers: dict[tuple[BlockSize | None, str], nn.Module] = {
        (None, "dense"): nn.Linear(shape[1], shape[0], **options),
        (None, "masked dense"): MaskedLinear(nn.Linear(shape[1], shape[0], **options), sparsity),
    }
    for size in args.block_size:
        layer = BlockSparseLinear(shape[1], shape[0], size, sparsity, **options)
        check_layer(layer, layer.to_linear(), input, grad)
        layers[size, ""] = layer
    if args.peers:
        linear = BlockSparseLinear(shape[1], shape[0], 1, sparsity, **options).to_linear()
        for name, layer in build_peers(linear).items():
            check_layer(layer, linear, input, grad)
            layers[1, name] = layer
    arms = {key: LayerArm(layer, input, grad).phases for key, layer in layers.items()}
    samples = time_in_turn(arms, choose_clock(args.device), args.repeats)
    where = {"dtype": args.dtype, "out": shape[0], "in": shape[1], "tokens": tokens, "sparsity": sparsity}
    rows = []
    for (size, name), layer in list(layers.items())[1:]:
        backend = name or topology_summary(layer).layers[0].backend
        if args.variant:
            backend = backend.replace("native", f"native {args.variant}")
        fields = {**where, "block_size": None if size is None else label(size), "backend": backend}
        times = figures(samples[size, name], samples[None, "dense"])
        rows.append({**shared_fields(args), **fields, **times})
        print(line(rows[-1], COLUMNS["bench_linear"]), flush=True)
    return rows


def figures(own: Samples, dense: Samples) -> Row:
    """Ratios and seconds of the phases; the backward ones are `None` for forward only."""
    both = len(own[0]) > 1
    return {
        "forward_ratio": median_ratio(own, dense, 0),
        "backward_ratio": median_ratio(own, dense, 1) if both else None,
        "total_ratio": median_ratio(own, dense, 0, 1) if both else None,
        "forward_seconds": median_seconds(own, 0),
        "backward_seconds": median_seconds(own, 1) if both else None,
        "dense_forward_seconds": median_seconds(dense, 0),
        "dense_backward_seconds": median_seconds(dense, 1) if both else None,
    }


if __name__ == "__main__":
    main()
