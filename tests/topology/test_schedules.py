"""When updates happen, and how much they replace."""

from itertools import pairwise

import pytest
from helpers import cosine_ratio

from hf_dynsparse.topology import SCHEDULES, default_num_updates, pruning_ratio_at, update_steps


WHEN = ("number", "every", "first", "last")  # arguments of `update_steps` in their order


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
    with pytest.raises(ValueError, match="`pruning_schedule` must be one of cosine, constant, linear, step. Got"):
        pruning_ratio_at(0, 4, 0.5, "sine")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"number": 0}, ()),
        ({"number": 1}, (15,)),
        ({"number": 2}, (10, 20)),
        ({"number": 3}, (8, 15, 23)),
        ({"number": 29}, tuple(range(1, 30))),
        ({"number": 1, "first": 4}, (4,)),
        ({"number": 2, "first": 10}, (10, 20)),
        ({"number": 2, "last": 20}, (10, 20)),
        ({"number": 1, "last": 20}, (20,)),
        ({"number": 3, "first": 5, "last": 25}, (5, 15, 25)),
        ({"number": 1, "first": 7, "last": 7}, (7,)),
        ({"number": 0, "first": 7}, ()),
        ({"every": 10}, (10, 20)),
        ({"every": 10, "first": 11}, (20,)),
        ({"every": 10, "last": 19}, (10,)),
        ({"every": 7, "first": 7, "last": 28}, (7, 14, 21, 28)),
        ({"every": 30}, ()),
        ({"every": 1}, tuple(range(1, 30))),
        ({"every": 0.34}, (10, 20)),
        ({"every": 0.01}, tuple(range(1, 30))),
        ({"every": 5.0, "first": 0.3, "last": 0.75}, (10, 15, 20)),
        ({"number": 2, "last": 0.7}, (11, 21)),
    ],
    ids=str,
)
def test_update_steps_of_thirty(arguments: dict, steps: tuple[int, ...]) -> None:
    assert update_steps(30, *map(arguments.get, WHEN)) == steps


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
        assert update_steps(total, num_topology_updates=0) == ()
        assert update_steps(total, topology_update_every=1) == ()
    assert update_steps(2, num_topology_updates=1) == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `num_topology_updates` .* Got num_topology_updates=None and"),
        ({"number": 1, "every": 1}, "Got num_topology_updates=1 and topology_update_every=1"),
        (
            {"number": 30},
            r"must lie in \[0, 29\] for 30 steps with updates from step 1 to 29. Got 30. Train longer",
        ),
        ({"number": -1}, r"must lie in \[0, 29\].* Got -1"),
        ({"number": 6, "first": 10, "last": 14}, r"must lie in \[0, 5\].* Got 6"),
        (
            {"number": 1, "first": 0},
            "1 <= topology_first_step <= .* < total_steps = 30. Got topology_first_step=0, .*None. Move them",
        ),
        ({"number": 1, "last": 30}, "Got topology_first_step=None, topology_last_step=30"),
        ({"every": 5, "first": 20, "last": 10}, "Got topology_first_step=20, topology_last_step=10"),
        ({"every": 0}, "`topology_update_every` must be a positive number of steps. Got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update_steps(30, *map(arguments.get, WHEN))


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
