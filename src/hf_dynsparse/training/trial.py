"""A short trial: how long a step of a run takes on this machine, with all that a real step does."""

import copy
import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from .._transformers import SaveStrategy, has_length
from .arguments import DynSparseTrainingArguments
from .trainer import DynSparseTrainer


WARM_UP = 3  # steps that do not count: the first chooses the kernels, allocates, and compiles
LEAST = 3  # steps, and batches of evaluation, that count at least, however long they take
ENDLESS = 10**6  # steps that no trial comes to

# A trial leaves nothing behind, and updates no topology: updates are rare, and would be many in a run so short.
QUIET: dict[str, Any] = {
    **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no"),
    **dict.fromkeys(("push_to_hub", "load_best_model_at_end", "eval_on_start"), False),
    **{"max_steps": ENDLESS, "report_to": [], "disable_tqdm": True},
    **{"num_topology_updates": 0, "topology_update_every": None},
    "seq_length_schedule": None,  # a trial has no end: the longest sequences, which take longest
}


@dataclass(frozen=True)
class Trial:
    """
    What [`run_trial`] finds; the same on all ranks.

    Args:
        step_tokens (`float`): in one optimiser step, of all processes.
        step_seconds (`float`): median time of a step, loading of data included.
        epoch_steps (`float`): in one pass over the data.
        evaluation_seconds, saving_seconds (`float`): of one evaluation and one checkpoint; 0 if there are none.
    """

    step_tokens: float
    step_seconds: float
    epoch_steps: float
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, evaluation and saving left out."""
        return self.step_tokens / self.step_seconds


def run_trial(
    model: PreTrainedModel, args: DynSparseTrainingArguments, seconds: float, folder: str | Path, **parts: Any
) -> Trial:
    """
    Train a copy of `model` for a while, as `DynSparseTrainer(model, args, **parts)` would. Model, arguments and the
    state of random generators are left as they were, so a run that follows is the run without a trial, bit for bit.

    Args:
        seconds (`float`): for steps that count; warm-up, some batches of evaluation and one checkpoint come on top.
        folder (`str` or `Path`): on the disk of the run; what is written there is the caller's to remove.
        parts: data, collator and other arguments of [`DynSparseTrainer`].
    """
    parts |= {"data_collator": copy.deepcopy(parts.get("data_collator"))}  # it may count epochs
    quiet, clock = copy.copy(args), Clock(seconds)
    for name, value in (QUIET | {"output_dir": str(folder)}).items():
        setattr(quiet, name, value)
    with random_state_kept(args.device), unlogged():
        trainer = DynSparseTrainer(copy.deepcopy(model), quiet, callbacks=[clock], **parts)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        state = trainer.state
        found = Trial(
            trainer.throughput.tokens / state.global_step,
            clock.step_seconds,
            state.global_step / (state.epoch or 1.0),
            _evaluation_seconds(trainer) if parts.get("eval_dataset") is not None else 0.0,
            _saving_seconds(trainer) if args.save_strategy != SaveStrategy.NO else 0.0,
        )
    del trainer
    gc.collect()  # the run needs the memory
    return broadcast_object_list([found])[0]


def clock_time(seconds: float) -> str:
    """Day of the week and time, so many seconds from now; with the date if that is not in the coming week."""
    then = time.localtime(time.time() + seconds)
    return time.strftime("%a %H:%M" if seconds < 6 * 86400 else "%Y-%m-%d %H:%M", then)


class Clock(TrainerCallback):
    """Ends a run after its warm-up and as many steps as fit into `seconds`: on all ranks the same, by the first."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = ENDLESS
        self.ends: list[float] = []

    @property
    def step_seconds(self) -> float:
        """Median from the end of a step to that of the next."""
        return median(np.diff(self.ends[WARM_UP - 1 :]).tolist())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See the class."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM_UP + 1:
            steps = max(LEAST, int(self.seconds / (self.ends[-1] - self.ends[-2])))
            self.last = WARM_UP + broadcast_object_list([steps])[0]
        control.should_training_stop |= len(self.ends) >= self.last


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside changes nothing of what is drawn afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def unlogged() -> Iterator[None]:
    """Without log entries below a warning: those of the run that follows will say the same, or better."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _evaluation_seconds(trainer: DynSparseTrainer) -> float:
    """Of a whole evaluation, by its first batches; by all of a stream, whose length is not known."""
    loader = trainer.get_eval_dataloader()
    batches = len(loader) if has_length(loader) else None
    ends = [time.perf_counter()]
    model = trainer.model.eval()
    for batch in islice(loader, batches and 1 + LEAST):
        trainer.prediction_step(model, batch, prediction_loss_only=True)
        ends.append(time.perf_counter())
    return median(np.diff(ends[1:] if len(ends) > 2 else ends).tolist()) * (batches or len(ends) - 1)


def _saving_seconds(trainer: DynSparseTrainer) -> float:
    begin = time.perf_counter()
    trainer._save_checkpoint(trainer.model, trial=None)
    return time.perf_counter() - begin
