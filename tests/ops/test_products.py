"""Every backend against a dense product, output and all gradients."""

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import (
    BLOCK_SIZES,
    DENSITIES,
    DTYPES,
    GRIDS,
    blocks_of,
    cover_pairs,
    dense_weight,
    error_bound,
    generator,
    make_layer,
    needs_kernels,
    serving,
    sides,
)
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dynsparse import BlockLayout
from hf_dynsparse.ops import BACKENDS, backends, block_sparse_linear, choice, tiled, use_backend
from hf_dynsparse.ops.operators import linear as sparse_linear
from hf_dynsparse.ops.operators import linear_backward


pytestmark = pytest.mark.usefixtures("deterministic")

TOKENS = ((7,), (0,), (1,), (64,), (2, 3), (2, 0), (2, 3, 4), ())

# Every supported combination of the first three; every two values of any two columns meet.
TABLE = cover_pairs(
    [
        (backend, block_size, dtype)
        for block_size, dtype in product(BLOCK_SIZES, DTYPES)
        for backend in serving(block_size, dtype)
    ],
    GRIDS,
    DENSITIES,
    TOKENS,
)
NAMES = ("output", "input gradient", "values gradient", "bias gradient")


@dataclass(frozen=True)
class Case:
    """Operands of a forward and a backward pass."""

    input: torch.Tensor
    values: torch.Tensor
    block_index: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        converted = {name: getattr(self, name).to(dtype) for name in ("input", "values", "bias", "grad")}
        return replace(self, **converted)

    def absolute(self) -> "Case":
        positive = {name: getattr(self, name).abs() for name in ("input", "values", "bias", "grad")}
        return replace(self, **positive)

    def sparse(self) -> tuple[torch.Tensor, ...]:
        """Output and gradients of the package."""
        leaves = [tensor.detach().requires_grad_() for tensor in (self.input, self.values, self.bias)]
        output = block_sparse_linear(leaves[0], leaves[1], self.block_index, leaves[2], self.bias.numel())
        return output.detach(), *torch.autograd.grad(output, leaves, self.grad)

    def dense(self) -> tuple[torch.Tensor, ...]:
        """Output and gradients of a dense layer."""
        shape = self.bias.numel(), self.input.shape[-1]
        weight = dense_weight(self.values, self.block_index, shape)
        leaves = [tensor.detach().requires_grad_() for tensor in (self.input, weight, self.bias)]
        output = linear(*leaves)
        of_input, of_weight, of_bias = torch.autograd.grad(output, leaves, self.grad)
        return output.detach(), of_input, blocks_of(of_weight, self.block_index, self.values.shape[1:]), of_bias


def make_case(
    grid: tuple[int, int],
    block_size: int | tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float64,
    tokens: tuple[int, ...] = (7,),
) -> Case:
    layer = make_layer(grid, block_size, max(1, round(density * grid[0] * grid[1])), dtype=torch.float64)
    draw = generator(1)
    case = Case(
        torch.randn(*tokens, layer.in_features, generator=draw, dtype=torch.float64),
        layer.values.detach(),
        layer.block_index,
        layer.bias.detach(),
        torch.randn(*tokens, layer.out_features, generator=draw, dtype=torch.float64),
    )
    return case.to(dtype)


