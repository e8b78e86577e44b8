"""What the plain PyTorch backends promise beyond their results: their memory, and the limits of their chunks."""

from threading import Thread

import pytest
import torch
from helpers import cover_pairs, error_bound, generator
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dynsparse.blocks.layout import layout_of
from hf_dynsparse.ops import gather, reference, workspace


pytestmark = pytest.mark.usefixtures("deterministic")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Sizes(TorchDispatchMode):
    """Sizes of all tensors that are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes += [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(tensor)]
        return result


@pytest.fixture(autouse=True)
def released():
    workspace.release_workspace()
    yield
    workspace.release_workspace()


def operands(shape, block_shape, nnzb, tokens, dtype=torch.float64):
    """Input, gradient, values, index and bias."""
    draw = generator()
    blocks = shape[0] // block_shape[0] * (shape[1] // block_shape[1])
    sizes = (tokens, shape[1]), (tokens, shape[0]), (nnzb, *block_shape), (shape[0],)
    input, grad, values, bias = (torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes)
    return input, grad, values, torch.randperm(blocks, generator=draw)[:nnzb].int(), bias


def products(backend, shape, input, grad, values, index, bias):
    """Output and gradients of input and values."""
    layout = layout_of(index, shape, tuple(values.shape[1:]))
    return (
        backend.dds(input, values, layout, bias, False),
        backend.dds(grad, values, layout, None, True),
        backend.sdd(grad, input, layout),
    )


@pytest.mark.parametrize(
    ("tokens", "chunk", "block_shape"),
    cover_pairs(
        [(tokens,) for tokens in (1, 3, 4, 5, 8, 13)],
        [(4, 1), (4, 4 * 16 * 8 * 3), (5, 1 << 20)],
        [(16, 16), (32, 16), (16, 32)],
    ),
    ids=str,
)
def test_gather_in_chunks_of_tokens_and_lines(monkeypatch: pytest.MonkeyPatch, tokens, chunk, block_shape) -> None:
    monkeypatch.setattr(gather, "CPU_CHUNK", chunk)
    shape = 7 * block_shape[0], 5 * block_shape[1]
    arguments = operands(shape, block_shape, 12, tokens)
    expected = products(reference, shape, *arguments)
    for _ in range(2):
        torch.testing.assert_close(products(gather, shape, *arguments), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gather_sums_many_chunks_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(gather, "CPU_CHUNK", (8, 1 << 20))
    arguments = operands((64, 96), (16, 16), 12, 512, dtype)
    *operands_, index, bias = arguments
    exact, sizes = (
        products(reference, (64, 96), *map(convert, operands_), index, convert(bias))
        for convert in (torch.Tensor.double, lambda tensor: tensor.double().abs())
    )
    without_bias = exact[0] - bias.double(), *exact[1:]
    terms = 96 + 1, 64, 512
    for truth, size, count, rounded, ours in zip(
        exact, sizes, terms, without_bias, products(gather, (64, 96), *arguments), strict=True
    ):
        assert (ours.double() - truth).norm() <= error_bound(dtype, count, size, truth, rounded)


def test_gather_makes_no_tensor_as_large_as_the_weight() -> None:
    shape = 1024, 768
    arguments = operands(shape, (16, 16), 300, 64, torch.float32)
    with Sizes() as recorder:
        products(gather, shape, *arguments)
    assert max(recorder.sizes) <= shape[0] * shape[1] // 6  # the values are a tenth


def test_gather_needs_large_blocks() -> None:
    device = torch.device("cpu")
    assert gather.why_not(device, torch.float16, (16, 64)) is None
    assert "16 x 16" in str(gather.why_not(device, torch.float32, (16, 8)))


def test_the_workspace_is_one_buffer_that_grows_and_is_released() -> None:
    def addresses() -> list[tuple[int, int]]:
        buffers = [space.buffer for space in workspace._workspaces.values()]
        return [(buffer.data_ptr(), buffer.numel()) for buffer in buffers if buffer is not None]

    small, large = operands((8, 12), (4, 4), 3, 5), operands((16, 24), (2, 4), 7, 5)
    products(workspace, (8, 12), *small)
    assert [size for _, size in addresses()] == [8 * 12]
    products(workspace, (16, 24), *large)
    grown = addresses()
    assert [size for _, size in grown] == [16 * 24]
    expected = products(reference, (8, 12), *small)
    torch.testing.assert_close(products(workspace, (8, 12), *small), expected, **TOLERANCE)
    assert addresses() == grown
    with Sizes() as recorder:
        products(workspace, (16, 24), *large)
    assert addresses() == grown
    assert max(recorder.sizes) == 16 * 24
    workspace.release_workspace()
    assert addresses() == []
    torch.testing.assert_close(products(workspace, (8, 12), *small), expected, **TOLERANCE)


def test_a_workspace_made_by_inference_serves_training() -> None:
    input, _, values, index, bias = operands((8, 12), (4, 4), 3, 5)
    layout = layout_of(index, (8, 12), (4, 4))
    with torch.inference_mode():
        output = workspace.dds(input, values, layout, bias, False)
    torch.testing.assert_close(workspace.dds(input, values, layout, bias, False), output)


def test_results_do_not_share_the_workspace() -> None:
    input, grad, values, index, bias = operands((8, 12), (1, 1), 40, 5)
    first = products(workspace, (8, 12), input, grad, values, index, bias)
    kept = [tensor.clone() for tensor in first]
    products(workspace, (8, 12), 3 * input, 5 * grad, 7 * values, index, bias)
    assert all(map(torch.equal, first, kept))


def test_threads_take_turns_with_the_workspace() -> None:
    cases = [operands((64, 96), (1, 1), nnzb, 64) for nnzb in (500, 2000)]
    expected = [products(workspace, (64, 96), *case) for case in cases]
    wrong = []

    def repeat(case, truth) -> None:
        for _ in range(50):
            if not all(map(torch.equal, products(workspace, (64, 96), *case), truth)):
                wrong.append(case)

    threads = [Thread(target=repeat, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_workspace_does_what_the_dense_layer_does() -> None:
    input, _, values, index, bias = operands((8, 12), (4, 4), 3, 5, torch.float32)
    weight = reference.to_dense(values, index, (8, 12))
    output = workspace.dds(input, values, layout_of(index, (8, 12), (4, 4)), bias, False)
    assert torch.equal(output, linear(input, weight, bias))
