"""Numbers and the integers that stand for them, on examples worked out by hand."""

import math

import pytest
import torch

from hf_dynsparse.compress.int8.affine import (
    fake_quantize_input,
    fake_quantize_weight,
    input_parameters,
    quantize_input,
    quantize_weight,
    round_bias,
    weight_scale,
)


def test_weights_by_hand():
    weight = torch.tensor([[-2.54, 0.0], [0.011, 1.0]])
    scale = weight_scale(weight)
    assert scale.item() == pytest.approx(0.02)
    integers = quantize_weight(weight, scale)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[-127, 0], [1, 50]]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-1.0, 1.55, 0.01, 100),
        (0.5, 2.55, 0.01, 0),  # zero belongs to every range
        (-5.1, -1.0, 0.02, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_inputs_by_hand(low, high, scale, zero_point):
    found_scale, found_zero_point = input_parameters(torch.tensor([low, high]))
    assert found_scale.item() == pytest.approx(scale)
    assert found_zero_point.item() == zero_point
    ends = quantize_input(torch.tensor([low - 9.0, 0.0, high + 9.0]), found_scale, zero_point) + zero_point
    assert ends.tolist() == ([0, 0, 9] if scale == 1.0 else [0, zero_point, 255])


def test_zeros_have_a_scale_whose_reciprocal_is_finite():
    for weight in (torch.zeros(4), torch.full((4,), 1e-44)):
        scale = weight_scale(weight)
        assert scale > 0
        assert scale.reciprocal().isfinite()
        assert not quantize_weight(weight, scale).any()


def test_what_is_not_finite_stays_so():
    weight = torch.tensor([1.0, math.nan])
    assert fake_quantize_weight(weight, weight_scale(weight)).isnan().all()
    scale, zero_point = input_parameters(torch.tensor([-1.0, math.nan]))
    assert fake_quantize_input(torch.ones(2), scale, zero_point).isnan().all()


def test_fake_quantisation_is_that_of_the_integers():
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(numbers)
    assert torch.equal(fake_quantize_weight(numbers, scale), quantize_weight(numbers, scale) * scale)
    scale, zero_point = input_parameters(torch.tensor([-1.3, 2.1]))
    assert torch.equal(
        fake_quantize_input(numbers, scale, zero_point), quantize_input(numbers, scale, int(zero_point)) * scale
    )


def test_the_gradient_passes_straight_through():
    weight = torch.tensor([0.3, -1.0, 0.017], requires_grad=True)
    fake_quantize_weight(weight, weight_scale(weight)).sum().backward()
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]
    input = torch.tensor([-3.0, 0.3, 3.0], requires_grad=True)
    fake_quantize_input(input, *input_parameters(torch.tensor([-1.0, 1.0]))).sum().backward()
    assert input.grad.tolist() == [0.0, 1.0, 0.0]  # not to what lies outside


def test_biases_are_rounded_to_the_grid_of_the_products():
    assert round_bias(torch.tensor([0.126, -1.0]), torch.tensor(0.25)).tolist() == [1.0, -4.0]
