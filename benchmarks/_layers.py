"""One layer under one batch: the phases that are timed, masked dense, and the check against the dense reference."""

import torch
from torch import nn

from hf_dynsparse import BlockSparseLinear
from hf_dynsparse.ops import take_blocks


# Norm of the error over norm of the reference. Summing in another order stays far below; a lost block does not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class MaskedLinear(nn.Module):
    """What is often called sparse: a dense weight times a mask, so a dense product, gradient and optimiser state."""

    def __init__(self, linear: nn.Linear, sparsity: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", (torch.rand_like(linear.weight) >= sparsity).to(linear.weight.dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight * self.mask, self.bias)


class LayerArm:
    """Forward and backward of a layer through autograd, as a user meets them; `grad` is `None` for forward only."""

    def __init__(self, layer: nn.Module, input: torch.Tensor, grad: torch.Tensor | None) -> None:
        self.layer, self.input, self.grad = layer, input, grad
        self.phases = (self.infer,) if grad is None else (self.forward, self.backward, self.release)

    def infer(self) -> None:
        with torch.inference_mode():
            self.output = self.layer(self.input)

    def forward(self) -> None:
        self.output = self.layer(self.input)

    def backward(self) -> None:
        self.output.backward(self.grad)

    def release(self) -> None:
        """Forget output and gradients, so that no backward pass has to add to old ones."""
        self.output = self.input.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None


def check_layer(layer: nn.Module, reference: nn.Linear, input: torch.Tensor, grad: torch.Tensor | None) -> None:
    """
    Compare a layer with the dense layer of the same weight, in float32, at the very operands that are timed.

    Raises:
        ValueError: if output or a gradient differs by more than rounding.
    """
    own = LayerArm(layer, input, grad)
    copy = input.detach().float().requires_grad_(grad is not None)
    dense = LayerArm(reference.float(), copy, None if grad is None else grad.float())
    for arm in (own, dense):
        for phase in arm.phases[:2]:
            phase()
    pairs = {"output": (own.output, dense.output)}
    if grad is not None:
        pairs |= {"input.grad": (input.grad, copy.grad), "bias.grad": (layer.bias.grad, reference.bias.grad)}
    if grad is not None and isinstance(layer, BlockSparseLinear):
        wanted = take_blocks(reference.weight.grad, layer.block_index, layer.block_shape)
        pairs["values.grad"] = layer.values.grad, wanted
    for name, (found, wanted) in pairs.items():
        require_close(f"{name} of {layer}", found, wanted, TOLERANCE[input.dtype])
    own.release()
    dense.release()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())


def require_close(name: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> float:
    """
    The relative error.

    Raises:
        ValueError: if it is above `tolerance`, or not a number.
    """
    error = relative_error(found, wanted)
    if not error <= tolerance:
        raise ValueError(
            f"no timing is reported for a wrong result. The relative error of {name} must be at most {tolerance:g} "
            f"against the dense reference. Got {error:.2e}. Run the tests (make test), or choose another backend."
        )
    return error
