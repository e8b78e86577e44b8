"""Callbacks that know nothing of topologies: the throughput of a run, and the epoch for a masking collator."""

import math
import time
from typing import Any, Protocol, cast, runtime_checkable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


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
        saved = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        if saved is not None:
            self.tokens, self.seconds = saved["attributes"]["tokens"], saved["attributes"]["seconds"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens, self.seconds = 0, 0.0
        if state.global_step > 0:
            self.restore(state)
        cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, self.state())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._began


@runtime_checkable
class EpochAware(Protocol):
    """A collator whose draw depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Use the draw of this epoch from now on."""
        ...


class EpochCallback(TrainerCallback):
    """Tells a collator the epoch, so that masks change between epochs and a resumed epoch repeats its own."""

    def __init__(self, collator: EpochAware) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a whole epoch the state may hold 0.9999….
        self.collator.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))
