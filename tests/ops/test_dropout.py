"""Seeded dropout: the right share, in places that nothing but the seed decides."""

import math

import pytest
import torch
from helpers import needs_kernels

from hf_dynsparse.ops.dropout import dropout, seeded_dropout


DTYPES = (torch.float32, torch.bfloat16)


def zeroed(shape: tuple[int, ...], seed: int, p: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return seeded_dropout(torch.ones(shape, dtype=dtype), torch.tensor(seed), p) == 0


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    input = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    output = seeded_dropout(input, torch.tensor(-7), p)
    dropped = output == 0
    # Five standard deviations of a binomial distribution.
    assert abs(dropped.sum().item() - p * 1e6) < 5 * math.sqrt(1e6 * p * (1 - p))
    expected = torch.where(dropped, 0, input.float() / (1 - p))
    torch.testing.assert_close(output, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)


@needs_kernels
@pytest.mark.parametrize("shift", [1, 2, 16, 768, 1024])
def test_places_are_independent(shift: int) -> None:
    # Neighbours, rows, and the same place under another seed: both dropped with probability p * p.
    p, count = 0.3, 1_000_000
    first = zeroed((count,), 12345, p)
    for other in (first.roll(shift), zeroed((count,), 12345 + shift, p), zeroed((count,), 12345 + (shift << 32), p)):
        both = (first & other).sum().item()
        assert abs(both - p * p * count) < 6 * math.sqrt(count * p * p)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_seed_and_place_decides(dtype: torch.dtype) -> None:
    before, p = torch.get_num_threads(), 0.4
    try:
        masks = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masks.append(zeroed((50_000,), 9, p, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    for length in (0, 1, 15, 16, 17, 4095, 33_333):
        assert torch.equal(zeroed((length,), 9, p, dtype), masks[0][:length])
    moved = torch.ones(50_001, dtype=dtype)[1:]  # not aligned
    assert torch.equal(seeded_dropout(moved, torch.tensor(9), p) == 0, masks[0])
    strided = torch.ones(2, 25_000, dtype=dtype).T
    assert torch.equal(seeded_dropout(strided, torch.tensor(9), p).flatten() == 0, masks[0])


@needs_kernels
def test_special_numbers() -> None:
    input = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]).repeat(100)
    for dtype in DTYPES:
        output = seeded_dropout(input.to(dtype), torch.tensor(1), 0.5)
        kept = zeroed((500,), 1, 0.5).logical_not()
        assert output[~kept].eq(0).all()
        torch.testing.assert_close(output[kept], input[kept].to(dtype), equal_nan=True)


@needs_kernels
def test_the_gradient_passes_where_the_input_did() -> None:
    input = torch.randn(100, 7, requires_grad=True)
    output = dropout(input, 0.25)
    output.sum().backward()
    assert torch.equal(input.grad, torch.where(output == 0, 0.0, 1 / 0.75))
    torch.library.opcheck(seeded_dropout, (input, torch.tensor(3), 0.25))


@needs_kernels
def test_the_generator_of_torch_decides_the_seed() -> None:
    input = torch.ones(1000)
    state = torch.get_rng_state()
    first, second = dropout(input, 0.5), dropout(input, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(input, 0.5), first)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, True)])
def test_without_chance_it_is_that_of_torch(p: float, training: bool) -> None:
    input = torch.randn(9)
    assert torch.equal(dropout(input, p, training), torch.nn.functional.dropout(input, p, training))


def test_other_dtypes_are_left_to_torch() -> None:
    assert dropout(torch.ones(100, dtype=torch.float64), 0.5).unique().tolist() == [0.0, 2.0]


@needs_kernels
def test_torch_func_and_forward_mode_get_the_dropout_of_torch() -> None:
    input = torch.ones(1000)
    output, tangent = torch.func.jvp(lambda input: dropout(input, 0.5), (input,), (input,))
    assert torch.equal(output, tangent)
    gradients = torch.func.vmap(torch.func.grad(lambda input: dropout(input, 0.5).sum()), randomness="different")(
        torch.stack([input, input])
    )
    assert gradients.unique().tolist() == [0.0, 2.0]
    assert not torch.equal(*gradients)
    with pytest.raises(NotImplementedError, match="must call `torch.nn.Dropout`, in eager mode. Got a call of the op"):
        torch.func.jvp(lambda input: seeded_dropout(input, torch.tensor(1), 0.5), (input,), (input,))


@needs_kernels
def test_a_gradient_of_a_gradient_meets_the_same_places() -> None:
    input = torch.rand(1000, requires_grad=True)
    output = seeded_dropout(input, torch.tensor(5), 0.5).square().sum()
    (gradient,) = torch.autograd.grad(output, input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), input)
    assert torch.equal(second != 0, gradient != 0)
