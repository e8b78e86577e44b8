"""The epoch, told to a collator whose draw depends on it."""

import math
from typing import Any, Protocol, runtime_checkable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@runtime_checkable
class EpochAware(Protocol):
    """
    A collator whose draw depends on the epoch. Workers that persist have a copy of it from the first epoch on: the
    epoch must lie in shared memory, as in `DataCollatorForWholeWordMasking`. A deep copy has an epoch of its own.
    """

    def set_epoch(self, epoch: int) -> None:
        """Use the draw of this epoch from now on, in worker processes too."""
        ...


class EpochCallback(TrainerCallback):
    """
    Counts the passes over the data in `state.epoch`, which transformers leaves at a share of the run if the data have
    no length: a whole number at the beginning of each pass. Tells a collator, so that masks change between passes and
    a resumed pass repeats its own.

    Args:
        collator (`EpochAware`, *optional*): one whose draw depends on the epoch.
    """

    def __init__(self, collator: EpochAware | None = None) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.collator is not None:
            self.collator.set_epoch(math.floor(state.epoch or 0.0))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Without a length it is the share of the run that grows by a step, and a pass ends anywhere.
        if not control.should_training_stop:
            state.epoch = float(math.ceil(state.epoch or 0.0))
