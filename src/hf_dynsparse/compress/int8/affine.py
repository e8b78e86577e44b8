"""
Numbers and the integers that stand for them: `number = scale * (integer - zero point)` (arXiv:1712.05877, section 2).

Weights are symmetric, int8 in [-127, 127] with zero point 0; inputs are affine, uint8 in [0, 255]; both with one scale
a tensor (arXiv:2111.05754, section 3; arXiv:1910.06188, section 3.1).
"""

import torch


WEIGHT_LEVELS = 127
INPUT_LEVELS = 255
INT32_LEVELS = 2**31 - 1

# The reciprocal of a smaller scale would not be finite.
SMALLEST_SCALE = 2.0**-126
# Any scale represents zeros; these leave a bias beside them a fine grid that it fits into.
SCALE_OF_ZERO_WEIGHTS = 2.0**-16
SCALE_OF_ZERO_INPUTS = 1.0


def weight_scale(weight: torch.Tensor) -> torch.Tensor:
    """The scale of a weight, `max|w| / 127`: float32 of shape `()`."""
    scale = weight.detach().abs().amax().float() / WEIGHT_LEVELS
    return torch.where(scale == 0, SCALE_OF_ZERO_WEIGHTS, scale.clamp_min(SMALLEST_SCALE))


def input_parameters(input_range: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scale and zero point of inputs; zero is among the numbers that are represented exactly, whatever their range.

    Args:
        input_range (`torch.Tensor` of shape `(2,)`, `torch.float32`): smallest and largest input.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32 and int32, of shape `()`.
    """
    low, high = input_range[0].clamp(max=0), input_range[1].clamp(min=0)
    width = high - low
    scale = torch.where(width == 0, SCALE_OF_ZERO_INPUTS, (width / INPUT_LEVELS).clamp_min(SMALLEST_SCALE))
    return scale, (-low / scale).round().clamp(0, INPUT_LEVELS).int()


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 of the shape of `weight`, ties to even."""
    return _round(weight, scale).clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS).to(torch.int8)


def quantize_input(input: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """
    The uint8 of an input less the zero point, float32 of the shape of `input`, ties to even; what lies outside of the
    range becomes its end.
    """
    return _round(input, scale).clamp_(-zero_point, INPUT_LEVELS - zero_point)


def product_step(input_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What 1 means in a product of integers: float64, in which two scales have an exact product that is never 0."""
    return input_scale.double() * scale.double()


def round_bias(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The integers, as float64, that stand for `bias` on the grid of `step`, the product of both scales."""
    return (bias.detach().double() / step).round()


def fake_quantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` as its integers represent it; the gradient passes straight through."""
    zero = torch.zeros((), dtype=torch.int32, device=weight.device)
    levels = -WEIGHT_LEVELS, WEIGHT_LEVELS
    return torch.fake_quantize_per_tensor_affine(weight.float(), scale, zero, *levels).to(weight.dtype)


def fake_quantize_input(input: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """`input` as its integers represent it; the gradient passes straight through, save for what lies outside."""
    return torch.fake_quantize_per_tensor_affine(input.float(), scale, zero_point, 0, INPUT_LEVELS).to(input.dtype)


def _round(number: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # By the reciprocal, as PyTorch's fake quantisation does: the integers are then the same to the last.
    return (number.detach().float() * scale.reciprocal()).round_()
