#!/usr/bin/env python
"""
Seconds of a whole training step, sparse against its dense twin: same process, head, optimiser and data, steps in turn.

    python benchmarks/bench_step.py --preset mini --block_size 1 4 16 --threads 1
"""

import argparse
import statistics
import time

import torch
from _machine import describe_machine

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, topology_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", help="size of the BERT")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions")
    parser.add_argument("--block_size", type=int, nargs="+", default=[1, 4, 16], help="sides of the blocks to time")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per step")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--vocab_size", type=int, default=8192, help="size of the vocabulary")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe_machine(seed=0))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input_ids = torch.randint(5, args.vocab_size, (args.batch_size, args.seq_len), device=device)
    masked = torch.rand(input_ids.shape, device=device) < 0.15
    batch = {"input_ids": input_ids, "labels": torch.where(masked, input_ids, -100)}
    variants = {"dense": (0.0, 1)} | {f"s={args.sparsity} B={side}": (args.sparsity, side) for side in args.block_size}
    models = {}
    for name, (sparsity, side) in variants.items():
        config = DynSparseBertConfig.preset(
            args.preset, sparsity=sparsity, block_size=side, vocab_size=args.vocab_size
        )
        model = DynSparseBertForMaskedLM(config).to(device)
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for model, optimizer in models.values():
        timed_step(model, optimizer, batch)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, (model, optimizer) in models.items():
            seconds[name].append(timed_step(model, optimizer, batch))
    for name, (model, _) in models.items():
        ratio = statistics.median(own / dense for own, dense in zip(seconds[name], seconds["dense"], strict=True))
        backends = {layer.backend for layer in topology_summary(model).layers} or {"nn.Linear"}
        print(
            f"{args.preset} {name:12} median {statistics.median(seconds[name]):.3f} s a step, {ratio:.3f} of dense "
            f"({', '.join(sorted(backends))})"
        )


def timed_step(
    model: DynSparseBertForMaskedLM, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> float:
    """Seconds of forward, backward, clipping and optimiser step."""
    began = time.perf_counter()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
