"""
What lies between the products of a transformer, on a CPU in one pass over memory each way: these passes wait for
memory, not for arithmetic.

Each is one operator of PyTorch after the other wherever more is asked for than outputs and gradients of float32: under
`torch.compile`, whose compiler makes passes of its own, in an export, in other dtypes, on other devices.
"""

import torch
from torch.nn import functional as F

from . import native
from .dropout import draw_seed, dropout, has_kernels, seeded_dropout
from .transforms import is_plain


WIDTH = 16  # rows of a normalisation are made of whole registers


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The cross-entropy of each row, 0 where the label is -100: as that of PyTorch without a reduction, to rounding. No
    probabilities are stored: the backward pass computes them again while it writes the gradient.

    Args:
        logits (`torch.Tensor` of shape `(rows, classes)`).
        labels (`torch.Tensor` of shape `(rows,)`, `torch.int64`): classes, or -100.

    Raises:
        IndexError: for a label that is no class.
    """
    if labels.dtype == torch.int64 and _can_fuse(logits):
        losses: torch.Tensor = _CrossEntropy.apply(logits, labels)
        return losses
    return F.cross_entropy(logits, labels, reduction="none")


def residual_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    p: float = 0.0,
) -> torch.Tensor:
    """
    `layer_norm(dropout(input, p) + residual)`, with the seeded dropout of [`hf_dynsparse.ops.dropout`]: the same draws
    as one after the other.

    Args:
        input, residual (`torch.Tensor` of shape `(..., width)`).
        weight, bias (`torch.Tensor` of shape `(width,)`).
        epsilon (`float`): added to the variance.
        p (`float`): of dropout, in [0, 1].
    """
    fits = input.shape == residual.shape and input.shape[-1] % WIDTH == 0 and input.numel() > 0
    if fits and p < 1.0 and _can_fuse(input, residual, weight, bias):
        seed = int(draw_seed()) if p else 0
        output: torch.Tensor = _ResidualNorm.apply(input, residual, weight, bias, epsilon, seed, p)
        return output
    return F.layer_norm(dropout(input, p) + residual, input.shape[-1:], weight, bias, epsilon)


def _can_fuse(*tensors: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
        and type(tensors[-1]) in (torch.Tensor, torch.nn.Parameter)
        and is_plain(tensors[0])
        and has_kernels()
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):  # type: ignore[no-untyped-def]
        losses, sums = native.cross_entropy(logits, labels)
        ctx.save_for_backward(logits, labels, sums)
        return losses

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        logits, labels, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient will be wanted
            losses = F.cross_entropy(logits, labels, reduction="none")
            return *torch.autograd.grad(losses, logits, grad, create_graph=True), None
        return native.cross_entropy_backward(grad, logits, labels, sums), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, epsilon, seed, p):  # type: ignore[no-untyped-def]
        output, mean, deviation = native.residual_norm(input, residual, weight, bias, epsilon, seed, p)
        ctx.save_for_backward(input, residual, weight, bias, mean, deviation)
        ctx.numbers = epsilon, seed, p
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        input, residual, weight, bias, mean, deviation = ctx.saved_tensors
        epsilon, seed, p = ctx.numbers
        if torch.is_grad_enabled():
            kept = seeded_dropout(input, torch.tensor(seed), p) if p else input
            output = F.layer_norm(kept + residual, weight.shape, weight, bias, epsilon)
            needed = ctx.needs_input_grad
            wanted = [one for one, need in zip((input, residual, weight, bias), needed, strict=False) if need]
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in needed)
        gradients = native.residual_norm_backward(grad, input, residual, mean, deviation, weight, seed, p)
        return *gradients, None, None, None
