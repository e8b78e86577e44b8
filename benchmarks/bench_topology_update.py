#!/usr/bin/env python
"""
Time of one topology update of a whole model, optimiser moments included.

    python benchmarks/bench_topology_update.py --preset large --block_size 16 1
"""

import argparse
import statistics
import time

import torch
from _machine import describe_machine

from hf_dynsparse import DynSparseBertConfig, DynSparseBertModel, TopologyUpdater, sparse_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="large", help="size of the BERT")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions")
    parser.add_argument("--block_size", type=int, nargs="+", default=[16, 1], help="sides of the blocks to time")
    parser.add_argument("--regrow_rule", default="random", help="random or unfired")
    parser.add_argument("--repeats", type=int, default=3, help="updates timed per block size")
    args = parser.parse_args()
    print(describe_machine(seed=0))
    torch.manual_seed(0)
    for block_size in args.block_size:
        config = DynSparseBertConfig.preset(args.preset, sparsity=args.sparsity, block_size=block_size)
        model = DynSparseBertModel(config)
        values = [layer.values for layer in sparse_layers(model).values()]
        optimizer = torch.optim.AdamW(values, lr=1e-3, fused=True)
        for value in values:
            value.grad = torch.zeros_like(value)
        optimizer.step()
        steps = args.repeats + 1
        updater = TopologyUpdater(
            model,
            optimizer,
            total_steps=steps + 1,
            num_topology_updates=steps,
            regrow_rule=args.regrow_rule,
            pruning_schedule="constant",
        )
        seconds = []
        for step in updater.update_steps:
            began = time.perf_counter()
            report = updater.step(step)
            seconds.append(time.perf_counter() - began)
        print(
            f"{args.preset} s={args.sparsity} B={block_size}: {len(values)} matrices, {report.removed:,} replaced,"
            f" median {statistics.median(seconds[1:]):.2f} s of {args.repeats} (first, cold: {seconds[0]:.2f} s)"
        )


if __name__ == "__main__":
    main()
