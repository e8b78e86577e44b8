"""A run that is told to stop saves, and goes on bit for bit."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_dynsparse.training.interruption import saves_when_stopped
from tests.toy import toy_model, toy_trainer


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those of a terminal: a suite that was started in the background ignores Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Kill(TrainerCallback):
    """Sends signals to its own process in the middle of step 5."""

    def __init__(self, *signals: int) -> None:
        self.signals = signals

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            for number in self.signals:
                os.kill(os.getpid(), number)


def trainer_of(folder: Path, *signals: int, **overrides: Any) -> Any:
    model = toy_model(num_hidden_layers=1, hidden_dropout_prob=0.1)
    saving = {"save_strategy": "steps", "save_steps": 12, "logging_steps": 12}
    trainer = toy_trainer(folder, model, **{**saving, **overrides})
    if signals:
        trainer.add_callback(Kill(*signals))
    return trainer


@pytest.mark.parametrize(("signals", "status"), [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGTERM], 130)])
def test_it_saves_and_goes_on(
    tmp_path: Path, signals: list[int], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = trainer_of(tmp_path, *signals)
    with pytest.raises(SystemExit) as ended, saves_when_stopped(trainer):
        trainer.train()
    assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert "after step 5 of 12, which is saved. The same command with --resume_from_checkpoint last" in caplog.text
    if status == 143:
        again = trainer_of(tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        whole = trainer_of(tmp_path / "whole")  # which sets the seed
        whole.train()
        state = whole.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize(
    ("signals", "overrides", "saved"),
    [
        ([signal.SIGINT] * 2, {}, []),
        ([signal.SIGINT], {"save_strategy": "no"}, []),
        ([signal.SIGINT], {"max_steps": 5, "num_topology_updates": 0}, ["checkpoint-5"]),
    ],
    ids=["second", "nothing saved", "last step"],
)
def test_it_ends_as_usual(tmp_path: Path, signals: list[int], overrides: dict[str, Any], saved: list[str]) -> None:
    """At once at a second Ctrl-C, and where nothing is saved; a run that has done all its steps has nothing left."""
    trainer = trainer_of(tmp_path, *signals, **overrides)
    with pytest.raises(KeyboardInterrupt), saves_when_stopped(trainer):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == saved
