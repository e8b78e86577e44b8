"""What the table of products does not ask of the compiled kernels: threads, variants, stale orders."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from helpers import dense_weight, make_layer

from hf_dynsparse import BlockSparseLinear, choose_backend, use_backend
from hf_dynsparse.ops import native


SHAPES = [(1, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
CPU, FP32 = torch.device("cpu"), torch.float32

pytestmark = pytest.mark.skipif(
    native.why_not(CPU, FP32, (16, 16)) is not None,
    reason="the C++ kernels are not built: no compiler at install time",
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def products(layer: BlockSparseLinear, input: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and all gradients, by the native backend."""
    input = input.clone().requires_grad_()
    layer.zero_grad()
    with use_backend("native"):
        output = layer(input)
        output.backward(grad)
    return output.detach(), input.grad, layer.values.grad.clone(), layer.bias.grad.clone()


def operands(block_shape: tuple[int, int], tokens: int) -> tuple[BlockSparseLinear, torch.Tensor, torch.Tensor]:
    layer = make_layer((5, 7), block_shape, nnzb=10)
    drawn = torch.Generator().manual_seed(tokens)
    input = torch.randn(tokens, layer.in_features, generator=drawn)
    return layer, input, torch.randn(tokens, layer.out_features, generator=drawn)


@pytest.mark.parametrize("block_shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 200])
def test_any_number_of_threads_repeats_itself_and_agrees_with_one(
    block_shape: tuple[int, int], tokens: int, threads: None
) -> None:
    layer, input, grad = operands(block_shape, tokens)
    torch.set_num_threads(1)
    alone = products(layer, input, grad)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, second = products(layer, input, grad), products(layer, input, grad)
        for one, again, reference in zip(first, second, alone, strict=True):
            assert torch.equal(one, again)
            torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", native.VARIANTS.values())
@pytest.mark.parametrize("block_shape", SHAPES, ids=str)
def test_every_instruction_set_computes_the_same(
    variant: str, block_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        library: ctypes.CDLL = native.load_variant(variant)
    except native.LibraryUnavailable as reason:
        pytest.skip(str(reason))
    best = native.load_variant("portable").best_variant()
    if best < {name: level for level, name in native.VARIANTS.items()}[variant]:
        pytest.skip("this processor lacks the instructions")
    layer, input, grad = operands(block_shape, 70)
    expected = products(layer, input, grad)
    monkeypatch.setattr(native, "_library", lambda: library)
    for found, wanted in zip(products(layer, input, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_changed_index_is_noticed() -> None:
    layer, input, grad = operands((4, 4), 9)
    products(layer, input, grad)
    with torch.no_grad():
        free = sorted(set(range(layer.num_blocks)) - set(layer.block_index.tolist()))
        layer.block_index[:2] = torch.tensor(free[:2], dtype=torch.int32)
    output = products(layer, input, grad)[0]
    weight = dense_weight(layer.values.detach(), layer.block_index, layer.shape)
    torch.testing.assert_close(output, input @ weight.T + layer.bias.detach(), rtol=1e-5, atol=1e-5)


def test_a_damaged_index_is_refused_before_memory_is_touched() -> None:
    layer, input, grad = operands((4, 4), 3)
    with torch.no_grad():
        layer.block_index[0] = 10_000
    with pytest.raises(ValueError, match=r"must lie in \[0, 35\). Got 10000"):
        products(layer, input, grad)


def test_dense_is_chosen_above_the_break_even() -> None:
    assert choose_backend(CPU, FP32, (16, 16), density=0.1).name == "native"
    assert choose_backend(CPU, FP32, (16, 16), density=0.9).name == "tiled"
    assert choose_backend(CPU, FP32, (1, 1), density=0.5).name == "tiled"
