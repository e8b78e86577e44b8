"""Scores of blocks by hand, and the selection of the highest."""

import pytest
import torch
from helpers import generator

from hf_dynsparse.topology import PRUNE_SCORES, REGROW_RULES, SCORES, BlockStatistics
from hf_dynsparse.topology.counts import replaced_count
from hf_dynsparse.topology.scores import resolve_score, select_highest, select_lowest


BLOCKS = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, -2.5]], [[1.25, 0.0], [-1.25, 0.5]]])


def statistics(count: int, **fields: torch.Tensor) -> BlockStatistics:
    return BlockStatistics(count, generator(), torch.device("cpu"), **fields)


@pytest.mark.parametrize(
    ("name", "field", "expected", "lowest"),
    [
        ("l1", "values", [4.0, 2.5, 3.0], 1),
        ("l2", "values", [2.0, 2.5, 3.375**0.5], 2),
        ("linf", "values", [1.0, 2.5, 1.25], 0),
        ("gradient", "gradient", [4.0, 2.5, 3.0], 1),
        ("momentum", "momentum", [4.0, 2.5, 3.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores_by_hand(name: str, field: str, expected: list[float], lowest: int, dtype: torch.dtype) -> None:
    score = SCORES[name].function(statistics(3, **{field: BLOCKS.to(dtype)}))
    assert score.dtype == torch.float32
    assert score.tolist() == pytest.approx(expected)
    assert int(score.argmin()) == lowest


def test_low_precision_values_do_not_overflow_or_round() -> None:
    large = torch.full((2, 16, 16), 1000.0, dtype=torch.float16)
    large[1, 0, 0] = 1001
    for name, first in (("l1", 256_000.0), ("l2", 16_000.0)):
        score = SCORES[name].function(statistics(2, values=large))
        assert score[0] == first
        assert score[1] > score[0]


def test_random_depends_on_the_generator_alone() -> None:
    scores = [SCORES["random"].function(statistics(1000)) for _ in range(2)]
    assert torch.equal(*scores)
    assert scores[0].unique().numel() > 990


def test_unfired_prefers_positions_that_were_never_active() -> None:
    ever = torch.rand(1000, generator=generator(1)) < 0.5
    score = SCORES["unfired"].function(statistics(1000, ever_active=ever))
    assert score[~ever].min() >= 0 > score[ever].max()


GRADIENT = torch.tensor([[[2.0, -4.0], [0.0, 6.0]], [[8.0, 0.0], [0.0, 1.0]], [[-1.0, 4.0], [2.0, 0.0]]])


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("weight_gradient", {"values": BLOCKS}, [2.0 + 4 + 6, 2.5, 1.25 + 2.5]),
        ("fisher", {"values": BLOCKS, "second_moment": GRADIENT.square()}, [4.0 + 16 + 36, 6.25, 1.5625 * 5]),
        ("saliency", {"saliency": torch.tensor([3.0, 1.0, 2.0])}, [3.0, 1.0, 2.0]),
        ("movement", {"values": BLOCKS, "first_values": torch.ones(1, 2, 2)}, [2.0, 6.5, 0.25 + 1 + 2.25 + 0.5]),
        ("mest", {"values": BLOCKS}, [4 + 0.12, 2.5 + 0.09, 3 + 0.07]),
        # Two input channels, of scale 2 and 4; an input that is always zero has no gradient and counts for nothing.
        ("gradient_normalised", {"input_scale": torch.tensor([[[2.0, 4.0]]])}, [1 + 1 + 1.5, 4 + 0.25, 0.5 + 1 + 1]),
        ("gradient_normalised", {"input_scale": torch.tensor([[[1.0, 1.0]]])}, [12.0, 9.0, 7.0]),
        (
            "correlation",
            {"input_scale": torch.tensor([[[2.0, 4.0]]]), "output_scale": torch.tensor([[[1.0], [5.0]]])},
            [1 + 1 + 0.3, 4 + 0.05, 0.5 + 1 + 0.2],
        ),
    ],
)
def test_scores_by_the_gradient_by_hand(name: str, fields: dict, expected: list[float]) -> None:
    every = {key: field.expand(3, *field.shape[1:]) for key, field in fields.items()}
    assert SCORES[name].function(statistics(3, gradient=GRADIENT, **every)).tolist() == pytest.approx(expected)


def test_an_input_that_is_always_zero_counts_for_nothing() -> None:
    silent = {"gradient": GRADIENT * torch.tensor([1.0, 0.0]), "input_scale": torch.tensor([[[2.0, 0.0]]])}
    score = SCORES["gradient_normalised"].function(statistics(3, **silent))
    assert score.tolist() == [1.0, 4.0, 1.5]


def test_rank_one_by_hand() -> None:
    """Inputs of scales 3 and 4, outputs of 1, 2 and 2: 5 * 3. Then 2 * 3, and nothing where inputs are zero."""
    scales = {"input_scale": torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[0.0, 0.0]]])}
    scales["output_scale"] = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 3.0], [9.0, 9.0, 9.0]]).unsqueeze(2)
    assert SCORES["rank_one"].function(statistics(3, **scales)).tolist() == pytest.approx([15.0, 6.0, 0.0])


