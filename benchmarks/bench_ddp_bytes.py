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
from _cli import SEED, block_size, label
from _machine import describe_machine
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hf_dynsparse import sparse_layers, topology_summary
from hf_dynsparse.summary import checkpoint_bytes, dense_bytes


RANKS = 2


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


def compare(preset: str, sparsity: float, size: int | tuple[int, int], vocab_size: int) -> dict[str, Any]:
    """One row: bytes of the sparse layers and of all else, in the sparse model and in its dense twin."""
    arm = Arm("sparse", preset, sparsity, size)
    model = build_model(arm, make_config(arm, vocab_size, 64, 0.0), head=True)
    twin, layers, batch = model.to_dense(), sparse_layers(model), make_batch(2, 64, vocab_size, torch.device("cpu"))
    sent, dense = count_bytes(model, batch), count_bytes(twin, batch)
    ours, theirs = (
        sum(counted[f"{name}.{parameter}"] for name in layers)
        for counted, parameter in ((sent, "values"), (dense, "weight"))
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        encoder = checkpoint_bytes(folder, ".encoder.")
    return {
        "model": arm.name,
        "density": 1.0 - topology_summary(model).sparsity,
        "layers": (ours, theirs),
        "rest": (sent[""] - ours, dense[""] - theirs),
        "checkpoint": (encoder, dense_bytes(model, ".encoder.")),
    }


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    """One of the ranks; the first prints."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    row = compare(args.preset, args.sparsity, args.block_size, args.vocab_size)
    if rank == 0:
        print(f"{row['model']}, B={label(args.block_size)}: density of the sparse layers {row['density']:.6f}")
        for part, what in (("layers", "gradients of the sparse layers"), ("rest", "all other gradients")):
            print(f"{what:32} {row[part][0]:13,} bytes a step, {row[part][0] / row[part][1]:.6f} of dense")
        print(
            f"{'encoder in the checkpoint':32} {row['checkpoint'][0]:13,} bytes, "
            f"{row['checkpoint'][0] / row['checkpoint'][1]:.6f} of dense"
        )
    distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="medium", help="size of the BERT (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions (%(default)s)")
    parser.add_argument("--block_size", type=block_size, default=16, help="side, or rows x columns (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=30522, help="size of the vocabulary (%(default)s)")
    args = parser.parse_args(argv)
    print(f"{describe_machine(SEED)}; {RANKS} ranks over gloo")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, args), nprocs=RANKS)


if __name__ == "__main__":
    main()
