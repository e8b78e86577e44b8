#!/usr/bin/env python
"""
Bytes of the sparse layers (parameters, index and Adam moments) against their dense twins, and the peak memory of
building the model.

    python benchmarks/bench_footprint.py --preset large --block_size 16
"""

import argparse
import resource
import tempfile

import torch
from _machine import describe_machine

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, sparse_layers
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.reports.layers import model_facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="large", help="size of the BERT")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of inactive positions")
    parser.add_argument("--block_size", type=int, default=16, help="side of the blocks")
    args = parser.parse_args()
    print(describe_machine(seed=0))
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = DynSparseBertForMaskedLM(
        DynSparseBertConfig.preset(args.preset, sparsity=args.sparsity, block_size=args.block_size)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers = sparse_layers(model).values()
    optimizer = torch.optim.AdamW([layer.values for layer in layers], lr=1e-3, fused=True)
    for layer in layers:
        layer.values.grad = torch.zeros_like(layer.values)
    optimizer.step()
    moments = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
        if tensor.dim()
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        encoder = checkpoint_bytes(folder, ".encoder.")
    sizes, dense_encoder = model_facts(model).layers, model_facts(model, ".encoder.").dense_bytes
    print(f"{args.preset} s={args.sparsity} B={args.block_size}, {len(layers)} sparse matrices")
    stored, dense = sum(layer.bytes for layer in sizes) + moments, sum(layer.dense_bytes for layer in sizes)
    print(f"values + index + moments   {stored / 1e6:9.1f} MB   {stored / (3 * dense):.4f} of dense")
    print(f"encoder in the checkpoint  {encoder / 1e6:9.1f} MB   {encoder / dense_encoder:.4f} of dense")
    print(f"peak memory while building {peak - before:9.1f} MiB  (dense encoder alone: {dense_encoder / 2**20:.1f})")


if __name__ == "__main__":
    main()
