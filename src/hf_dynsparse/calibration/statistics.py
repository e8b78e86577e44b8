"""What passes through a layer, as sums over positions."""

import torch


class Statistics:
    """
    Moments of what a layer reads: `x` in the model as pruned so far, and `y`, at the same positions, in the dense one.
    Products are made in float32 and summed in float64.

    Args:
        width (`int`): inputs of the layer.

    Attributes:
        count (`int`): positions.
        gram, cross (`torch.Tensor` of shape `(width, width)`): sums of `x x'` and of `y x'`.
        total, dense_total (`torch.Tensor` of shape `(width,)`): sums of `x` and of `y`.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.gram, self.cross = torch.zeros(2, width, width, dtype=torch.float64, device=device)
        self.total, self.dense_total = torch.zeros(2, width, dtype=torch.float64, device=device)

    @classmethod
    def of_dense(cls, count: int, gram: torch.Tensor, total: torch.Tensor) -> "Statistics":
        """Where `x` is `y`: nothing before the layer has been pruned."""
        made = cls(0, gram.device)
        made.count, made.gram, made.cross, made.total, made.dense_total = count, gram, gram, total, total
        return made

    def add(self, inputs: torch.Tensor, dense: torch.Tensor) -> None:
        """Take in both inputs of some positions, `(positions, width)` each."""
        self.count += len(inputs)
        self.gram += inputs.T @ inputs
        self.cross += dense.T @ inputs
        self.total += inputs.sum(0, dtype=torch.float64)
        self.dense_total += dense.sum(0, dtype=torch.float64)


def rows_of(input: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    The positions of an input `(..., width)` as rows in float32, or finer. Where `mask` (`torch.Tensor` of shape
    `(batch, sequence)`) has an entry for each, those with a zero are left out.
    """
    rows = input.detach().flatten(0, -2)
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.flatten() != 0]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
