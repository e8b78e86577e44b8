"""Group lasso on blocks, apart from the gradient."""

import math

import torch

from ..nn.shards import local_rows


@torch.no_grad()
def group_lasso_(values: torch.Tensor, learning_rate: float, strength: float, weight_std: float = 0.02) -> None:
    """
    Decoupled group lasso: shrink each block towards zero by a step of fixed length (arXiv:2108.06277, appendix).

    `w -= lr * strength * weight_std * sqrt(B) * w / sqrt(sum of w² over the block + 1e-6)`; for a rectangular block
    `B` is the side of the square of equal area.

    Args:
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): changed in place.
    """
    values, _ = local_rows(values)
    side = math.sqrt(values.shape[1] * values.shape[2])
    norm = values.square().sum((1, 2), keepdim=True).add_(1e-6).sqrt_()
    values.sub_(values / norm, alpha=learning_rate * strength * weight_std * math.sqrt(side))
