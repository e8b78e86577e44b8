"""Fused passes: outputs and gradients of one operator after the other, in float64."""

import math

import pytest
import torch
from helpers import needs_kernels
from torch.nn import functional as F

from hf_dynsparse.ops.dropout import seeded_dropout
from hf_dynsparse.ops.native import VARIANTS, LibraryUnavailable, use_variant
from hf_dynsparse.ops.passes import cross_entropy, residual_norm


@pytest.fixture(params=VARIANTS.values())
def variant(request):
    try:
        with use_variant(request.param):
            yield request.param
    except LibraryUnavailable as reason:
        pytest.skip(str(reason))


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(function, grad, *inputs):
    """The output of `function` and the gradients of its inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return output, *torch.autograd.grad(output, inputs, grad)


def require_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("classes", [1, 3, 16, 17, 1000])
def test_cross_entropy(classes, variant):
    logits, grad = normal(7, classes, scale=5.0), normal(7, seed=1)
    labels = torch.tensor([0, -100, classes - 1, classes // 2, 0, -100, 0])
    found = with_gradients(lambda logits: cross_entropy(logits, labels), grad, logits)
    expected = with_gradients(
        lambda logits: F.cross_entropy(logits, labels, reduction="none"), grad.double(), logits.double()
    )
    require_close(found, expected)
    assert not found[0][1]
    assert not found[1][1].any()


@needs_kernels
def test_cross_entropy_of_extreme_logits():
    rows = [[0.0, 300.0], [-300.0, 0.0], [-math.inf, 0.0], [math.nan, 0.0], [1e30, 1e30]]
    logits, labels = torch.tensor(rows), torch.tensor([0, 0, 1, 1, 0])
    found = with_gradients(lambda logits: cross_entropy(logits, labels), torch.ones(5), logits)
    expected = with_gradients(lambda logits: F.cross_entropy(logits, labels, reduction="none"), torch.ones(5), logits)
    torch.testing.assert_close(found, expected, equal_nan=True)
    with pytest.raises(IndexError, match="below 2, or -100. Got 2"):
        cross_entropy(logits, labels * 2)
    assert cross_entropy(logits[:0], labels[:0]).shape == (0,)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("width", [16, 48])
def test_residual_norm(width, p, threads, variant):
    input, residual, grad = (normal(2, 5, width, seed=seed) for seed in range(3))
    weight, bias = normal(width, seed=3), normal(width, seed=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found = with_gradients(lambda *all: residual_norm(*all, 1e-5, p), grad, input, residual, weight, bias)
        torch.manual_seed(0)
        ones = torch.ones_like(input)
        kept = seeded_dropout(ones, torch.randint(-(2**63), 2**63 - 1, ()), p) if p else ones  # the same draws
    finally:
        torch.set_num_threads(before)

    def one_after_the_other(input, residual, weight, bias):
        return F.layer_norm(input * kept + residual, (width,), weight, bias, 1e-5)

    wide = [tensor.double() for tensor in (grad, input, residual, weight, bias)]
    require_close(found, with_gradients(one_after_the_other, *wide))


@needs_kernels
def test_elsewhere_it_is_one_after_the_other():
    # Other dtypes and widths, transforms, strides: the same operators as without a kernel.
    input, weight, bias = normal(4, 16), torch.ones(16), torch.zeros(16)
    expected = F.layer_norm(2 * input, (16,), weight, bias, 1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        output = residual_norm(*(tensor.to(dtype) for tensor in (input, input, weight, bias)), 1e-5)
        torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
    narrow = residual_norm(input[:, :5], input[:, :5], weight[:5], bias[:5], 1e-5)
    torch.testing.assert_close(narrow, F.layer_norm(2 * input[:, :5], (5,)))
    strided = input.T.contiguous().T
    torch.testing.assert_close(residual_norm(strided, strided, weight, bias, 1e-5), expected)
    mapped = torch.func.vmap(lambda row: residual_norm(row, row, weight, bias, 1e-5))(input)
    torch.testing.assert_close(mapped, expected)
    labels = torch.tensor([0, 1, -100, 15])
    losses = F.cross_entropy(input, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(input.double(), labels).float(), losses)
    torch.testing.assert_close(cross_entropy(strided, labels), losses)


@needs_kernels
def test_gradients_of_gradients():
    input, residual, grad = (normal(3, 16, seed=seed) for seed in range(3))
    weight, bias, labels = normal(16, seed=3), normal(16, seed=4), torch.tensor([0, -100, 15])

    def second(function, grad, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    def one_after_the_other(input, residual, weight, bias):
        return F.layer_norm(input + residual, (16,), weight, bias, 1e-5)

    wide = [tensor.double() for tensor in (grad, input, residual, weight)]
    found = second(lambda *all: residual_norm(*all, bias, 1e-5), grad, input, residual, weight)
    require_close(found, second(lambda *all: one_after_the_other(*all, bias.double()), *wide))
    found = second(lambda logits: cross_entropy(logits, labels), grad[:, 0], input)
    expected = second(lambda logits: F.cross_entropy(logits, labels, reduction="none"), wide[0][:, 0], wide[1])
    require_close(found, expected)
