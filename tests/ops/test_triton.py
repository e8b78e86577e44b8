"""
The GPU kernels against the reference: on a GPU where there is one, and everywhere by Triton's interpreter.

Triton decides once in a process whether it interprets, so `test_the_kernels_interpreted` runs this file again in
another.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import copy
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from helpers import error_bound, generator
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_operands import FORMS, must_be_right_or_refused

from hf_dynsparse import BlockLayout
from hf_dynsparse.blocks.layout import layout_of
from hf_dynsparse.ops import reference, triton
from hub_kernel.assemble import assemble


pytestmark = pytest.mark.usefixtures("deterministic")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
]
DEVICE = pytest.param("cpu") if INTERPRETING else pytest.param("cuda", marks=ON_GPU)
on_device = pytest.mark.parametrize("device", [DEVICE])
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])

SIDES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter takes seconds for large blocks: those in one dtype.
INTERPRETED = {32: (torch.float16,), 64: (torch.bfloat16,), 128: (torch.float32,)}
CASES = [(side, dtype) for side in SIDES for dtype in (INTERPRETED.get(side, DTYPES) if INTERPRETING else DTYPES)]

# Block ids on a grid of 3 x 4, in slots out of order.
GRID = (3, 4)
TOPOLOGIES = {
    "one block": [6],
    "one full row": [7, 4, 6, 5],  # the other rows are empty
    "one full column": [10, 2, 6],  # the other columns are empty
    "some": [9, 0, 11, 3, 8],  # row 1 is empty, row 2 is the heaviest
    "every block": [5, 11, 0, 8, 3, 7, 10, 1, 6, 2, 9, 4],
}


class Case:
    """Operands of both products, and what they should be."""

    def __init__(self, side: int, topology: list[int], tokens: int, dtype: torch.dtype, device: str = "cpu") -> None:
        draw = generator(tokens)
        shape, nnzb = (GRID[0] * side, GRID[1] * side), len(topology)
        sizes = {
            "input": (tokens, shape[1]),
            "grad": (tokens, shape[0]),
            "values": (nnzb, side, side),
            "bias": shape[:1],
        }
        self.shape, self.block_shape, self.device = shape, (side, side), device
        self.operands = {name: torch.randn(size, generator=draw).to(dtype) for name, size in sizes.items()}
        self.block_index = torch.tensor(topology, dtype=torch.int32)
        self.on_device = self.block_index.to(device)

    def results(self, products, block_index: torch.Tensor, **to) -> tuple[torch.Tensor, ...]:
        """Output, input gradient and values gradient by the module `products`."""
        input, grad, values, bias = (
            self.operands[name].to(**to).clone() for name in ("input", "grad", "values", "bias")
        )
        layout = layout_of(block_index, self.shape, self.block_shape)
        return (
            products.dds(input, values, layout, bias, False),
            products.dds(grad, values, layout, None, True),
            products.sdd(grad, input, layout),
        )

    def absolute(self) -> "Case":
        other = copy(self)
        other.operands = {name: operand.abs() for name, operand in self.operands.items()}
        return other

    def ours(self) -> tuple[torch.Tensor, ...]:
        return self.results(triton, self.on_device, device=self.device)

    def check(self, label: object = "") -> None:
        """Compare with the dense product in float64."""
        dtype = self.operands["values"].dtype
        exact = self.results(reference, self.block_index, dtype=torch.float64)
        sizes = self.absolute().results(reference, self.block_index, dtype=torch.float64)
        names = ("output", "input gradient", "values gradient")
        terms = self.shape[1] + 1, self.shape[0], self.operands["input"].shape[0]
        for name, truth, size, count, ours in zip(names, exact, sizes, terms, self.ours(), strict=True):
            assert ours.dtype == dtype
            assert ours.shape == truth.shape
            without_bias = truth - self.operands["bias"].double() if name == "output" else truth
            error = float((ours.cpu().double() - truth).norm())
            allowed = error_bound(dtype, count, size, truth, without_bias)
            if INTERPRETING and dtype == torch.bfloat16:
                allowed *= 2  # the interpreter cuts sums to bfloat16 where a GPU rounds them
            assert error <= allowed, (name, label, error, allowed)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="is what runs")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-n0", "-q", "-p", "no:cacheprovider", "-k", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@on_device
@pytest.mark.parametrize(("side", "dtype"), CASES, ids=str)
def test_products_agree_with_the_reference(side: int, dtype: torch.dtype, device: str) -> None:
    for name, topology in TOPOLOGIES.items():
        Case(side, topology, 75, dtype, device).check(name)
    Case(side, TOPOLOGIES["some"], 1, dtype, device).check("one token")


@on_device
@pytest.mark.parametrize(("side", "dtype"), CASES, ids=str)
def test_every_tile_of_every_table(
    side: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = set()
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(triton, "_capability", lambda _, capability=capability: capability)
        for few, many in ((0, 1000), (0, 0)):
            monkeypatch.setattr(triton, "FEW_TOKENS", few)
            monkeypatch.setattr(triton, "MANY_TOKENS", many)
            pair = triton.gather_tile(capability, side, dtype, 300), triton.sample_tile(capability, side, dtype)
            if pair not in tiles:
                tiles.add(pair)
                Case(side, TOPOLOGIES["some"], 300, dtype, device).check(pair)
    assert len(tiles) == (1 if dtype == torch.float32 else 3 if side == 64 else 2)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_tokens_add_up_the_same_way_every_time(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "PROGRAMS_PER_PROCESSOR", 1000)
    tile = triton.sample_tile(triton._capability(torch.device(device)), 16, dtype)
    assert triton.split(530, 3, 8, tile.tokens)[0] > 1
    case = Case(16, TOPOLOGIES["some"], 530, dtype, device)
    case.check()
    for one, again in zip(case.ours(), case.ours(), strict=True):
        assert torch.equal(one, again)


@on_device
def test_features_without_blocks_are_not_read(device: str) -> None:
    case = Case(16, [1, 2, 5, 11, 7], 20, torch.float32, device)
    case.operands["input"][:, :16] = torch.nan  # no block in column 0
    output, _, of_values = case.ours()
    assert output.isfinite().all()
    assert of_values.isfinite().all()


@on_device
def test_no_tokens(device: str) -> None:
    output, of_input, of_values = Case(16, TOPOLOGIES["some"], 0, torch.float32, device).ours()
    assert output.shape == (0, 48)
    assert of_input.shape == (0, 64)
    assert of_values.shape == (5, 16, 16)
    assert not of_values.any()


@on_device
def test_an_order_follows_the_index_it_comes_from(device: str) -> None:
    case = Case(32, TOPOLOGIES["some"], 9, torch.float32, device)
    case.check("before")
    for index in (case.block_index, case.on_device):
        index[:2] = torch.tensor([1, 5])  # rows 0 and 1: what was empty is not, what was heaviest is not
    case.check("after")


@on_device
def test_tokens_that_are_not_contiguous(device: str) -> None:
    case = Case(16, TOPOLOGIES["some"], 6, torch.float32, device)
    for name in ("input", "grad", "values"):
        case.operands[name] = case.operands[name].transpose(0, -1).contiguous().transpose(0, -1)
    case.check()


@on_gpu
def test_nothing_waits_for_the_gpu(device: str) -> None:
    case = Case(16, TOPOLOGIES["some"], 75, torch.float16, device)
    operands = {name: operand.to(device) for name, operand in case.operands.items()}
    case.ours()  # compiles
    case.on_device.add_(0)  # a new version: the orders are derived again
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = layout_of(case.on_device, case.shape, case.block_shape)
        triton.dds(operands["input"], operands["values"], layout, operands["bias"], False)
        triton.sdd(operands["grad"], operands["input"], layout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
def test_a_captured_graph_follows_the_topology(device: str) -> None:
    case = Case(16, TOPOLOGIES["some"], 75, torch.float16, device)
    input, values, bias = (case.operands[name].to(device) for name in ("input", "values", "bias"))
    case.ours()  # compiles, and fills the cache with orders that must not end up in the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = triton.dds(input, values, layout_of(case.on_device, case.shape, case.block_shape), bias, False)
    for topology in (TOPOLOGIES["some"], [1, 5, 11, 3, 8]):
        case.block_index.copy_(torch.tensor(topology))
        case.on_device.copy_(case.block_index)
        graph.replay()
        expected = case.results(reference, case.block_index, dtype=torch.float64)[0]
        assert (output.cpu().double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@on_gpu
@pytest.mark.parametrize(("setting", "least", "most"), [("ieee", 0, 1e-6), ("tf32", 1e-5, 1e-3)])
def test_tf32_only_where_it_is_allowed(
    setting: str, least: float, most: float, device: str, fp32_precision: None
) -> None:
    case = Case(32, TOPOLOGIES["every block"], 75, torch.float32, device)
    torch.backends.cuda.matmul.fp32_precision = setting
    for ours, exact in zip(case.ours(), case.results(reference, case.block_index, dtype=torch.float64), strict=True):
        assert least <= (ours.cpu().double() - exact).norm() / exact.norm() <= most


def test_the_precision_is_that_of_torch(fp32_precision: None) -> None:
    for setting in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert triton._precision() == setting


@on_gpu
def test_offsets_beyond_32_bits(device: str) -> None:
    side, tokens = 16, 2**31 // 64 + 5
    if torch.cuda.get_device_properties(0).total_memory < 4 * tokens * 64 * 2:
        pytest.skip("needs 17 GiB of GPU memory")
    case = Case(side, TOPOLOGIES["every block"], 5, torch.float16, device)
    expected = case.results(reference, case.block_index, dtype=torch.float64)
    input = torch.zeros(tokens, case.shape[1], dtype=torch.float16, device=device)
    grad = torch.zeros(tokens, case.shape[0], dtype=torch.float16, device=device)
    input[-5:], grad[-5:] = case.operands["input"], case.operands["grad"]
    values, bias = case.operands["values"].to(device), case.operands["bias"].to(device)
    layout = layout_of(case.on_device, case.shape, case.block_shape)
    output = triton.dds(input, values, layout, bias, False)[-5:]
    of_input = triton.dds(grad, values, layout, None, True)[-5:]
    of_values = triton.sdd(grad, input, layout)
    for ours, exact in zip((output, of_input, of_values), expected, strict=True):
        assert (ours.cpu().double() - exact).norm() <= 1e-3 * exact.norm()


@on_device
@pytest.mark.parametrize("form", FORMS)
def test_operands_drawn_at_random_give_the_right_result_or_an_error(form: str, device: str) -> None:
    # The interpreter takes long: few of those that fit meet blocks that this backend serves.
    outcomes = must_be_right_or_refused(form, ["triton"], range(200))
    assert min(outcomes["right"], outcomes["refused"]) > 5


@on_device
def test_the_kernel_repository_by_itself(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kernels.get_kernel` loads it: from its folder, under the name in metadata.json."""
    folder = assemble(tmp_path / "kernel")
    metadata = json.loads((folder / "metadata.json").read_text())
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*")} - {"blocks", "ops", "metadata.json"}
    assert set(metadata["digest"]["files"]) == files
    spec = spec_from_file_location(metadata["id"], folder / "__init__.py")
    kernel = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, metadata["id"], kernel)
    spec.loader.exec_module(kernel)
    assert kernel.sdd.__module__ == f"{metadata['id']}.ops.triton"  # not the package's

    case = Case(16, TOPOLOGIES["some"], 75, torch.float32, device)
    grad = case.operands["grad"].to(device)
    given = [case.operands[name].to(device).clone().requires_grad_() for name in ("input", "values", "bias")]
    input, values, bias = given

    def results() -> tuple[torch.Tensor, ...]:
        several = input.unflatten(0, (3, 25))
        output = kernel.block_sparse_linear(several, values, case.on_device, bias, case.shape[0]).flatten(0, 1)
        of_input, of_values, of_bias = torch.autograd.grad(output, given, grad)
        torch.testing.assert_close(of_bias, grad.sum(0))
        return output.detach(), of_input, of_values

    monkeypatch.setattr(case, "ours", results)
    case.check()
    case.on_device[0] = 11
    with pytest.raises(ValueError, match="must name each block once. Got 11 twice"):
        results()
    with pytest.raises(ValueError, match="This kernel needs blocks of 16 x 16, .* Got torch.float32 on .* of 8 x 8"):
        kernel.block_sparse_linear(input, values[:, :8, :8], case.on_device, bias, case.shape[0])


