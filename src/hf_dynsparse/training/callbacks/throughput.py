"""Callbacks that know nothing of topologies: the throughput of a run, and the epoch for a masking collator."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import ExportableState


Callback = TypeVar("Callback", bound=TrainerCallback)


def find_callback(callbacks: Iterable[TrainerCallback], kind: type[Callback]) -> Callback | None:
    """
    The callback of a kind. A trainer's own list is what to look in, each time: on resume it may make callbacks anew.
    """
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def check_one_of_each(callbacks: Iterable[TrainerCallback], kinds: tuple[type[TrainerCallback], ...]) -> None:
    """
    Raises:
        ValueError: if there are two callbacks of one of the `kinds`.
    """
    callbacks = list(callbacks)
    for kind in kinds:
        found = [type(callback).__name__ for callback in callbacks if isinstance(callback, kind)]
        if len(found) > 1:
            raise ValueError(
                f"A trainer must have one `{kind.__name__}`: two would both act on the model. Got {', '.join(found)}. "
                f"Give one, or `remove_callback({kind.__name__})` first."
            )


def check_alone(callback: TrainerCallback, state: TrainerState) -> None:
    """
    In `on_train_begin` of a callback that exports its state, under a trainer that does not check it before.

    Raises:
        ValueError: if there is another one of its class.
    """
    name = type(callback).__name__
    if isinstance(cast(dict[str, Any], state.stateful_callbacks).get(name), list):
        check_one_of_each([callback, callback], (type(callback),))


def saved_state(callback: TrainerCallback, state: TrainerState) -> dict[str, Any] | None:
    """The `"args"` and `"attributes"` that a run has kept of a callback of this class, if it had one."""
    return cast(dict[str, Any], state.stateful_callbacks).get(type(callback).__name__)


def keep_state(callback: Any, state: TrainerState) -> None:
    """In `on_train_begin`: let the checkpoints of a run hold the state of a callback that it did not have before."""
    cast(dict[str, Any], state.stateful_callbacks).setdefault(type(callback).__name__, callback.state())


def add_to_log(state: TrainerState, logs: dict[str, float], metrics: Mapping[str, float]) -> None:
    """
    In `on_log`: put metrics into an entry of training or evaluation, for callbacks to come and in the history of the
    run.
    """
    if "loss" in logs or "eval_loss" in logs:
        logs.update(metrics)
        state.log_history[-1].update(metrics)


class ThroughputCallback(TrainerCallback, ExportableState):
    """
    Seconds spent in optimiser steps, data loading, evaluation and saving left out; `tokens` is counted by the trainer.
    Both go on after a resume.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean over the steps of the run so far; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "seconds": self.seconds}}

    def restore(self, state: TrainerState) -> None:
        """Take over what a checkpoint keeps, if it keeps any."""
        saved = saved_state(self, state)
        if saved is not None:
            self.tokens, self.seconds = saved["attributes"]["tokens"], saved["attributes"]["seconds"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens, self.seconds = 0, 0.0
        if state.global_step > 0:
            self.restore(state)
        keep_state(self, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._began


def pass_and_step(state: TrainerState) -> tuple[int, int]:
    """
    Which pass over data without length a run was in, from 0, and how many optimiser steps it had done in it: where to
    go on. Needs the `state.epoch` that [`EpochCallback`] keeps.
    """
    whole = math.floor(state.epoch or 0.0)
    steps = round(((state.epoch or 0.0) - whole) * state.max_steps)
    if steps == 0 and state.global_step == state.max_steps:
        return 0, state.max_steps  # the first pass has lasted for the whole run
    return whole, steps
