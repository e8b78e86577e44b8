"""Scores of blocks: the lowest are pruned, the highest are regrown. One small function each, in one table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks.draw import spread_evenly


# Share of blocks that `gradient_random` regrows by gradient: 3 to 1 in MST.
GRADIENT_SHARE = 0.75

# Weight of the gradient in `mest` (Yuan et al., 2021).
MEST_LAMBDA = 0.01

# A channel of which only rounding is left must not be blown up to the size of the others.
SCALE_FLOOR = 0.01


@dataclass(frozen=True)
class BlockStatistics:
    """
    What a score may look at, for a set of `count` blocks. A field after `wanted` is filled only if the score declares
    that it needs it.

    Args:
        count (`int`): number of blocks.
        generator (`torch.Generator`): on the CPU, the same on every rank.
        device (`torch.device`): where the score must live.
        wanted (`int`): how many blocks will be regrown; 0 for a prune score.
        values (`torch.Tensor` of shape `(count, rows, columns)`): weights of active blocks.
        gradient (`torch.Tensor` of shape `(count, rows, columns)`): dense gradient, summed over micro-batches,
            averaged over ranks.
        momentum (`torch.Tensor` of shape `(count, rows, columns)`): running mean of the dense gradient.
        input_scale (`torch.Tensor` of shape `(count, 1, columns)`): root of the summed squares of each input channel
            of the layer, over the tokens that the loss depends on.
        output_scale (`torch.Tensor` of shape `(count, rows, 1)`): the same of the gradient of each output.
        second_moment (`torch.Tensor` of shape `(count, rows, columns)`, `torch.float32`): AdamW's running mean of the
            squared gradient, its bias corrected by the age of each block.
        first_values (`torch.Tensor` of shape `(count, rows, columns)`): what active blocks began with.
        saliency (`torch.Tensor` of shape `(count,)`, `torch.float32`): sum of `|w g|` over the entries of a block and
            the steps since the last update.
        newborn (`torch.Tensor` of shape `(count,)`, `torch.bool`): which active blocks the last update brought.
        ever_active (`torch.Tensor` of shape `(count,)`, `torch.bool`): which blocks were active at any time so far.
        occupied (`torch.Tensor` of shape `(block_rows, block_columns)`, `torch.bool`): where blocks stay active.
        barred (`torch.Tensor` of shape `(block_rows, block_columns)`, `torch.bool`): where none may be regrown.
    """

    count: int
    generator: torch.Generator
    device: torch.device
    wanted: int = 0
    values: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    first_values: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    newborn: torch.Tensor | None = None
    ever_active: torch.Tensor | None = None
    occupied: torch.Tensor | None = None
    barred: torch.Tensor | None = None


@dataclass(frozen=True)
class Score:
    """
    A score and the statistics it needs.

    Args:
        function (`Callable`): `BlockStatistics -> torch.Tensor` of shape `(count,)`.
        needs (`frozenset[str]`): fields of `BlockStatistics`, of those after `wanted`.
    """

    function: Callable[[BlockStatistics], torch.Tensor]
    needs: frozenset[str] = frozenset()

    def __call__(self, blocks: BlockStatistics) -> torch.Tensor:
        """
        The scores of `blocks`, of shape `(count,)`.

        Raises:
            ValueError: for another shape. An error of `function` says what it was given.
        """
        try:
            scores = self.function(blocks)
        except (AttributeError, TypeError) as error:
            given = ", ".join(sorted(self.needs)) or "none"
            error.add_note(f"A score gets the statistics that it `needs`, here: {given}. All others are None.")
            raise
        shape = getattr(scores, "shape", type(scores).__name__)
        if shape != (blocks.count,):
            raise ValueError(
                f"A score must give a number for each block, a tensor of shape ({blocks.count},). Got {shape}. Sum "
                "over the entries of a block, as in `blocks.values.abs().sum((1, 2))`."
            )
        return scores


def l1(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of magnitudes: the paper's default (arXiv:2108.06277, section 3)."""
    return _given(blocks.values).abs().sum((1, 2), dtype=torch.float32)


def l1_patient(blocks: BlockStatistics) -> torch.Tensor:
    """
    L1 norm, but what the last update brought goes only after everything else: a block that starts at zero has had one
    stretch of training, and would else be the first to go.
    """
    norm = l1(blocks)
    return norm + _given(blocks.newborn) * (norm.max() + 1.0)


def l2(blocks: BlockStatistics) -> torch.Tensor:
    """Euclidean norm."""
    return _given(blocks.values).float().square().sum((1, 2)).sqrt()


def linf(blocks: BlockStatistics) -> torch.Tensor:
    """Largest magnitude."""
    return _given(blocks.values).float().abs().amax((1, 2))


