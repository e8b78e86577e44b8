#!/usr/bin/env python
"""
Bytes that data parallel training (DDP) sums over the ranks in one step, of a sparse model against its dense twin:
counted in the buckets that two processes exchange. Beside them the bytes of the encoder in a checkpoint.

    python benchmarks/bench_ddp_bytes.py --preset medium --sparsity 0.9 --block_size 16
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from _bert import Arm, Batch, build_model, make_batch, make_config
from _cli import SEED, block_size
from _machine import describe_machine
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_dynsparse import sparse_layers, topology_summary
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes


RANKS, SEQ_LEN = 2, 64


def count_bytes(model: nn.Module, batch: Batch) -> Counter[str]:
    """
    Bytes that one backward pass under DDP hands over to be summed, by name of the parameter; under "" all of them as
    the buckets have them. The process group must exist.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    sent: Counter[str] = Counter()

    def count(_: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[""] += bucket.buffer().nbytes
        for parameter in bucket.parameters():
            sent[names[parameter]] += parameter.nbytes
        return allreduce_hook(None, bucket)

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    parallel(**batch).loss.backward()
    return sent


def build_twins(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The sparse model and the dense one with the same outputs."""
    arm = Arm("sparse", args.preset, args.sparsity, args.block_size)
    model = build_model(arm, make_config(arm, args.vocab_size, SEQ_LEN, 0.0), head=True)
    return model, model.to_dense()


def compare(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Bytes of the sparse layers' weights and of all else, in the sparse model and in its twin."""
    model, twin = build_twins(args)
    batch = make_batch(2, SEQ_LEN, args.vocab_size, torch.device("cpu"))
    sent, dense = count_bytes(model, batch), count_bytes(twin, batch)
    layers = sparse_layers(model)
    ours = sum(sent[f"{name}.values"] for name in layers)
    theirs = sum(dense[f"{name}.weight"] for name in layers)
    return {
        "gradients of the sparse layers": (ours, theirs),
        "all other gradients": (sent[""] - ours, dense[""] - theirs),
    }


def show(what: str, ours: int, theirs: int) -> None:
    print(f"{what:30} {ours:13,} bytes, {ours / theirs:.6f} of dense")


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    """One of the ranks; the first prints."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    for what, (ours, theirs) in compare(args).items():
        if rank == 0:
            show(what, ours, theirs)
    distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="medium", help="size of the BERT (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions (%(default)s)")
    parser.add_argument("--block_size", type=block_size, default=16, help="side, or rows x columns (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=30522, help="size of the vocabulary (%(default)s)")
    args = parser.parse_args(argv)
    print(f"{describe_machine(SEED)}; {RANKS} ranks over gloo")
    model, _ = build_twins(args)
    print(f"density of the sparse layers   {1 - topology_summary(model).sparsity:.6f}")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, args), nprocs=RANKS)
        model.save_pretrained(folder)
        show("encoder in the checkpoint", checkpoint_bytes(folder, ".encoder."), dense_bytes(model, ".encoder."))


if __name__ == "__main__":
    main()
