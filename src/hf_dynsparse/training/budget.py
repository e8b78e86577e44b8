"""Runs whose length is given in time: `--time_budget 8h` becomes a number of steps, once."""

import logging
import math
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..checkpoints.saved_run import SavedRun
from ..reports.durations import format_time
from .trial import clock_time, run_trial


logger = logging.getLogger(__name__)

# The trial takes this share of the budget, and no longer than that.
TRIAL_SHARE, TRIAL_SECONDS = 0.02, 20.0
# Kept back for what the trial does not see: logs, topology updates, evaluations on a share of the run.
RESERVE = 0.05
TRIAL_FOLDER = "trial"  # of the output folder, removed after the trial

UNITS = {"": 60, "s": 1, "m": 60, "h": 3600}


def parse_time(text: str) -> float:
    """
    Seconds of `8h`, `90m`, `300s`, or of plain minutes.

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    given = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(given[1]) * UNITS[given[2]] if given else 0.0
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"A time must be given as 8h, 90m, 300s, or in minutes. Got {text!r}.")
    return seconds


def check_budget(args: Any) -> None:
    """
    Refuse a `time_budget` that cannot be kept.

    Args:
        args: training arguments with a `time_budget`, whose `max_steps` and `num_train_epochs` are `None` where they
            were not given.

    Raises:
        ValueError: if the time cannot be read, the length of the run is given otherwise too, or a step does not take
            the same time throughout.
    """
    parse_time(args.time_budget)
    for name in ("max_steps", "num_train_epochs"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`--time_budget` makes the number of steps itself. Got {args.time_budget} and --{name} "
                f"{getattr(args, name):g}. Leave one of them out."
            )
    if args.topology_settings().density_schedule != "constant":
        raise ValueError(
            f"`--time_budget` needs steps that take equally long. Got {args.time_budget} and a density that changes. "
            "Give --max_steps."
        )


def steps_within(seconds: float, step: float, costs: Iterable[tuple[float, float]] = ()) -> int:
    """
    How many steps fit into a time.

    Args:
        seconds (`float`): of the run.
        step (`float`): seconds of a step.
        costs (iterable of `(float, float)`): seconds of what comes every so many steps, and how many: below 1 a share
            of the run, as `eval_steps` of transformers; infinite for never.

    Raises:
        ValueError: if not one fits.
    """
    for cost, every in costs:
        if every < 1.0:
            seconds -= cost * math.floor(1.0 / every)
        else:
            step += cost / every
    if seconds < step:
        raise ValueError(
            f"`--time_budget` must hold a trial, a step of {step:.3g} s, and the evaluations. Got too little. Give "
            "more time, a smaller batch, or fewer evaluations (--eval_steps)."
        )
    return int(seconds / step)


def plan_steps(model: PreTrainedModel, args: Any, **parts: Any) -> int:
    """
    The number of steps with which training and evaluations end within `args.time_budget`, by a short trial; the time
    counts from the start of that. All ranks get the same.

    Args:
        model (`PreTrainedModel`), args, parts: those of the run, see [`run_trial`]. They are left as they are.

    Raises:
        ValueError: if the time is too short for a step.
    """
    budget, folder, began = parse_time(args.time_budget), Path(args.output_dir, TRIAL_FOLDER), time.perf_counter()
    seconds = min(TRIAL_SHARE * budget, TRIAL_SECONDS)
    logger.info("a trial of %.3g s tells how many steps fit into %s", seconds, format_time(budget))
    try:
        trial = run_trial(model, args, seconds, folder, **parts)
    finally:
        if args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
    periods = {"no": math.inf, "epoch": trial.epoch_steps}
    costs = [
        (trial.evaluation_seconds, periods.get(args.eval_strategy.value, args.eval_steps)),
        (trial.saving_seconds, periods.get(args.save_strategy.value, args.save_steps)),
    ]
    left = broadcast_object_list([budget - (time.perf_counter() - began)])[0]
    # A script evaluates once more, at the end.
    steps = steps_within(left - RESERVE * budget - trial.evaluation_seconds, trial.step_seconds, costs)
    logger.info(
        "%s: %s steps, %.3g M tokens, until %s (%.4g s a step, %s tokens per second, %.3g s an evaluation)",
        *(format_time(budget), f"{steps:,}", steps * trial.step_tokens / 1e6, clock_time(left)),
        *(trial.step_seconds, f"{trial.tokens_per_second:,.0f}", trial.evaluation_seconds),
    )
    return steps


def planned_steps(checkpoint: str) -> int:
    """The number of steps with which the run of a `checkpoint` was begun: it goes on with those, whatever the time."""
    return SavedRun(checkpoint).state.max_steps
