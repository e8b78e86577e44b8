"""How the training scripts begin, how they end when something is wrong, and what they write at the end."""

import functools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .._transformers import has_length
from ..blocks.sizes import parse_block_size
from ..calibration import Calibration
from ..checkpoints.run_lock import run_lock
from ..checkpoints.saved_run import SavedRun, find_run_to_resume
from ..data.calibration import batches_of_rows
from ..files import write_atomically
from ..hub import fetch_checkpoint
from ..hub.trainer import open_hub_repository
from ..reports.estimate import plateau_warning
from ..reports.pictures.layers import plot_block_map
from ..reports.pictures.runs import plot_training
from ..topology.frames import read_history
from .arguments import DynSparseTrainingArguments
from .callbacks.log_file import LogFile
from .callbacks.refusals import check_together
from .callbacks.topology import TopologyCallback
from .collapse import warn_of_collapse
from .console import leave_to_first, prepare_console
from .finetuning import finish_quantization_, set_final_sparsity_
from .flags import FinetunedModelArguments, FinetuningRunArguments, FlagParser, PrunedModelArguments
from .memory import can_keep
from .plans import check_plan, split_plan
from .plugins import load_plugins
from .recipes import recipe_defaults
from .rewinding import check_rewinding, rewinding
from .summary import smaller, summarize_finetuning
from .threads import default_threads
from .trainer import DynSparseTrainer


logger = logging.getLogger(__name__)

_HELD = ExitStack()  # the lock of the output folder, from `find_checkpoint` to the end of the script
_MADE = ExitStack()  # removes what is made in the output folder, until the first step is near

# Sequences of all evaluations while training for one to train on; sequences of an evaluation.
EVALUATED, EVALUATED_LEAST = 0.06, 64

TOKENIZER_FOLDER = "tokenizer"  # of the output folder: where a script keeps the one that it trains


def parse_arguments(*kinds: Any, description: str | None = None, recipes: bool = False) -> tuple[Any, ...]:
    """
    Dataclasses of `kinds` from the command line, and from the plan file that may be its first argument, for what the
    others do not say. Plug-ins are imported before: what they register is a valid choice.

    Args:
        recipes (`bool`): whether `--recipe` decides what is not given, see [`~training.recipes.recipe_defaults`].

    Raises:
        ValueError: see `load_plugins` and `split_plan`; for a recipe that there is not.
    """
    load_plugins(sys.argv[1:])
    parser = FlagParser(kinds, description=description)
    plan, flags = split_plan(sys.argv[1:])
    check_plan(plan, {each.name for kind in kinds for each in fields(kind)})
    if recipes:
        given = plan | parser.given(flags)
        defaults = recipe_defaults(given, int(given.get("max_seq_length", parser.get_default("max_seq_length"))))
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    parser.set_defaults(**plan)
    return parser.parse_args_into_dataclasses(flags)


def holds_output_dir(main: Callable[[], None]) -> Callable[[], None]:
    """The main function of a script, at whose end, however it comes, the output folder is free for another run."""

    @functools.wraps(main)
    def run() -> None:
        with _HELD:
            main()

    return run


