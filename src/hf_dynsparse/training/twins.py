"""What `hf-dynsparse estimate --trial` adds: trials of a model and of its dense twin on this machine."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from ..reports.durations import format_time
from ..reports.tables import plain_table
from .arguments import DynSparseTrainingArguments
from .threads import default_threads
from .trial import Trial, clock_time, run_trial


def try_twins(
    build: Callable[..., PreTrainedModel],
    seconds: float,
    *,
    batch_size: int = 32,
    seq_len: int = 128,
    bf16: bool = False,
) -> dict[str, Trial]:
    """
    Trials of the model that `build` gives and, by `build(sparsity=0.0)`, of its dense twin, on made-up text,
    in this process alone.

    Args:
        seconds (`float`): of each trial.
        batch_size, seq_len (`int`): sequences in a step, and tokens in each.
        bf16 (`bool`): mixed precision.

    Returns:
        `dict[str, Trial]`: under `"sparse"` and `"dense"`.
    """
    models = {"sparse": build(), "dense": build(sparsity=0.0)}
    ids = torch.randint(5, models["sparse"].config.vocab_size, (64 * batch_size, seq_len))
    labels = ids.masked_fill(torch.rand(ids.shape) >= 0.15, -100)
    rows = [{"input_ids": ids[row], "labels": labels[row]} for row in range(len(ids))]
    trials = {}
    with TemporaryDirectory() as folder:
        args = DynSparseTrainingArguments(folder, per_device_train_batch_size=batch_size, bf16=bf16)
        args.dataloader_pin_memory = args.device.type == "cuda"
        if args.device.type == "cpu":
            torch.set_num_threads(default_threads(1))
        for name, model in models.items():
            trials[name] = run_trial(model, args, seconds, Path(folder, name), train_dataset=rows)
    return trials


def describe_twins(trials: dict[str, Trial], max_steps: int | None) -> dict[str, dict[str, float]]:
    """What JSON can hold of [`try_twins`], with the time of a run of `max_steps` if that is known."""
    return {
        name: {
            "seconds_per_step": trial.step_seconds,
            "tokens_per_second": trial.tokens_per_second,
            "seconds_per_checkpoint": trial.saving_seconds,
            **({"seconds_of_the_run": max_steps * trial.step_seconds} if max_steps else {}),
        }
        for name, trial in trials.items()
    }


def format_twins(described: dict[str, dict[str, float]]) -> str:
    """[`describe_twins`] as a table like that of an estimate."""
    sparse, dense = described["sparse"], described["dense"]
    rows = [["trial on this machine", "sparse", "dense", "of dense"]]
    for name in sparse:
        cells = [f"{each[name]:,.0f}" if each[name] >= 1000 else f"{each[name]:.4g}" for each in (sparse, dense)]
        rows.append([name.replace("_", " "), *cells, f"{sparse[name] / dense[name]:.3f}"])
    if "seconds_of_the_run" in sparse:
        times = [each["seconds_of_the_run"] for each in (sparse, dense)]
        rows += [["  that is", *map(format_time, times), ""], ["  begun now, until", *map(clock_time, times), ""]]
    return plain_table(rows, least=(28, 16, 16))