def test_rank_one_random_draws_in_proportion() -> None:
    """Of pairs of 3 and 1 the first wins in three of four; one of 0 never, and its score is finite."""
    scales = {"input_scale": torch.tensor([3.0, 1.0, 0.0]).repeat(4000).view(-1, 1, 1)}
    scales["output_scale"] = torch.ones(12000, 1, 1)
    scores = SCORES["rank_one_random"].function(statistics(12000, **scales)).view(-1, 3)
    assert scores.isfinite().all()
    shares = torch.bincount(scores.argmax(1), minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=0.02)  # three standard deviations


def test_channels_of_rounding_are_not_blown_up() -> None:
    by_rounding = torch.tensor([[[1.0, 1.0]], [[1e-9, 1e-9]], [[1.0, 1e-9]]])
    scales = {"input_scale": torch.ones(3, 1, 2), "output_scale": torch.tensor([1.0, 1e-9, 1.0]).view(3, 1, 1)}
    scores = SCORES["correlation"].function(statistics(3, gradient=by_rounding, **scales))
    assert scores.tolist() == pytest.approx([2, 0, 1], abs=1e-6)


@pytest.mark.parametrize(("wanted", "by_gradient"), [(1, [7]), (2, [0, 7]), (3, [0, 7]), (4, [0, 5, 7])])
def test_three_of_four_by_gradient_by_hand(wanted: int, by_gradient: list[int]) -> None:
    gradient = torch.tensor([9.0, 30.0, 1.0, 20.0, 0.0, -5.0, 3.0, 10.0]).view(8, 1, 1)
    barred = torch.zeros(2, 4, dtype=torch.bool).index_fill(1, torch.tensor([1, 3]), True)
    barred[1] = False
    others = set()
    for seed in range(30):
        blocks = BlockStatistics(
            8, generator(seed), torch.device("cpu"), wanted=wanted, gradient=gradient, barred=barred
        )
        score = SCORES["gradient_random"].function(blocks).masked_fill(barred.view(-1), -torch.inf)
        chosen = select_highest(score, wanted).tolist()
        assert set(by_gradient) <= set(chosen)
        others |= set(chosen) - set(by_gradient)
    free = {0, 2, 4, 5, 6, 7}
    assert others == (free - set(by_gradient) if wanted > len(by_gradient) else set())


@pytest.mark.parametrize(
    ("occupied", "barred", "regrown"),
    [
        (["x..", ".x.", "..."], [], [8]),
        (["xx..", "...."], [], [6, 7]),
        (["x..x", "....", "x..x"], [], [5, 6]),
        (["x..x", "....", "x..x"], [4, 5, 7], [6]),
    ],
)
def test_balanced_fills_what_is_empty_by_hand(occupied: list[str], barred: list[int], regrown: list[int]) -> None:
    filled = torch.tensor([[place == "x" for place in row] for row in occupied])
    closed = filled.clone()
    closed.view(-1)[barred] = True
    for seed in range(10):
        fields = {"wanted": len(regrown), "occupied": filled, "barred": closed}
        blocks = BlockStatistics(filled.numel(), generator(seed), torch.device("cpu"), **fields)
        score = SCORES["balanced"].function(blocks)
        assert select_highest(score, len(regrown)).tolist() == regrown


def test_every_score_declares_what_it_looks_at() -> None:
    filled = dict.fromkeys(("ever_active", "newborn"), torch.tensor([True, False, True]))
    filled |= dict.fromkeys(("values", "gradient", "second_moment", "first_values", "momentum"), BLOCKS)
    filled |= dict.fromkeys(("input_scale", "output_scale"), BLOCKS)
    filled["saliency"] = torch.rand(3)
    filled |= dict.fromkeys(("occupied", "barred"), torch.tensor([[True, False, False]]))
    for score in SCORES.values():
        given = score.function(statistics(3, **{name: filled[name] for name in score.needs}))
        assert given.shape == (3,)
        for missing in score.needs:
            fields = {name: filled[name] for name in score.needs if name != missing}
            with pytest.raises(ValueError, match="does not declare. Add it to `needs`"):
                score.function(statistics(3, **fields))


