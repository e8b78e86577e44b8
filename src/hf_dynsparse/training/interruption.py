"""
A long run that is told to stop (Ctrl-C, SIGTERM) ends its step, saves, and says how to go on.

The just-in-time checkpoint of transformers (`enable_jit_checkpoint`) does not serve: it saves in the middle of a step,
when dropout has been drawn and dense gradients have been observed, so a resumed run is another run.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._transformers import SaveStrategy


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_EVERY = 10  # steps after which ranks ask each other: that waits for the device


class StopCallback(TrainerCallback):
    """Ends a run at the step in which a signal comes, on all ranks together, with a checkpoint."""

    def __init__(self) -> None:
        self.received: int | None = None  # the first signal
        self.is_stopping = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handler of a signal. A second Ctrl-C ends the process at once."""
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See the class."""
        if args.world_size > 1 and state.global_step % ASK_EVERY == 0:
            self.received = next(filter(None, gather_object([self.received])), None)
        elif args.world_size > 1:
            return
        if self.received is not None and state.global_step < state.max_steps:
            self.is_stopping = control.should_save = control.should_training_stop = True


@contextmanager
def saves_when_stopped(trainer: Trainer) -> Iterator[None]:
    """
    While `trainer` trains inside: SIGTERM and Ctrl-C end the run after the step, with a checkpoint from which it goes
    on bit for bit. A run that saves no checkpoints is left to the signals.

    Raises:
        SystemExit: with status 128 and the number of the signal, if one came.
    """
    if trainer.args.save_strategy == SaveStrategy.NO:
        yield
        return
    trainer.add_callback(stop := StopCallback())
    # What is ignored already (nohup, jobs in the background) stays so.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop.note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(stop)
    if stop.received is None:
        return
    if not stop.is_stopping:  # it came with the last step, which is saved anyway
        signal.raise_signal(stop.received)
    if trainer.is_world_process_zero():
        logger.warning(
            "Stopped by %s after step %d of %d, which is saved. The same command with --resume_from_checkpoint last "
            "goes on.",
            *(signal.Signals(stop.received).name, trainer.state.global_step, trainer.state.max_steps),
        )
    raise SystemExit(128 + stop.received)
