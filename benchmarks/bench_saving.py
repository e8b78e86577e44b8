#!/usr/bin/env python
"""
Seconds of one checkpoint of a run, and how many of them go into waiting for the disk (`fsync`): with and without it in
turn. Wall time; what counts is the disk of `--folder`.

    python benchmarks/bench_saving.py --preset base --folder runs
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from _machine import describe_machine

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, DynSparseTrainer, DynSparseTrainingArguments


FSYNC = {"flushed": os.fsync, "not flushed": lambda descriptor: None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="size of the BERT")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions")
    parser.add_argument("--block_size", type=int, default=16, help="side of the blocks")
    parser.add_argument("--folder", default=".", help="where to save, and remove it again")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints saved each way")
    args = parser.parse_args()
    print(describe_machine(seed=0))
    torch.manual_seed(0)
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        trainer = trained(folder, args)
        seconds: dict[str, list[float]] = {way: [] for way in FSYNC}
        for _ in range(args.repeats + 1):
            for way, taken in seconds.items():
                with mock.patch("os.fsync", FSYNC[way]):
                    began = time.perf_counter()
                    trainer._save_checkpoint(trainer.model, None)
                    taken.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in Path(folder, "checkpoint-1").iterdir())
    print(f"{args.preset} s={args.sparsity} B={args.block_size}: a checkpoint of {size / 1e6:.1f} MB in {args.folder}")
    for way, taken in seconds.items():
        warm = sorted(taken[1:])
        print(f"{way:<12} median {statistics.median(warm):7.3f} s, {warm[0]:.3f} to {warm[-1]:.3f} s of {len(warm)}")


def trained(folder: str, args: argparse.Namespace) -> DynSparseTrainer:
    """A trainer after one step, so that there are moments to save."""
    config = DynSparseBertConfig.preset(args.preset, sparsity=args.sparsity, block_size=args.block_size)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 2
    quiet = {"disable_tqdm": True, "dataloader_pin_memory": False, "kernel_tuning": "off", "report_to": "none"}
    settings = DynSparseTrainingArguments(folder, max_steps=1, num_topology_updates=0, save_strategy="steps", **quiet)
    trainer = DynSparseTrainer(DynSparseBertForMaskedLM(config), settings, train_dataset=rows)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
