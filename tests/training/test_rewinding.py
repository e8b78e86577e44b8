"""Learning-rate rewinding: the closed form at every step, its place in the Trainer, and what it refuses."""

from pathlib import Path

import pytest
from toy import toy_arguments, toy_config, toy_model, toy_trainer

from hf_dynsparse.models.auto import every_block
from hf_dynsparse.topology import TopologySettings, update_steps
from hf_dynsparse.training.rewinding import rewinding, rewound_multiplier


def told_as_a_story(total: int, warmup: int, begin: int, end: int, every: int) -> list[float]:
    """
    The same by a clock instead of a formula: it counts down the steps of decay that are left. Outside of the window it
    ticks. Inside it ticks too, and at each interval it is set back to what it was when the window began; it leaves the
    window as it came.
    """
    clock = total - (end - begin)
    peak, at_begin, multipliers = clock - warmup, 0, []
    for step in range(total + 1):
        if step == begin:
            at_begin = clock
        if begin <= step <= end and ((step - begin) % every == 0 or step == end):
            clock = at_begin
        multipliers.append(step / warmup if step < warmup else min(1.0, clock / peak))
        clock -= 1
    return multipliers


@pytest.mark.parametrize("every", [1, 7, 10])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("begin", "end"), [(0, 60), (20, 60), (0, 100), (30, 31)])
def test_every_step(begin: int, end: int, warmup: int, every: int) -> None:
    expected = told_as_a_story(120, warmup, begin, end, every)
    reached = [rewound_multiplier(step, 120, warmup, begin, end, every) for step in range(121)]
    assert reached == pytest.approx(expected, abs=1e-15)
    assert max(reached) == 1.0
    assert reached[-1] == 0.0
    # After the window it is the ordinary decay over the steps that are left.
    left = 120 - (end - begin) - warmup
    assert reached[end:] == pytest.approx([min(1.0, (120 - step) / left) for step in range(end, 121)])


def test_by_hand() -> None:
    # 20 steps, half of them pruned from the fourth on, every fourth a rewind: ten steps of decay, two of warm-up.
    multipliers = [round(8 * rewound_multiplier(step, 20, 2, 4, 14, 4), 9) for step in range(21)]
    assert multipliers == [0, 4, 8, 7, 6, 5, 4, 3, 6, 5, 4, 3, 6, 5, 6, 5, 4, 3, 2, 1, 0]


PRUNING = {"method": "prune_ofa", "topology_update_every": 2, "final_sparsity": 0.5, "num_topology_updates": None}
ALL_BLOCKS = every_block(toy_config(), 4)
SETTINGS = {**PRUNING, "learning_rate_rewinding": True, "warmup_steps": 1}


def rates(trainer: object) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_run_and_its_second_half(tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path, toy_model(**ALL_BLOCKS), **SETTINGS, save_strategy="steps", save_steps=5)
    whole.train()
    expected = [1e-2 * rewound_multiplier(step, 12, 1, 0, 6, 2) for step in range(12)]
    assert rates(whole) == pytest.approx(expected)
    resumed = toy_trainer(tmp_path / "resumed", toy_model(**ALL_BLOCKS), **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rates(resumed) == rates(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density_schedule": "0:1,0.5:0"}, "Got density_schedule='0:1,0.5:0' and topology_update_every=2"),
        ({"topology_update_every": None, "num_topology_updates": 3}, "and topology_update_every=None"),
        ({"method": "dynsparse", "final_sparsity": None}, "Got density_schedule='constant'"),
        ({"density_end": 1.0}, "Got 12 steps, a window from 0 to 12 and 1 steps of warm-up"),
        ({"lr_scheduler_type": "cosine"}, "a linear decay of its own. Got lr_scheduler_type='cosine'"),
    ],
)
def test_what_cannot_be_rewound(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_arguments(tmp_path, **{**SETTINGS, **given})


def test_rewinds_fall_on_updates() -> None:
    settings = TopologySettings(method="prune_ofa", topology_update_every=7, density_begin=0.22, density_end=0.6)
    multiplier = rewinding(settings, 100, 5)
    rises = [step for step in range(6, 101) if multiplier(step) > multiplier(step - 1)]
    updates = update_steps(100, topology_update_every=7)
    assert rises == [step for step in updates if 22 <= step < 60] + [60]  # at its end the window is left as it began
    assert multiplier(60) == multiplier(21) == pytest.approx(40 / 56)


def test_a_window_that_leaves_nothing_to_decay_over() -> None:
    settings = TopologySettings(method="prune_ofa", density_end=1.0)
    with pytest.raises(ValueError, match="Got 50 steps, a window from 0 to 50 and 0 steps of warm-up"):
        rewinding(settings, 50, 0)
