"""What the ranks of a data parallel run exchange in a step: gradients of active blocks, and of all that is dense."""

import importlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_dynsparse import topology_summary


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, in a group of this process alone: its buckets are those of every rank."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield importlib.import_module("bench_ddp_bytes")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("sparsity", "size"), [(0.9, 16), (0.75, 8), (0.9, 1), (0.5, (1, 4))], ids=str)
def test_bytes_of_sparse_layers_fall_to_the_density(
    bench: ModuleType, sparsity: float, size: int | tuple[int, int]
) -> None:
    args = Namespace(preset="tiny", sparsity=sparsity, block_size=size, vocab_size=300)
    summary = topology_summary(bench.build_twins(args)[0])
    (ours, dense), rest = bench.compare(args).values()
    assert (ours, dense) == (4 * summary.nnz, 4 * summary.positions)
    assert rest[0] == rest[1] > 0
