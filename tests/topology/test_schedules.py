"""When updates happen, and how much they replace."""

from itertools import pairwise

import pytest
from helpers import cosine_ratio

from hf_dynsparse.topology import SCHEDULES, default_num_updates, pruning_ratio_at, update_steps


@pytest.mark.parametrize(
    ("schedule", "ratios"),
    [
        ("cosine", [0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)]),
        ("linear", [0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5, 0.5, 0.5, 0.5]),
        ("step", [0.5, 0.5, 0.5, 0.0]),
    ],
)
def test_ratios_of_four_updates(schedule: str, ratios: list[float]) -> None:
    assert [pruning_ratio_at(update, 4, 0.5, schedule) for update in range(4)] == pytest.approx(ratios)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_one_and_never_rise(name: str) -> None:
    factors = [SCHEDULES[name](step / 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.0)


def test_the_default_is_the_cosine_of_the_paper() -> None:
    for update in (0, 1, 40, 79):
        assert pruning_ratio_at(update, 80, 0.5) == pytest.approx(cosine_ratio(update, 80, 0.5))


def test_bad_ratios_and_schedules_are_errors() -> None:
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]. Got .*The paper's optimum is 0.5"):
            pruning_ratio_at(0, 4, ratio)
    with pytest.raises(ValueError, match="`schedule` must be one of cosine, constant, linear, step. Got 'sine'"):
        pruning_ratio_at(0, 4, 0.5, "sine")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_updates": 0}, ()),
        ({"num_updates": 1}, (15,)),
        ({"num_updates": 2}, (10, 20)),
        ({"num_updates": 3}, (8, 15, 23)),
        ({"num_updates": 29}, tuple(range(1, 30))),
        ({"num_updates": 1, "first_step": 4}, (4,)),
        ({"num_updates": 2, "first_step": 10}, (10, 20)),
        ({"num_updates": 2, "last_step": 20}, (10, 20)),
        ({"num_updates": 1, "last_step": 20}, (20,)),
        ({"num_updates": 3, "first_step": 5, "last_step": 25}, (5, 15, 25)),
        ({"num_updates": 1, "first_step": 7, "last_step": 7}, (7,)),
        ({"num_updates": 0, "first_step": 7}, ()),
        ({"update_every": 10}, (10, 20)),
        ({"update_every": 10, "first_step": 11}, (20,)),
        ({"update_every": 10, "last_step": 19}, (10,)),
        ({"update_every": 7, "first_step": 7, "last_step": 28}, (7, 14, 21, 28)),
        ({"update_every": 30}, ()),
        ({"update_every": 1}, tuple(range(1, 30))),
        ({"update_every": 0.34}, (10, 20)),
        ({"update_every": 0.01}, tuple(range(1, 30))),
        ({"update_every": 5.0, "first_step": 0.3, "last_step": 0.75}, (10, 15, 20)),
        ({"num_updates": 2, "last_step": 0.7}, (11, 21)),
    ],
    ids=str,
)
def test_update_steps_of_thirty(arguments: dict, steps: tuple[int, ...]) -> None:
    assert update_steps(30, **arguments) == steps


def test_update_steps_are_distinct_and_even() -> None:
    for total in (100, 757):
        for count in (1, 7, 40, 99):
            steps = (0, *update_steps(total, count), total)
            gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
            assert len(steps) == count + 2
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


def test_the_shortest_runs() -> None:
    for total in (0, 1):
        assert update_steps(total, num_updates=0) == ()
        assert update_steps(total, update_every=1) == ()
    assert update_steps(2, num_updates=1) == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `num_updates` and `update_every`. Got num_updates=None and update_every=None"),
        ({"num_updates": 1, "update_every": 1}, "Got num_updates=1 and update_every=1"),
        (
            {"num_updates": 30},
            r"must lie in \[0, 29\] for 30 steps with updates from step 1 to 29. Got 30. Train longer",
        ),
        ({"num_updates": -1}, r"must lie in \[0, 29\].* Got -1"),
        ({"num_updates": 6, "first_step": 10, "last_step": 14}, r"must lie in \[0, 5\].* Got 6"),
        (
            {"num_updates": 1, "first_step": 0},
            "1 <= first_step <= last_step < total_steps = 30. Got first_step=0, last_step=None. Move them",
        ),
        ({"num_updates": 1, "last_step": 30}, "Got first_step=None, last_step=30"),
        ({"update_every": 5, "first_step": 20, "last_step": 10}, "Got first_step=20, last_step=10"),
        ({"update_every": 0}, "`update_every` must be a positive number of steps. Got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update_steps(30, **arguments)


@pytest.mark.parametrize(
    ("steps", "updates"),
    [(0, 0), (1, 0), (2, 1), (299, 1), (300, 2), (500, 4), (8_099, 79), (8_100, 80), (10**6, 80)],
)
def test_default_number_of_updates(steps, updates):
    assert default_num_updates(steps) == updates
    at = (0, *update_steps(steps, updates), steps)
    assert updates <= 1 or min(b - a for a, b in pairwise(at)) >= 100


@pytest.mark.parametrize(("window", "updates"), [((0.5, None), 5), ((None, 0.75), 7), ((200, 450), 3), ((5, 6), 1)])
def test_default_number_of_updates_in_a_window(window, updates):
    assert default_num_updates(1000, *window) == updates
    at = update_steps(1000, updates, None, *window)
    assert updates == 1 or min(b - a for a, b in pairwise(at)) >= 100
