"""How the training scripts begin, and how they end when something is wrong."""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import datasets
import torch
from transformers import HfArgumentParser, PreTrainedModel, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import DynSparseTrainingArguments, naming_arguments
from .callback import TopologyCallback
from .checkpoint import check_same_model, find_run_to_resume
from .hub import fetch_checkpoint
from .hub.trainer import open_hub_repository
from .learning_rate import rewinding
from .resizing import check_final_sizes
from .threads import default_threads
from .topology import update_steps
from .trainer import DynSparseTrainer


logger = logging.getLogger(__name__)


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


def find_checkpoint(args: Any, token: str | None) -> str | None:
    """
    The checkpoint folder to go on from, `None` for a new run; with `args.push_to_hub` the repository is opened too, so
    that a run does not learn at its end that it may not push.

    Args:
        args: [`ScriptArguments`] that are training arguments.
        token (`str`, *optional*): of the Hub.

    Raises:
        ValueError, OSError: if the one or the other cannot be had.
    """
    checkpoint = find_run_to_resume(args.output_dir, fetch_checkpoint(args.resume_from_checkpoint, token))
    if args.push_to_hub and args.process_index == 0:
        open_hub_repository(args)
    return checkpoint


def check_updates_to_resume(args: DynSparseTrainingArguments, checkpoint: str) -> None:
    """
    Raises:
        ValueError: for topology settings that are not those of the run to resume, naming them.
    """
    saved = _topology_state(checkpoint)
    if saved:
        TopologyCallback(**args.topology_settings()).check_settings(saved)


def check_updates_fit(args: DynSparseTrainingArguments, steps: int) -> None:
    """
    Raises:
        ValueError: for topology updates that do not fit a run of so many steps.
    """
    names = ("num_updates", "update_every", "first_step", "last_step")
    settings = args.topology_settings()
    with naming_arguments():
        update_steps(steps, *(settings[name] for name in names))


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
    resized = _topology_state(checkpoint).get("attributes", {}).get("final") is not None
    check_same_model(model, checkpoint, resized)
    if resized:
        check_final_sizes(model, checkpoint, TopologyCallback.__name__)


def _topology_state(checkpoint: str) -> dict[str, Any]:
    callbacks: Any = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).stateful_callbacks
    return callbacks.get(TopologyCallback.__name__, {})


def settle_process(args: Any, logger_name: str) -> None:
    """Logging of the script and the package, CPU threads, and the seed."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in (logger_name, "hf_dynsparse"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    datasets.utils.logging.set_verbosity_warning()
    if args.device.type == "cpu":
        torch.set_num_threads(args.num_threads or default_threads(args.world_size))
    set_seed(args.seed)


def stop(error: Exception) -> NoReturn:
    """End with one line that says what is wrong."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {str(error).strip().splitlines()[-1].strip()}")
