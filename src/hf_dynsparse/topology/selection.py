"""The highest of many scores, exactly as many as asked for."""

import math

import torch


def select_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """
    Positions of the `count` highest scores in ascending order, ties to the lower position: `torch.int64` of shape
    `(count,)`.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    size = scores.numel()
    candidates = None
    if size > 1 << 16 and count < size // 4:
        # Most positions of a large tensor cannot win: a sample gives a threshold below the winners. Checked, so exact.
        sample = scores[:: size >> 13]
        bound = sample.sort().values[max(0, sample.numel() - 1 - math.ceil(1.25 * sample.numel() * count / size + 32))]
        candidates = (scores >= bound).nonzero().squeeze(1)
        if candidates.numel() < count:
            candidates = None
    pool = scores if candidates is None else scores[candidates]
    threshold = pool.kthvalue(pool.numel() - count + 1).values
    chosen = pool > threshold
    ties = (pool == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    chosen = chosen.nonzero().squeeze(1)
    return chosen if candidates is None else candidates[chosen]
