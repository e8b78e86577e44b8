"""What a run shows on the console: one line an entry of the log, beside the progress bar."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ...reports.durations import format_time


# Entries of training whose distance follows from a share of the run are shown so far apart: a share of its steps, or
# seconds if they come sooner.
APART, APART_SECONDS = 0.05, 10.0

# What a line of training tells, in this order, of an entry that has it.
TOLD = {
    "loss": "loss {:.4g}",
    "dynsparse/distillation_loss": "distillation {:.4g}",
    "learning_rate": "rate {:.3g}",
    "dynsparse/tokens_per_second": "{:,.0f} tokens/s",
    "left": "{} left",
    "dynsparse/sparsity": "sparsity {:.1%}",
    "dynsparse/coverage": "coverage {:.1%}",
    "dynsparse/newborn_share": "newborn {:.0%}",
}
# Left out, as is all else under `dynsparse/`: of use in a picture, or said elsewhere in the line.
UNTOLD = ("epoch", "grad_norm", "total_flos", "num_input_tokens_seen")
# Of an evaluation: its speeds, and what the line says in words.
QUIET = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "collapsed")


class ConsoleCallback(ProgressCallback, PrinterCallback):
    """
    Shows a run: a progress bar, unless `disable_tqdm` is on, and one line an entry of the log, with the loss, rate,
    tokens a second, time left, sparsity, coverage and share of newborn blocks. Whatever else an entry says is for
    trackers, `log.jsonl` and `trainer_state.json`.

    Where `logging_steps` is a share of the run, lines of training are at least a twentieth of the run or ten seconds
    apart; a number of steps is taken at its word.

    [`DynSparseTrainer`] has it in the place of the callback of transformers that prints dictionaries, by whose class
    `remove_callback` finds it.
    """

    training_bar: Any  # `tqdm`, or `None` outside of training
    _evaluated = ""  # the last line of an evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first, self._began = state.global_step, time.perf_counter()
        self._told, self._when = state.global_step, self._began
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *given: Any, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, *given, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:  # else training has ended before
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs:
            line = describe(logs, state)
            if line != self._evaluated:  # a script evaluates at the last step, and once more at the end
                say(line)
            self._evaluated = line
        elif self._is_due(args, state):
            self._told, self._when = state.global_step, time.perf_counter()
            left = self._seconds_left(state)
            say(describe(logs | ({"left": format_time(left)} if left else {}), state))

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        if args.logging_steps >= 1 or time.perf_counter() - self._when >= APART_SECONDS:
            return True
        return state.global_step - self._told >= APART * state.max_steps or state.global_step == state.max_steps

    def _seconds_left(self, state: TrainerState) -> float:
        """By the steps since training began or went on, with evaluations and saves."""
        seconds_per_step = (time.perf_counter() - self._began) / max(1, state.global_step - self._first)
        return seconds_per_step * (state.max_steps - state.global_step)


def show_lines_(callbacks: list[TrainerCallback]) -> None:
    """Put a [`ConsoleCallback`] in the place of the last callback that prints dictionaries, if there is one."""
    for place in reversed(range(len(callbacks))):
        if type(callbacks[place]) in (ProgressCallback, PrinterCallback):
            callbacks[place] = ConsoleCallback()
            return


def say(text: str) -> None:
    """One line of standard output, above the progress bars, if there are any."""
    tqdm.write(text)
    sys.stdout.flush()  # a file or a pipe would get it much later


def announce(logger: logging.Logger, text: str, args: TrainingArguments) -> None:
    """Log `text` at level INFO; where nobody has asked for that level, [`say`] it, unless `args` want silence."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    elif args.should_log and args.get_process_log_level() <= logging.WARNING and not _is_silenced():
        say(text)


def _is_silenced() -> bool:
    """Whether `logging.disable` keeps what is below a warning from everybody, as in a trial."""
    return logging.root.manager.disable >= logging.INFO


def describe(logs: Mapping[str, Any], state: TrainerState) -> str:
    """The line of an entry: of training, of an evaluation, of the end of training, or of whatever a user logs."""
    begin = f"step {state.global_step:,}/{state.max_steps:,}" if state.max_steps else ""
    if "train_runtime" in logs:
        mean = f", mean loss {logs['train_loss']:.4g}" if "train_loss" in logs else ""
        return f"{begin}  trained in {format_time(logs['train_runtime'])}{mean}"
    told = [text.format(logs[name]) for name, text in TOLD.items() if name in logs]
    runtime = next((name for name in logs if name.endswith("_runtime")), None)
    if runtime is None:
        rest = [f"{name} {_number(logs[name])}" for name in logs if name not in TOLD and not _is_untold(name)]
        return "  ".join([begin, *told, *rest]).strip()
    prefix = runtime.removesuffix("runtime")
    scores = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    shown = [f"{name.replace('_', ' ')} {_number(value)}" for name, value in scores.items() if name not in QUIET]
    shown += ["one answer to everything"] if "collapsed" in scores else []
    kind = "evaluation" if prefix == "eval_" else prefix.rstrip("_")
    return f"{begin}  {kind}: {', '.join(shown)}".strip()


def _is_untold(name: str) -> bool:
    return name in UNTOLD or name.startswith(("dynsparse/", "train_"))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
