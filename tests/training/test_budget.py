"""Runs by the clock: how a time becomes steps, and that the trial which tells changes nothing of the run."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dynsparse import DynSparseTrainer
from hf_dynsparse.reports.durations import format_time
from hf_dynsparse.training import budget
from hf_dynsparse.training.budget import check_budget, parse_time, plan_steps, planned_steps, steps_within
from tests.toy import toy_arguments, toy_collator, toy_examples, toy_model


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28_800), ("90m", 5400), ("300s", 300), ("90", 5400), ("1.5h", 5400), (" 2s ", 2)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "8 hours", "-3h", "0s", "1h30m", "nan", "9" * 400])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="must be given as 8h, 90m, 300s, or in minutes"):
        parse_time(text)


def test_format_time() -> None:
    assert list(map(format_time, (3, 119, 120, 5400, 28_800))) == ["3 s", "119 s", "2 min", "1 h 30 min", "8 h"]


@pytest.mark.parametrize(
    ("costs", "steps"),
    [
        ([], 200),
        ([(10.0, inf)], 200),  # never
        ([(10.0, 0.2)], 100),  # at each fifth of the run
        ([(2.0, 4.0)], 100),  # half a second a step
        ([(2.0, 4.0), (10.0, 0.3)], 70),
    ],
)
def test_steps_within_a_hundred_seconds(costs: list[tuple[float, float]], steps: int) -> None:
    assert steps_within(100.0, 0.5, costs) == steps


def test_too_little_time() -> None:
    with pytest.raises(ValueError, match=r"must hold a trial, a step of 0.5 s, and the evaluations. Got too little"):
        steps_within(10.0, 0.5, [(5.0, 0.5)])


@dataclass
class Arguments:
    """Of a script, before transformers has seen them."""

    time_budget: str
    settings: Any
    max_steps: int | None = None
    num_train_epochs: float | None = None

    def topology_settings(self) -> Any:
        return self.settings


@pytest.mark.parametrize(
    ("given", "method", "error"),
    [
        ({"time_budget": "8h"}, "rigl", None),
        ({"time_budget": "soon"}, "rigl", "Got 'soon'"),
        ({"time_budget": "8h", "max_steps": 7}, "rigl", "Got 8h and --max_steps 7. Leave one of them out"),
        ({"time_budget": "8h", "num_train_epochs": 1.5}, "rigl", "Got 8h and --num_train_epochs 1.5"),
        ({"time_budget": "8h"}, "gmp", "Got 8h and a density that changes. Give --max_steps"),
    ],
)
def test_what_a_budget_goes_with(given: dict[str, Any], method: str, error: str | None, tmp_path: Path) -> None:
    args = Arguments(settings=toy_arguments(tmp_path, method=method).topology_settings(), **given)
    if error is None:
        check_budget(args)
    else:
        with pytest.raises(ValueError, match=error):
            check_budget(args)


def test_the_run_does_not_know_of_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a run of the same number of steps, bit for bit; a checkpoint of it keeps the number."""
    found: list[Any] = []
    monkeypatch.setattr(budget, "steps_within", lambda *given: found.append(given) or 7)
    weights = []
    for name in ("planned", "given"):
        torch.manual_seed(1)
        model = toy_model(num_hidden_layers=1, hidden_dropout_prob=0.1)
        often = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 0.5}
        args: Any = toy_arguments(tmp_path / name, max_steps=7, save_strategy="steps", logging_steps=12, **often)
        args.time_budget = "10s"
        data = {"train_dataset": toy_examples(24), "eval_dataset": toy_examples(6, seed=1)}
        parts = {"data_collator": toy_collator(), **data}
        if name == "planned":
            before = args.to_dict()
            args.max_steps = plan_steps(model, args, **parts)
            assert args.to_dict() == before
            assert not (tmp_path / name / "trial").exists()
        trainer = DynSparseTrainer(model, args, **parts)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert planned_steps(str(tmp_path / "planned" / "checkpoint-4")) == 7
    ((seconds, step, costs),) = found
    (evaluation, eval_every), (saving, save_every) = costs
    assert seconds < 0.97 * 10 - evaluation  # without a reserve, the trial, and an evaluation at the end
    assert 0 < step < 5
    assert (eval_every, save_every) == (4, 0.5)
    assert min(evaluation, saving) > 0
