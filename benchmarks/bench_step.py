#!/usr/bin/env python
"""
Seconds of a whole training step (forward, backward, clipping, optimiser) of BERT: sparse, against its dense twin and
against stock transformers. All sides in turn in one process: same batch, dropout, fused AdamW and allocator.

The dense twin computes the head at masked positions only, its dropout masks by a hash, and fused passes between the
products, as the sparse model does; stock does none of it. So what is gained over the twin comes from sparsity, and the
rest of the gain over stock does not.

    python benchmarks/bench_step.py --quick
    python benchmarks/bench_step.py --preset medium --batch_size 32 --block_size 1 4 16 --threads 1 --json step.json
    python benchmarks/bench_step.py --preset base --dropout 0 --batch_size 8 --keep_freed_memory
    python benchmarks/bench_step.py --preset base --memory            # peak memory too, each side in its own process
    python benchmarks/bench_step.py --equal_flops --block_size 16     # sparse Base against dense Small
    python benchmarks/bench_step.py --preset mini --position_bias alibi --vocab_size 8192 --seq_len 64 --batch_size 16
"""

import argparse
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _bert import Arm, add_model_arguments, backend_of, build_model, check_training, make_batch, make_config
from _cli import Row, label, make_parser, prepare_process, run, shared_fields
from _table import COLUMNS, heading, line
from _timing import Samples, choose_clock, median_ratio, median_seconds, time_in_turn
from transformers import PreTrainedModel

from hf_dynsparse import flops_per_sequence, fuse_passes_, seed_dropout_
from hf_dynsparse.models.position_bias import KINDS


QUICK = {"preset": "mini", "batch_size": 8, "vocab_size": 8192, "repeats": 5}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=5)
    add_model_arguments(parser, preset="medium", sizes=[1, 4, 16])
    parser.add_argument("--batch_size", type=int, default=32, help="sequences of a step (%(default)s)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a sequence (%(default)s)")
    parser.add_argument(
        "--torch_dropout", action="store_true", help="PyTorch's dropout on all sides, not only stock's"
    )
    parser.add_argument(
        "--separate_passes", action="store_true", help="no fused passes between the products, on any side"
    )
    parser.add_argument("--dropout", type=float, help="on all sides (the preset's: 0 up to small, else 0.1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--memory", action="store_true", help="also peak memory of two steps, model included (Linux)")
    parser.add_argument(
        "--equal_flops", action="store_true", help="sparse Base against dense Small, tokens per second"
    )
    parser.add_argument(
        "--position_bias", choices=KINDS, help="also what a distance bias costs: the dense twin and sparse with one"
    )
    run(parser, measure, argv, QUICK)


def choose_arms(args: argparse.Namespace) -> list[Arm]:
    """The dense twin comes first; those with a distance bias last."""
    arms = _choose_arms(args)
    biased = [arm for arm in arms if args.position_bias and arm.kind in ("dense", "sparse")]
    return [*arms, *(replace(arm, position_bias=args.position_bias) for arm in biased)]