def weight_gradient(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of `|w * g|`: how much the loss changes, to first order, if each entry goes (SNIP, arXiv:1810.02340)."""
    return (_given(blocks.values).float() * _given(blocks.gradient).float()).abs().sum((1, 2))


def fisher(blocks: BlockStatistics) -> torch.Tensor:
    """
    Sum of `w² v`, `v` the mean of the squared gradient that AdamW keeps: twice what the loss gains, to second order,
    if each entry goes and the diagonal of the empirical Fisher information is its curvature (arXiv:1801.05787,
    section 2). Needs no dense gradient.
    """
    return (_given(blocks.values).float().square() * _given(blocks.second_moment)).sum((1, 2))


def saliency(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of `|w g|` over the steps since the last update: `weight_gradient` of many batches. No dense gradient."""
    return _given(blocks.saliency)


def movement(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of `|w - w0|`, `w0` what an entry began with: how far it has come (arXiv:1905.01067)."""
    return (_given(blocks.values).float() - _given(blocks.first_values).float()).abs().sum((1, 2))


def mest(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of `|w| + 0.01 |g|` (MEST, arXiv:2110.14032)."""
    return l1(blocks) + MEST_LAMBDA * gradient(blocks)


def gradient(blocks: BlockStatistics) -> torch.Tensor:
    """L1 norm of the dense gradient: RigL (arXiv:1911.11134), by blocks."""
    return _given(blocks.gradient).float().abs().sum((1, 2))


def gradient_normalised(blocks: BlockStatistics) -> torch.Tensor:
    """
    The gradient of each entry divided by the scale of its input channel: what it would be if all channels had the same
    scale, so that a few large ones do not draw every block to their columns.
    """
    return _over(_given(blocks.gradient).float(), _given(blocks.input_scale)).abs().sum((1, 2))


def correlation(blocks: BlockStatistics) -> torch.Tensor:
    """
    Sum of the magnitudes of `sum(d * x) / (|d| |x|)` for input channel `x` and gradient `d` of an output, over tokens:
    each in [0, 1]. Its square is what a best step in this entry alone would gain, by the diagonal of the empirical
    Fisher information under independent `x` and `d`.
    """
    by_input = _over(_given(blocks.gradient).float(), _given(blocks.input_scale))
    return _over(by_input, _given(blocks.output_scale)).abs().sum((1, 2))


def rank_one(blocks: BlockStatistics) -> torch.Tensor:
    """
    Norm of the scales of the input channels of a block, times that of its outputs: what the norm of its dense gradient
    cannot exceed, and is in proportion to if inputs and output gradients are independent of each other (K-FAC,
    arXiv:1503.05671, section 3). Needs no dense gradient.
    """
    scales = _given(blocks.input_scale), _given(blocks.output_scale)
    return torch.stack([scale.float().square().sum((1, 2)).sqrt() for scale in scales]).prod(0)


def rank_one_random(blocks: BlockStatistics) -> torch.Tensor:
    """
    Drawn one after the other, with chances in proportion to `rank_one`, whose highest are all in the same few rows and
    columns: the highest `u^(1 / score)`, `u` uniform (Efraimidis and Spirakis, 2006), here its logarithm.
    """
    drawn = 1.0 - torch.rand(blocks.count, generator=blocks.generator, dtype=torch.float64)  # in (0, 1]
    return drawn.log().to(blocks.device) / rank_one(blocks).double().clamp_min(torch.finfo(torch.float32).tiny)


def momentum(blocks: BlockStatistics) -> torch.Tensor:
    """L1 norm of the running mean of the dense gradient: SNFS (arXiv:1907.04840), by blocks."""
    return _given(blocks.momentum).float().abs().sum((1, 2))


def gradient_random(blocks: BlockStatistics) -> torch.Tensor:
    """Three of four by gradient, the others anywhere (MST, arXiv:2408.11746)."""
    by_gradient = gradient(blocks).masked_fill(_given(blocks.barred).view(-1), -math.inf)
    return _preferring(select_highest(by_gradient, math.floor(GRADIENT_SHARE * blocks.wanted + 0.5)), blocks)


def random(blocks: BlockStatistics) -> torch.Tensor:
    """Uniform: each set of blocks is equally likely (SET, and the paper's regrow rule)."""
    return torch.rand(blocks.count, generator=blocks.generator).to(blocks.device)


def unfired(blocks: BlockStatistics) -> torch.Tensor:
    """Uniform among positions that were never active, then among the others (arXiv:2102.02887)."""
    return random(blocks) - _given(blocks.ever_active).float()


def balanced(blocks: BlockStatistics) -> torch.Tensor:
    """At random where block rows and block columns are emptiest, so that no input or output goes unused."""
    occupied, free = _given(blocks.occupied).cpu(), ~_given(blocks.barred).cpu()
    return _preferring(spread_evenly(occupied, free, blocks.wanted, blocks.generator).to(blocks.device), blocks)


def _preferring(chosen: torch.Tensor, blocks: BlockStatistics) -> torch.Tensor:
    """Random scores, the highest for the positions `chosen`."""
    return random(blocks).index_add(0, chosen, torch.ones(len(chosen), device=blocks.device))


def _over(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`numbers / scale`, but no channel counts as weaker than `SCALE_FLOOR` times their mean."""
    scale = scale.float()
    return numbers / scale.clamp_min(SCALE_FLOOR * scale.mean() + torch.finfo(torch.float32).tiny)


def _given(field: torch.Tensor | None) -> torch.Tensor:
    if field is None:
        raise ValueError("A score used a statistic that it does not declare. Add it to `needs` in `SCORES`.")
    return field


SCORES: dict[str, Score] = {
    "l1": Score(l1, frozenset({"values"})),
    "l1_patient": Score(l1_patient, frozenset({"values", "newborn"})),
    "l2": Score(l2, frozenset({"values"})),
    "linf": Score(linf, frozenset({"values"})),
    "random": Score(random),
    "gradient": Score(gradient, frozenset({"gradient"})),
    "weight_gradient": Score(weight_gradient, frozenset({"values", "gradient"})),
    "fisher": Score(fisher, frozenset({"values", "second_moment"})),
    "saliency": Score(saliency, frozenset({"saliency"})),
    "movement": Score(movement, frozenset({"values", "first_values"})),
    "mest": Score(mest, frozenset({"values", "gradient"})),
    "unfired": Score(unfired, frozenset({"ever_active"})),
    "balanced": Score(balanced, frozenset({"occupied", "barred"})),
    "gradient_normalised": Score(gradient_normalised, frozenset({"gradient", "input_scale"})),
    "correlation": Score(correlation, frozenset({"gradient", "input_scale", "output_scale"})),
    "rank_one": Score(rank_one, frozenset({"input_scale", "output_scale"})),
    "rank_one_random": Score(rank_one_random, frozenset({"input_scale", "output_scale"})),
    "gradient_random": Score(gradient_random, frozenset({"gradient", "barred"})),
    "momentum": Score(momentum, frozenset({"momentum"})),
}

# What only training can tell; the other fields are read off the layer.
OBSERVED = frozenset({"gradient", "momentum", "input_scale", "output_scale"})


class _Names(Sequence[str]):
    """Keys of `SCORES` that serve one purpose, those added later included."""

    def __init__(self, serves: Callable[[Score], bool]) -> None:
        self._serves = serves

    def _now(self) -> tuple[str, ...]:
        return tuple(name for name, score in SCORES.items() if self._serves(score))

    def __len__(self) -> int:
        return len(self._now())

    def __getitem__(self, number: Any) -> Any:
        return self._now()[number]


# An inactive block has no values to look at; a pruned one was active, so its history says nothing.
OF_PRUNING = frozenset({"values", "gradient", "second_moment", "first_values", "saliency", "newborn"})
OF_REGROWING = frozenset({"ever_active", "occupied", "barred", *OBSERVED})
PRUNE_SCORES = _Names(lambda score: score.needs <= OF_PRUNING)
REGROW_RULES = _Names(lambda score: score.needs <= OF_REGROWING)


def check_regrow_std(regrow_std: float) -> None:
    """
    Raises:
        ValueError: if the standard deviation of the values of new blocks is negative or not a number.
    """
    if not regrow_std >= 0.0:
        raise ValueError(
            f"`regrow_std` is the standard deviation of the values of new blocks and must not be negative. Got "
            f"{regrow_std}. 0 starts them at zero, as the paper does."
        )


# What an error about a name that is not in a table adds.
OWN_NAMES = "One of your own must be registered first, by `register_score` or its like: give its file as `--plugin`."


def resolve_score(name: str, argument: str, allowed: Sequence[str]) -> Score:
    """
    Turn the value of `argument` ("prune_score" or "regrow_rule") into a score.

    Raises:
        ValueError: if the name is not among `allowed`.
    """
    if name not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(allowed)}. Got {name!r}. {OWN_NAMES}")
    return SCORES[name]


def select_lowest(scores: torch.Tensor, count: int, spared: torch.Tensor | None = None) -> torch.Tensor:
    """
    Positions of the `count` lowest scores in ascending order, ties to the lower position: `torch.int64` of shape
    `(count,)`. Those that are `spared` (`torch.bool` of the shape of `scores`) go only after all others.
    """
    if spared is None or not spared.any():
        return select_highest(-scores, count)
    first, last = ((~spared).nonzero().squeeze(1), spared.nonzero().squeeze(1))
    taken = min(count, len(first))
    chosen = first[select_highest(-scores[first], taken)], last[select_highest(-scores[last], count - taken)]
    return torch.cat(chosen).sort().values


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