def test_groups_by_hand() -> None:
    #   . 1 .      slots: 3 of block 1, 0 of block 5, 2 of block 3, 1 of block 4
    #   2 3 0
    layout = BlockLayout(torch.tensor([5, 4, 3, 1], dtype=torch.int32), (2, 3), (1, 1))
    groups = triton.group_order(layout, 2)
    assert groups.rows.tolist() == [0, 1, 1, -1]
    assert groups.starts.tolist() == [0, 1, 3, 0]


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (5, 7)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 8])
def test_groups_hold_every_entry_once(grid: tuple[int, int], group: int) -> None:
    for seed in range(20):
        nnzb = 1 + seed * (grid[0] * grid[1] - 1) // 19
        index = torch.randperm(grid[0] * grid[1], generator=generator(seed))[:nnzb].int()
        order = triton.group_order(BlockLayout(index, grid, (1, 1)), group)
        entries = []
        for row, start in zip(order.rows.tolist(), order.starts.tolist(), strict=True):
            if row >= 0:
                held = range(start, min(start + group, int(order.order.offsets[row + 1])))
                assert held
                assert [int(index[order.order.slots[entry]]) // grid[1] for entry in held] == [row] * len(held)
                entries += held
        assert sorted(entries) == list(range(nnzb))


def test_orders_have_shapes_that_no_topology_changes() -> None:
    # A tensor without data: whatever would look at the topology, and so wait for a GPU, raises.
    with FakeTensorMode():
        layout = BlockLayout(torch.empty(9, dtype=torch.int32), (5, 7), (1, 1))
        order = triton.group_order(layout, 4)
        assert layout.by_column.offsets.shape == (8,)
        assert layout.by_column.heaviest.shape == (7,)
    assert order.order.offsets.shape == (6,)
    assert order.rows.shape == order.starts.shape == (7,)
    assert order.rows.dtype == order.starts.dtype == order.order.sources.dtype == torch.int32


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 1000, 16384])
@pytest.mark.parametrize("groups", [1, 14, 2000])
def test_splits_hold_every_token_once_in_whole_tiles(tokens: int, groups: int) -> None:
    splits, split_tokens = triton.split(tokens, groups, 132, 64)
    assert split_tokens % 64 == 0
    assert (splits - 1) * split_tokens < max(1, tokens)
    assert tokens <= splits * split_tokens
    assert splits == 1 or split_tokens >= 4 * 64
    assert splits * groups < 2 * triton.PROGRAMS_PER_PROCESSOR * 132 or splits == 1


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(triton, "_has_triton", lambda: False)
    assert "pip install triton" in triton.why_not(gpu, torch.float32, (16, 16))
    monkeypatch.setattr(triton, "_has_triton", lambda: True)
    monkeypatch.setattr(triton, "_is_interpreted", lambda: False)
    monkeypatch.setattr(triton, "_capability", lambda device: (8, 0))
    assert "NVIDIA GPUs" in triton.why_not(cpu, torch.float32, (16, 16))
    assert "float32, float16, bfloat16" in triton.why_not(gpu, torch.float64, (16, 16))
    for block_shape in ((8, 8), (16, 32), (256, 256)):
        assert "128 x 128" in triton.why_not(gpu, torch.float16, block_shape)
    assert [triton.why_not(gpu, dtype, (side, side)) for side in SIDES for dtype in DTYPES] == [None] * 12
    monkeypatch.setattr(triton, "_capability", lambda device: (7, 5))
    assert "8.0 or higher" in triton.why_not(gpu, torch.float32, (16, 16))
    monkeypatch.setattr(triton, "_is_interpreted", lambda: True)
    assert triton.why_not(cpu, torch.float32, (16, 16)) is None