def _choose_arms(args: argparse.Namespace) -> list[Arm]:
    sparse = [Arm("sparse", args.preset, sparsity, size) for sparsity in args.sparsity for size in args.block_size]
    if args.equal_flops:
        return [Arm("dense", "small"), *(Arm("sparse", "base", arm.sparsity, arm.block_size) for arm in sparse)]
    others = [Arm("dense", args.preset), Arm("stock", args.preset), Arm("masked dense", args.preset, args.sparsity[0])]
    return [*others, *sparse]


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per arm."""
    arms = choose_arms(args)
    memory = measure_memory(args, arms) if args.memory else {}
    steps, models = {}, {}
    for arm in arms:
        models[arm], steps[arm] = prepare_step(args, arm)
        if arm.kind == "sparse" and arm.position_bias is None:  # stock classes have no bias to compare with
            batch = make_batch(args.batch_size, args.seq_len, args.vocab_size, args.device)
            check_training(models[arm], batch, args.dtype)
    samples = time_in_turn({arm: (step,) for arm, step in steps.items()}, choose_clock(args.device), args.repeats)
    rows = [make_row(args, arm, models[arm], samples, memory.get(arm)) for arm in arms]
    print(f"{args.batch_size} x {args.seq_len} tokens, vocabulary {args.vocab_size}, {args.dtype}; how much faster:")
    print(f"over dense {arms[0].preset} with its head at masked positions, over stock with its head at all positions")
    print("\n".join([heading(COLUMNS["bench_step"]), *(line(row, COLUMNS["bench_step"]) for row in rows)]))
    for arm, row in zip(arms, rows, strict=True):
        if arm.position_bias is not None:
            print(f"{arm.name}: {row['ratio_without_bias']:.3f} of the time without a distance bias")
    return rows


def prepare_step(args: argparse.Namespace, arm: Arm) -> tuple[PreTrainedModel, Callable[[], None]]:
    """A model and the step that is timed."""
    model = build_model(arm, make_config(arm, args.vocab_size, args.seq_len, args.dropout), head=True)
    model.to(args.device).train()
    if arm.kind != "stock" and not args.torch_dropout:
        seed_dropout_(model)
    if arm.kind != "stock" and not args.separate_passes:
        fuse_passes_(model)
    batch = make_batch(args.batch_size, args.seq_len, args.vocab_size, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def make_row(
    args: argparse.Namespace, arm: Arm, model: PreTrainedModel, samples: dict[Arm, Samples], memory: int | None
) -> Row:
    dense = next(iter(samples))
    stock = next((other for other in samples if other.kind == "stock"), None)
    seconds, flops = median_seconds(samples[arm]), arm_flops(args, arm)
    return {
        **shared_fields(args),
        "dtype": args.dtype,
        "kind": arm.kind,
        "preset": arm.preset,
        "batch": args.batch_size,
        "seq_len": args.seq_len,
        "vocab": args.vocab_size,
        "dropout": model.config.hidden_dropout_prob,
        "torch_dropout": args.torch_dropout,
        "separate_passes": args.separate_passes,
        "sparsity": arm.sparsity,
        "block_size": None if arm.block_size is None else label(arm.block_size),
        "position_bias": arm.position_bias,
        "backend": backend_of(model),
        "seconds": seconds,
        "tokens_per_second": args.batch_size * args.seq_len / seconds,
        "dense_preset": dense.preset,
        "ratio_dense": median_ratio(samples[arm], samples[dense]),
        "ratio_stock": median_ratio(samples[arm], samples[stock]) if stock else None,
        "ratio_without_bias": median_ratio(samples[arm], samples[replace(arm, position_bias=None)]),
        "flops_per_sequence": flops,
        "flops_ratio": flops / arm_flops(args, dense),
        "peak_memory_bytes": memory,
    }


def arm_flops(args: argparse.Namespace, arm: Arm) -> int:
    """Training FLOPs of a sequence by the paper's count, heads and embeddings left out; a mask saves none."""
    return flops_per_sequence(make_config(arm, args.vocab_size, args.seq_len, args.dropout), args.seq_len)


def measure_memory(args: argparse.Namespace, arms: list[Arm]) -> dict[Arm, int]:
    """Peak bytes of building an arm and of two steps, above what Python and its libraries take; a process an arm."""
    if args.device.type != "cpu" or not Path("/proc/self/status").is_file():
        raise ValueError("`--memory` reads /proc, so it needs Linux and --device cpu. Leave it out.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_dynsparse.models"])  # imported once; the server computes nothing itself
    peaks = {}
    for arm in arms:
        with context.Pool(1) as pool:
            peaks[arm] = pool.apply(peak_bytes, (args, arm))
    return peaks


def peak_bytes(args: argparse.Namespace, arm: Arm) -> int:
    """In a process of its own."""
    prepare_process(args)
    gc.collect()
    before = resident_bytes("VmRSS")
    _, step = prepare_step(args, arm)
    for _ in range(2):  # the optimiser's moments appear in the first
        step()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS`, what this process holds in memory, or `VmHWM`, the most it ever held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