def test_names() -> None:
    size, use = ("l1", "l1_patient", "l2", "linf"), ("weight_gradient", "fisher", "saliency", "movement", "mest")
    assert tuple(PRUNE_SCORES) == (*size, "random", "gradient", *use)
    by_gradient = "gradient_normalised", "correlation", "rank_one", "rank_one_random", "gradient_random", "momentum"
    assert ("random", "gradient", "unfired", "balanced", *by_gradient) == tuple(REGROW_RULES)
    with pytest.raises(ValueError, match="`regrow_rule` must be one of random, gradient, unfired, .* Got 'l1'"):
        resolve_score("l1", "regrow_rule", REGROW_RULES)


@pytest.mark.parametrize(
    ("ratio", "nnzb", "num_blocks", "readmit", "count"),
    [
        (0.0, 10, 100, False, 0),
        (0.5, 10, 100, False, 5),
        (0.25, 10, 100, False, 3),  # halves go up
        (0.24, 10, 100, False, 2),
        (1e-9, 10, 100, False, 1),  # at least one
        (1.0, 10, 100, False, 10),
        (1.0, 10, 14, False, 4),  # as many as there are free positions
        (1.0, 10, 14, True, 10),
        (0.5, 1, 2, False, 1),
        (0.5, 10, 10, False, 0),
        (1.0, 10, 10, True, 0),
    ],
)
def test_replaced_count(ratio: float, nnzb: int, num_blocks: int, readmit: bool, count: int) -> None:
    assert replaced_count(ratio, nnzb, num_blocks, readmit) == count


def stable_highest(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_select_highest_with_ties(levels: int) -> None:
    scores = torch.randint(levels, (64,), generator=generator(levels)).float()
    for count in (0, 1, 3, 17, 63, 64):
        assert select_highest(scores, count).tolist() == stable_highest(scores, count)


def test_select_lowest_takes_what_is_spared_last() -> None:
    scores = torch.tensor([2.0, 5.0, 2.0, 1.0, 0.0, 7.0])
    spared = torch.tensor([False, False, True, True, True, False])
    lowest = [select_lowest(scores, count, spared).tolist() for count in range(6)]
    assert lowest == [[], [0], [0, 1], [0, 1, 5], [0, 1, 4, 5], [0, 1, 3, 4, 5]]
    for none in (None, torch.zeros(6, dtype=torch.bool)):
        assert select_lowest(scores, 3, none).tolist() == [0, 3, 4]


def test_select_highest_by_hand() -> None:
    scores = torch.tensor([2.0, 5.0, 2.0, -torch.inf, 2.0, 7.0])
    assert select_highest(scores, 1).tolist() == [5]
    assert select_highest(scores, 4).tolist() == [0, 1, 2, 5]
    assert select_highest(-scores, 2).tolist() == [0, 3]


LARGE = (1 << 16) + 12_345
SCORINGS = {
    "uniform": lambda draw: torch.rand(LARGE, generator=draw),
    "ties": lambda draw: torch.randint(5, (LARGE,), generator=draw).float(),
    "constant": lambda draw: torch.zeros(LARGE),
    "mostly barred": lambda draw: torch.rand(LARGE, generator=draw).where(torch.arange(LARGE) % 7 == 0, -torch.inf),
    "rising": lambda draw: torch.arange(LARGE).float(),
    # Every ninth position is sampled: if the highest are there, the others look better than they are, and the reverse.
    "sample too high": lambda draw: torch.rand(LARGE, generator=draw) + (torch.arange(LARGE) % 9 == 0).float(),
    "sample too low": lambda draw: torch.rand(LARGE, generator=draw) - (torch.arange(LARGE) % 9 == 0).float(),
}


@pytest.mark.parametrize("name", SCORINGS)
def test_select_highest_of_a_large_tensor(name: str) -> None:
    scores = SCORINGS[name](generator())
    for count in (1, 5000, LARGE // 4 - 1, LARGE // 4 + 1):
        assert select_highest(scores, count).tolist() == stable_highest(scores, count)


def test_patient_score_spares_the_newest_while_others_are_left() -> None:
    newborn = torch.tensor([True, False, True, False, False])
    values = torch.tensor([0.1, 3.0, 0.2, -2.0, 1.0]).view(5, 1, 1)
    score = SCORES["l1_patient"].function(statistics(5, values=values, newborn=newborn))
    assert score.argsort().tolist() == [4, 3, 1, 0, 2]
    none_new = SCORES["l1_patient"].function(statistics(5, values=values, newborn=torch.zeros(5, dtype=torch.bool)))
    assert torch.equal(none_new, SCORES["l1"].function(statistics(5, values=values)))
