"""How the training scripts begin, and how they end when something is wrong."""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from transformers import HfArgumentParser, PreTrainedModel, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import DynSparseTrainingArguments
from .callback import TopologyCallback
from .checkpoint import check_same_model, find_run_to_resume
from .hub import fetch_checkpoint
from .hub.trainer import open_hub_repository
from .resizing import check_final_sizes
from .threads import default_threads


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
