"""How the training scripts begin, and how they end when something is wrong."""

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import datasets
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from ..checkpoints.run_lock import run_lock
from ..checkpoints.saved_run import SavedRun, find_run_to_resume
from ..hub import fetch_checkpoint
from ..hub.trainer import open_hub_repository
from .arguments import DynSparseTrainingArguments, naming_arguments
from .callbacks.topology import TopologyCallback
from .rewinding import rewinding
from .threads import default_threads
from .trainer import DynSparseTrainer


logger = logging.getLogger(__name__)

_HELD = ExitStack()  # the lock of the output folder, from `find_checkpoint` to the end of the script

TOKENIZER_FOLDER = "tokenizer"  # of the output folder: where a script keeps the one that it trains


@dataclass
class ScriptArguments:
    """What a script adds to training arguments, which its class inherits too: name this one first."""

    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of each process. Default: OMP_NUM_THREADS, or the cores shared among the processes."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder; `last`: the newest of --output_dir, if there is one; or what --hub_strategy "
            "checkpoint pushed, as user/name or user/name@revision."
        },
    )

    # Optimiser steps where neither these nor epochs are given; without it the epochs have a default.
    default_steps: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        args: Any = self
        if args.max_steps is None:
            args.max_steps = -1 if args.num_train_epochs is not None else self.default_steps
        elif args.max_steps > 0 and args.num_train_epochs is not None:
            logger.warning(
                "`max_steps` goes before `num_train_epochs`. Got %d and %g: the run has %d steps. Leave one out.",
                *(args.max_steps, args.num_train_epochs, args.max_steps),
            )
        if args.num_train_epochs is None and self.default_steps is not None:
            args.num_train_epochs = 3.0  # as in transformers
        following: Any = super()
        following.__post_init__()


def parse_arguments(*kinds: Any, description: str | None = None) -> tuple[Any, ...]:
    """Dataclasses of `kinds` from the command line, or from one JSON file given as the only argument."""
    parser = HfArgumentParser(kinds, description=description)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def holds_output_dir(main: Callable[[], None]) -> Callable[[], None]:
    """The main function of a script, at whose end, however it comes, the output folder is free for another run."""

    @functools.wraps(main)
    def run() -> None:
        with _HELD:
            main()

    return run


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
    if args.should_save:
        _HELD.enter_context(run_lock(args.output_dir))
    checkpoint = find_run_to_resume(args.output_dir, fetch_checkpoint(args.resume_from_checkpoint, token))
    if args.push_to_hub and args.process_index == 0:
        open_hub_repository(args)
    return checkpoint


def check_updates_to_resume(args: DynSparseTrainingArguments, checkpoint: str) -> None:
    """
    Raises:
        ValueError: for topology settings that are not those of the run to resume, naming them; or another number of
            steps, if its updates depend on it.
    """
    TopologyCallback(**args.topology_settings()).check_run(SavedRun(checkpoint).state, args.max_steps)


def check_updates_fit(args: DynSparseTrainingArguments, steps: int) -> None:
    """
    Raises:
        ValueError: for topology updates that do not fit a run of so many steps.
    """
    with naming_arguments():
        TopologyCallback(**args.topology_settings()).settings.plan(steps)


def check_run_length(trainer: DynSparseTrainer) -> None:
    """
    Refuse topology updates and rewinds of the learning rate that do not fit the run: of epochs the number of steps is
    known only with the data.

    Raises:
        ValueError: naming what does not fit.
    """
    args, settings = trainer.args, trainer.args.topology_settings()
    fixed = settings["num_updates"] is not None or settings["update_every"] is not None
    if trainer.train_dataset is None or settings["num_updates"] == 0 or not (fixed or args.learning_rate_rewinding):
        return
    steps = args.max_steps
    if steps <= 0:
        *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if fixed:
        check_updates_fit(args, steps)
    if args.learning_rate_rewinding:
        rewinding(settings, steps, args.get_warmup_steps(steps))


def check_model_to_resume(model: PreTrainedModel, checkpoint: str) -> None:
    """
    Raises:
        ValueError: for a model that is not the one with which the run to resume was begun.
    """
    SavedRun(checkpoint).check_model(model)


def settle_process(args: Any, logger_name: str) -> None:
    """Logging of the script and the package, CPU threads, and the seed."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in (logger_name, "hf_dynsparse"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    datasets.utils.logging.set_verbosity_warning()
    if args.device.type == "cpu":
        torch.set_num_threads(args.num_threads or default_threads(args.world_size))
    set_seed(args.seed)


@contextmanager
def preparing(args: Any) -> Iterator[None]:
    """
    What comes before the first step: reading, checking and building. An error ends the run with one line, and the
    output folder is as it was.
    """
    folder = Path(args.output_dir)
    tokenizer = folder / TOKENIZER_FOLDER
    had_folder, had_tokenizer = folder.exists(), tokenizer.exists()
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        if args.process_index == 0 and not had_tokenizer:
            shutil.rmtree(tokenizer, ignore_errors=True)
        if args.process_index == 0 and not had_folder:
            with suppress(OSError):  # not there, or another run has written something
                folder.rmdir()
        stop(error)


def stop(error: Exception) -> NoReturn:
    """End with one line that says what is wrong."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {str(error).strip().splitlines()[-1].strip()}")
