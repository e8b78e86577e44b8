"""What the table of products does not ask of the compiled kernels: threads, variants, stale orders."""

from itertools import product

import pytest
import torch
from helpers import cover_pairs, make_layer, needs_kernels, variants

from hf_dynsparse import BlockSparseLinear, use_backend
from hf_dynsparse.ops import native


SHAPES = [(1, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
CPU, FP32 = torch.device("cpu"), torch.float32

# Of sums of about a hundred products of normal numbers, in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}

pytestmark = needs_kernels


def products(layer: BlockSparseLinear, input: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and all gradients, by the native backend."""
    input = input.clone().requires_grad_()
    layer.zero_grad()
    with use_backend("native"):
        output = layer(input)
        output.backward(grad)
    return output.detach(), input.grad, layer.values.grad.clone(), layer.bias.grad.clone()


def operands(
    block_shape: tuple[int, int], tokens: int, dtype: torch.dtype = FP32
) -> tuple[BlockSparseLinear, torch.Tensor, torch.Tensor]:
    layer = make_layer((5, 7), block_shape, nnzb=10, dtype=dtype)
    drawn = torch.Generator().manual_seed(tokens)
    input = torch.randn(tokens, layer.in_features, generator=drawn).to(dtype)
    return layer, input, torch.randn(tokens, layer.out_features, generator=drawn).to(dtype)


@pytest.mark.parametrize(
    ("block_shape", "tokens", "dtype"),
    cover_pairs([(shape,) for shape in SHAPES], (1, 15, 64, 65, 300), native.DTYPES),
    ids=str,
)
def test_any_number_of_threads_repeats_itself_and_agrees_with_one(
    block_shape: tuple[int, int], tokens: int, dtype: torch.dtype, threads: None
) -> None:
    layer, input, grad = operands(block_shape, tokens, dtype)
    tolerance = TOLERANCE[dtype]
    torch.set_num_threads(1)
    alone = products(layer, input, grad)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, second = products(layer, input, grad), products(layer, input, grad)
        for one, again, reference in zip(first, second, alone, strict=True):
            assert torch.equal(one, again)
            torch.testing.assert_close(one, reference, rtol=tolerance, atol=tolerance)


# bfloat16 is widened where pairs are not multiplied: one shape shows it, the kernels are those of float32.
@pytest.mark.parametrize(
    ("variant", "block_shape", "dtype"),
    [
        (variant, shape, dtype)
        for variant, shape, dtype in product(variants(native), SHAPES, native.DTYPES)
        if dtype == FP32 or variant.endswith("bf16") or shape == (4, 4)
    ],
    ids=str,
)
def test_every_instruction_set_computes_the_same(
    variant: str, block_shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer, input, grad = operands(block_shape, 150, dtype)
    expected = products(layer, input, grad)
    with native.use_variant(variant):
        results = products(layer, input, grad)
    tolerance = TOLERANCE[dtype]
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_addresses_need_not_be_aligned(dtype: torch.dtype) -> None:
    layer, input, grad = operands((4, 4), 70, dtype)
    expected = products(layer, input, grad)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:].view_as(tensor)

    layer.values, layer.bias = torch.nn.Parameter(moved(layer.values)), torch.nn.Parameter(moved(layer.bias))
    assert layer.values.data_ptr() % 64 != 0
    for found, wanted in zip(products(layer, moved(input), moved(grad)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_instruction_set_must_be_there() -> None:
    message = "This CPU runs .*portable.* up to .*Got 'sse9'"
    with pytest.raises(native.LibraryUnavailable, match=message), native.use_variant("sse9"):
        pass


def test_without_the_best_variant_the_next_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = native.load_variant

    def load_old(variant: str) -> object:
        if variant != "portable":
            raise native.LibraryUnavailable(f"_native_{variant}.so is not built.")
        return load(variant)

    monkeypatch.setattr(native, "load_variant", load_old)
    best = native._find_best.__wrapped__()
    assert best == ("portable", load("portable"))
    if load("portable").best_variant() > 0:
        assert "cannot be used, slower ones serve" in caplog.text