def check(case: Case, label: object = "", found: tuple[torch.Tensor, ...] | None = None) -> None:
    """Output and gradients, those of the package unless others were `found`, against the dense layer in float64."""
    dtype, double = case.values.dtype, case.to(torch.float64)
    truth, sizes = double.dense(), double.absolute().dense()
    tokens = case.input.shape[:-1].numel()
    terms = case.input.shape[-1] + 1, case.bias.numel(), tokens, tokens
    for name, exact, size, count, ours in zip(NAMES, truth, sizes, terms, found or case.sparse(), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        without_bias = exact - double.bias if name == "output" else exact
        error, allowed = float((ours.double() - exact).norm()), error_bound(dtype, count, size, exact, without_bias)
        assert error <= allowed, (name, label, error, allowed)


@pytest.mark.parametrize(("backend", "block_size", "dtype", "grid", "density", "tokens"), TABLE, ids=str)
def test_products_agree_with_the_dense_layer(
    backend: str,
    block_size: int | tuple[int, int],
    dtype: torch.dtype,
    grid: tuple[int, int],
    density: float,
    tokens: tuple[int, ...],
) -> None:
    with use_backend(backend):
        check(make_case(grid, block_size, density, dtype, tokens))


def test_the_backend_that_the_docs_write_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[2] / "docs" / "performance.md"
    (code,) = re.findall(r"^```python\n(# my_backend.*?)^```", docs.read_text(encoding="utf-8"), re.M | re.S)
    table = dict(BACKENDS)
    for module in (backends, choice):
        monkeypatch.setattr(module, "BACKENDS", table)
    exec(code, {})
    with use_backend("mine"):
        for block_size in BLOCK_SIZES:
            check(make_case((3, 5), block_size, 0.4, torch.float32), block_size)


@pytest.mark.parametrize(
    ("backend", "least"),
    [
        pytest.param("native", 2 * 6, marks=needs_kernels),  # dtypes, block shapes
        ("gather", 4 * 2),
        ("workspace", 4 * 8),
        ("tiled", 4 * 8),
        ("reference", 4 * 8),
    ],
)
def test_the_table_holds_what_is_supported(backend: str, least: int) -> None:
    mine = [case for case in TABLE if case[0] == backend]
    assert len({(block_size, dtype) for _, block_size, dtype, *_ in mine}) >= least
    for column, values in enumerate((GRIDS, DENSITIES, TOKENS), start=3):
        assert {case[column] for case in mine} == set(values)
        for block_size in {case[1] for case in mine}:
            assert {case[column] for case in TABLE if case[1] == block_size} == set(values)


def sum_in(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.T`, term by term, each sum rounded to `dtype`."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=dtype)
    for one, other in zip(left.to(dtype).T, right.to(dtype).T, strict=True):
        total += one[:, None] * other
    return total.to(left.dtype)


COARSER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
MISTAKES = {
    "a block is lost": lambda case: replace(case, values=case.values.index_fill(0, torch.tensor(0), 0)).sparse(),
    "two blocks are swapped": lambda case: replace(
        case, block_index=torch.cat([case.block_index[:2].flip(0), case.block_index[2:]])
    ).sparse(),
    "a token is lost": lambda case: replace(case, grad=torch.cat([case.grad[:-1], 0 * case.grad[-1:]])).sparse(),
    "the bias counts twice": lambda case: replace(case, bias=2 * case.bias).sparse(),
    "sums are too coarse": lambda case: (
        sum_in(
            COARSER.get(case.input.dtype, case.input.dtype),
            case.input,
            dense_weight(case.values, case.block_index, (case.bias.numel(), case.input.shape[-1])),
        )
        + case.bias,
        *case.sparse()[1:],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_product_is_noticed(mistake: str, dtype: torch.dtype) -> None:
    case = make_case((2, 32), 16, 1.0, dtype, (64,))
    check(case)
    with pytest.raises(AssertionError):
        check(case, mistake, MISTAKES[mistake](case))


@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for dtype in DTYPES for name in serving(16, dtype)], ids=str
)
def test_operands_need_not_be_contiguous(backend: str, dtype: torch.dtype) -> None:
    case = make_case((3, 5), 16, 0.4, dtype, (6,))
    with use_backend(backend):
        check(replace(case, input=case.input.T.contiguous().T, grad=case.grad.T.contiguous().T), "transposed")
        check(replace(case, input=case.input.repeat(1, 2)[:, ::2], grad=case.grad.repeat(2, 1)[::2]), "strided")
        check(replace(case, values=case.values.transpose(1, 2).contiguous().transpose(1, 2)), "values")
        check(replace(case, grad=case.grad[:1].expand(6, -1), input=case.input[:1].expand(6, -1)), "expanded")
        check(replace(case, grad=case.grad.new_ones(()).expand_as(case.grad)), "gradient of a sum")


@pytest.mark.parametrize("backend", serving((1, 2), torch.float32))
def test_worked_example(backend: str) -> None:
    # [[1, 2, 0, 0], [0, 0, 3, 4]]
    values, index = torch.tensor([[[3.0, 4.0]], [[1.0, 2.0]]]), torch.tensor([3, 0], dtype=torch.int32)
    input, grad = torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.tensor([[1.0, 2.0]])
    case = Case(input, values, index, torch.tensor([0.5, -0.5]), grad)
    with use_backend(backend):
        output, of_input, of_values, of_bias = case.sparse()
    assert output.tolist() == [[21.5, 4299.5]]
    assert of_input.tolist() == [[1, 2, 6, 8]]
    assert of_values.tolist() == [[[200, 2000]], [[1, 10]]]
    assert of_bias.tolist() == [1, 2]


@pytest.mark.parametrize("entries", [1, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_many_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, entries: int) -> None:
    monkeypatch.setattr(tiled, "TILE_ENTRIES", entries)
    with use_backend("tiled"):
        for grid in GRIDS:
            for block_size in (1, 4, (2, 8)):
                check(make_case(grid, block_size, 0.4, dtype), (grid, block_size))


def test_low_precision_of_a_layer_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # As many tiles as a 4096 x 4096 layer has.
    monkeypatch.setattr(tiled, "TILE_ENTRIES", 512 * 512 // 16)
    with use_backend("tiled"):
        check(make_case((32, 32), 16, 0.5, torch.bfloat16, (32,)))


@pytest.mark.parametrize("backend", serving(16, torch.float32))
def test_each_gradient_can_be_wanted_alone(backend: str) -> None:
    case = make_case((3, 5), 16, 0.4, torch.float32)
    layout, truth = BlockLayout(case.block_index, (48, 80), (16, 16)), case.dense()[1:]
    for wanted in product((True, False), repeat=3):
        found = BACKENDS[backend].backward(case.grad, case.input, case.values, layout, wanted)
        assert tuple(ours is not None for ours in found) == wanted
        for ours, exact in zip(found, truth, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, exact)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    case = make_case((3, 5), 4, 0.4)
    output = block_sparse_linear(case.input, case.values.requires_grad_(), case.block_index, None, case.bias.numel())
    with use_backend("reference"), Recorder() as recorder:
        output.backward(case.grad)
    assert case.values.grad is not None
    assert [name for name in recorder.names if "aten.mm" in name] == ["aten.mm.default"]


@pytest.mark.parametrize("backend", serving((2, 3), torch.float64))
def test_gradcheck(backend: str) -> None:
    case = make_case((2, 3), (2, 3), 0.5, tokens=(2, 2))
    leaves = [tensor.requires_grad_() for tensor in (case.input, case.values, case.bias)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda input, values, bias: block_sparse_linear(input, values, case.block_index, bias, bias.numel()),
            leaves,
        )


def test_operators_keep_the_rules_of_torch() -> None:
    case = make_case((3, 5), 4, 0.4, torch.float32)
    input, values, bias = (tensor.requires_grad_() for tensor in (case.input, case.values, case.bias))
    for given in (bias, None):
        torch.library.opcheck(sparse_linear, (input, values, case.block_index, given, 12))
    # Each pair of gradients is wanted together, one without the other, and not at all.
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        operands = case.grad, input.detach(), values.detach(), case.block_index
        torch.library.opcheck(linear_backward, (*operands, *wanted))


@pytest.mark.parametrize("backend", serving(16, torch.float32))
def test_the_operator_and_the_eager_path_are_the_same(backend: str) -> None:
    case = make_case((3, 5), 16, 0.4, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (case.input, case.values, case.bias)]
    with use_backend(backend):
        results = []
        for run in (block_sparse_linear, sparse_linear):
            output = run(case.input, case.values, case.block_index, case.bias, case.bias.numel())
            results.append((output.detach(), *torch.autograd.grad(output, leaves, case.grad)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_autocast_does_what_it_does_to_a_dense_layer() -> None:
    layer = make_layer((3, 5), 4, 6)
    dense = layer.to_linear()
    input = torch.randn(7, 20, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = layer(input), dense(input)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-1)
    output.float().square().sum().backward()
    case = Case(input, layer.values.detach(), layer.block_index, layer.bias.detach(), 2 * output.detach().float())
    assert layer.values.grad.dtype == layer.bias.grad.dtype == torch.float32
    for ours, exact in zip((layer.values.grad, layer.bias.grad), case.dense()[2:], strict=True):
        assert (ours - exact).norm() <= 0.02 * exact.norm()


class Recorder(TorchDispatchMode):
    """Names of all operators that run, and sizes of all tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.sizes += [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(tensor)]
        return result


@pytest.mark.parametrize(
    ("backend", "block_size"),
    [(name, size) for size in (1, 8, 16, (1, 4)) for name in serving(size, torch.float32)],
    ids=str,
)
def test_only_reference_and_workspace_make_a_tensor_as_large_as_the_weight(
    backend: str, block_size: int | tuple[int, int]
) -> None:
    rows, columns = sides(block_size)
    grid = 64 // rows, 128 // columns
    case = make_case(grid, block_size, 0.1, torch.float32, (5,))
    served, layout = BACKENDS[backend], BlockLayout(case.block_index, (64, 128), (rows, columns))
    for run, arguments in (
        (served.dds, (case.input, case.values, layout, case.bias, False)),
        (served.dds, (case.grad, case.values, layout, None, True)),
        (served.sdd, (case.grad, case.input, layout)),
    ):
        with Recorder() as recorder:
            run(*arguments)
        assert recorder.names
        if backend in ("reference", "workspace"):
            assert max(recorder.sizes) >= 64 * 128
        else:
            assert max(recorder.sizes) <= 64 * 128 // 2 + rows * columns


@pytest.mark.parametrize("backend", serving(4, torch.float32))
def test_one_graph_survives_a_change_of_topology(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_layer((3, 5), 4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    input = torch.randn(7, 20, generator=generator())
    with use_backend(backend):
        for seed in range(3):
            layer.block_index.copy_(torch.randperm(15, generator=generator(seed))[:6])
            layer.zero_grad()
            output = compiled(input)
            output.sum().backward()
            weight = dense_weight(layer.values, layer.block_index, layer.shape)
            torch.testing.assert_close(output, linear(input, weight, layer.bias))
            expected = input.sum(0).expand(12, -1)
            torch.testing.assert_close(layer.values.grad, blocks_of(expected, layer.block_index, (4, 4)))
    assert counter.frame_count == 1


def test_a_layer_can_be_exported() -> None:
    layer, input = make_layer((3, 5), 4, 6).eval(), torch.randn(7, 20, generator=generator())
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(layer, (input,), dynamic_shapes=({0: tokens},))
    more = torch.randn(9, 20, generator=generator(1))
    torch.testing.assert_close(exported.module()(more), layer(more))
    assert "hf_dynsparse.linear" in str(exported.graph)


@pytest.mark.parametrize("tokens", [1, 7, 128])
@pytest.mark.parametrize("backend", serving(16, torch.float32))
def test_inference_mode(backend: str, tokens: int) -> None:
    layer = make_layer((3, 5), 16, 6)
    input = torch.randn(tokens, 80, generator=generator())
    expected = linear(input, dense_weight(layer.values, layer.block_index, layer.shape), layer.bias)
    with use_backend(backend), torch.inference_mode():
        torch.testing.assert_close(layer(input), expected)
        loaded = make_layer((3, 5), 16, 6)  # its index is an inference tensor, which has no version
        torch.testing.assert_close(loaded(input), expected)