def check_finetuning(model_args: FinetunedModelArguments, args: FinetuningRunArguments) -> None:
    """
    Refuse flags that cannot work; a model that is pruned gradually is led to the sparsity that `model_args` ask for.

    Raises:
        ValueError: naming the flag.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` must name a checkpoint, a folder or on the Hub. Got none.")
    gradual = args.finetune_mode == "gradual"
    if gradual:
        set_final_sparsity_(args, model_args.sparsity)
    excluded = {"--finetune_mode gradual": gradual, "--do_train false": not args.do_train}
    model_args.check_calibration(model_args.sparsity, excluded)
    if model_args.block_size is not None:
        parse_block_size(model_args.block_size)


def learn_from_itself(model_args: FinetunedModelArguments, args: FinetuningRunArguments, has_learned: bool) -> None:
    """
    Let a checkpoint that is made sparse learn from its dense self, answers and hidden states, if it has learned the
    task and no other `--teacher` is named: labels alone bring back little. Of `--teacher none` nothing is left.

    Args:
        has_learned (`bool`): whether the checkpoint has a head for this very task.
    """
    if args.teacher == "none":
        args.teacher = None
    elif args.teacher is None and args.do_train and model_args.sparsity is not None and has_learned:
        args.teacher = model_args.model_name_or_path
        args.distillation_layers = args.distillation_layers or "all"
        logger.info(
            "%s has learned this task: the sparse model learns its answers and hidden states. --teacher none: labels "
            "alone",
            model_args.model_name_or_path,
        )


def find_checkpoint(args: Any, token: str | None) -> str | None:
    """
    The checkpoint folder to go on from, `None` for a new run. From here on no other run may write to the output
    folder, see [`holds_output_dir`]. With `args.push_to_hub` the repository is opened too, so that a run does not
    learn at its end that it may not push.

    Args:
        args: [`ScriptArguments`] that are training arguments.
        token (`str`, *optional*): of the Hub.

    Raises:
        ValueError, OSError: if one of them cannot be had.
    """
    check_together(args.world_size)  # or the second process would find the folder taken, and say so instead
    if args.should_save:
        _HELD.enter_context(run_lock(args.output_dir))
    tokenizer = Path(args.output_dir, TOKENIZER_FOLDER)
    if args.process_index == 0 and not tokenizer.exists():
        _MADE.callback(shutil.rmtree, tokenizer, ignore_errors=True)
    checkpoint = find_run_to_resume(args.output_dir, fetch_checkpoint(args.resume_from_checkpoint, token))
    if args.push_to_hub and args.process_index == 0:
        open_hub_repository(args)
    return checkpoint


def calibration_of(
    model_args: PrunedModelArguments, args: Any, rows: Any, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None
) -> Calibration | None:
    """
    What `--calibration_samples` of the training examples `rows` prune a dense model by; `None` if that is not asked
    for, or was done when the run to resume began.
    """
    if not model_args.calibration_samples or checkpoint is not None:
        return None
    batches = batches_of_rows(rows, tokenizer, model_args.calibration_samples)
    return Calibration(batches, progress=args.should_log and not args.disable_tqdm)


def check_updates_to_resume(args: DynSparseTrainingArguments, checkpoint: str) -> None:
    """
    Raises:
        ValueError: for topology settings that are not those of the run to resume, naming them; or another number of
            steps, if its updates depend on it.
    """
    callback = TopologyCallback(args.topology_settings(), group_lasso=args.group_lasso)
    callback.check_run(SavedRun(checkpoint).state, args.max_steps)


def check_updates_fit(args: DynSparseTrainingArguments, steps: int) -> None:
    """
    Raises:
        ValueError: for topology updates that do not fit a run of so many steps.
    """
    args.topology_settings().plan(steps)


def check_topology(args: DynSparseTrainingArguments) -> None:
    """
    Raises:
        ValueError: for topology updates that do not fit the steps of the run, or rewinds of the learning rate without
            a density that falls.
    """
    settings = args.topology_settings()
    if args.max_steps > 0 and (settings.say_when):
        check_updates_fit(args, args.max_steps)
    if args.learning_rate_rewinding:
        check_rewinding(settings)


def check_run_length(trainer: DynSparseTrainer) -> None:
    """
    Refuse topology updates and rewinds of the learning rate that do not fit the run: of epochs the number of steps is
    known only with the data.

    Raises:
        ValueError: naming what does not fit.
    """
    args, settings = trainer.args, trainer.args.topology_settings()
    fixed, none = settings.say_when, settings.num_topology_updates == 0
    if trainer.train_dataset is None or none or not (fixed or args.learning_rate_rewinding):
        return
    steps = _steps(trainer)
    if fixed:
        check_updates_fit(args, steps)
    if args.learning_rate_rewinding:
        rewinding(settings, steps, args.get_warmup_steps(steps))


def rows_while_training(trainer: DynSparseTrainer) -> Any:
    """
    So many of the first rows of `trainer.eval_dataset` that all evaluations of the run together take 6 % of the
    sequences that it trains on, but 64 at the least. A forward pass is a third of a step: that is 2 % of its time.
    """
    args: Any = trainer.args
    rows: Any = trainer.eval_dataset
    epochs, *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if args.eval_strategy == IntervalStrategy.EPOCH:
        evaluations = min(epochs, steps)
    else:
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * steps)
        evaluations = max(1, steps // every)
    trained_on = steps * trainer.get_total_train_batch_size(args)
    count = max(EVALUATED_LEAST, int(EVALUATED * trained_on / evaluations))
    return rows.select(range(min(count, len(rows)))) if isinstance(rows, datasets.Dataset) else rows.take(count)


def tell_length(trainer: DynSparseTrainer) -> None:
    """Say how many steps the run has, and how often it sees the text: who gives neither may expect epochs."""
    rows: Any = trainer.train_dataset
    steps = _steps(trainer)
    seen = steps * trainer.get_total_train_batch_size(trainer.args)
    passes = f": {seen / len(rows):.3g} passes over {len(rows):,} sequences" if has_length(rows) else ""
    logger.info("%s steps%s", f"{steps:,}", passes)


def warn_of_plateau(trainer: DynSparseTrainer, seq_len: int) -> None:
    """Say so if the run, of sequences of `seq_len` tokens, is too short to learn more than how frequent words are."""
    args = trainer.args
    warning = plateau_warning(_steps(trainer) * trainer.get_total_train_batch_size(args) * seq_len)
    if warning is not None and args.process_index == 0:
        logger.warning("%s", warning)


def _steps(trainer: DynSparseTrainer) -> int:
    """Of the run, by its arguments and the data."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return steps


def check_model_to_resume(model: PreTrainedModel, checkpoint: str) -> None:
    """
    Raises:
        ValueError: for a model that is not the one with which the run to resume was begun.
    """
    SavedRun(checkpoint).check_model(model)


def prepare_process(args: Any, logger_name: str) -> None:
    """The console, CPU threads, memory, and the seed."""
    prepare_console(args, logger_name)
    if args.device.type == "cpu":
        if args.keep_freed_memory is None:
            args.keep_freed_memory = can_keep()  # the process is the script's own
        torch.set_num_threads(args.num_threads or default_threads(args.world_size))
    set_seed(args.seed)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """
    An error ends the script with one line that says what is wrong, of several processes the first one's, and with the
    output folder as it was before [`find_checkpoint`].

    Args:
        kinds: errors of the user's making; by default those of values, files and configurations.
    """
    expected = kinds or (ValueError, OSError, StrictDataclassError)
    _MADE.pop_all()
    try:
        yield
    except expected as error:
        _MADE.close()
        script, rank = Path(sys.argv[0]).name, leave_to_first()
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        # Of a file or a model that is not there, what was asked for comes first, and what to do last.
        sys.exit(f"{script}: error: {rank}{' '.join(lines if isinstance(error, OSError) else lines[-1:])}")
    _MADE.pop_all()


def finetune(trainer: DynSparseTrainer, checkpoint: str | None) -> dict[str, Any]:
    """
    Train, and save model, metrics and state; with `quantization_aware` the int8 model.

    Returns:
        `dict[str, Any]`: facts of an int8 model for the summary.
    """
    args: Any = trainer.args
    trainer.add_callback(LogFile())
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", outcome.metrics)
    trainer.save_state()
    return finish_quantization_(trainer) if args.quantization_aware else {}


def write_finetuning(trainer: DynSparseTrainer, results: dict[str, float], facts: dict[str, Any]) -> None:
    """[`write_results`] of a fine-tuning run: `results` of its last evaluation, and other facts."""
    summary = facts | summarize_finetuning(trainer, results)
    if summary["collapsed"]:
        warn_of_collapse(trainer.args, trainer.state.max_steps, is_sparse=summary["sparsity"] > 0)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items())
    sizes = f"; {smaller(summary)}" if "dense_checkpoint_bytes" in summary else ""
    kind = f"{summary['sparsity']:.1%} sparse" if summary["sparsity"] else "dense"
    write_results(trainer, summary, f" {scores}; {kind}{sizes}")


def write_results(trainer: DynSparseTrainer, summary: dict[str, Any], text: str) -> None:
    """
    Write `summary.json` and the pictures of a run into its folder, and print what it reached. There is a picture of
    the blocks if the history of a layer was kept from the start.

    Args:
        summary (`dict[str, Any]`): facts of the run, see [`summarize_run`] and [`summarize_finetuning`].
        text (`str`): what a person is told.
    """
    folder = Path(str(trainer.args.output_dir))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    try:
        plot_training(trainer.state.log_history, folder / "training.png", title=folder.name)
        frames = read_history(folder)
        if frames and frames[0].step == 0:
            maps = [frame.block_map for frame in frames]
            ever_active = np.logical_or.reduce(maps)
            plot_block_map(maps[0], ever_active, maps[-1], folder / "block_map.png", title=frames[0].layer)
    except (ImportError, ValueError) as error:
        logger.warning("No pictures: %s", error)
    sys.stdout.write(f"\nResults in {folder}:{text}\n")
