"""The console of a training script: log lines beside progress bars, and no warning that frightens without cause."""

import logging
import re
import sys
import time
import warnings
from typing import Any

import datasets
import transformers
from accelerate.utils import get_cpu_distributed_information
from tqdm.contrib import DummyTqdmFile

from .bars import hide_bars


# Seconds that a launcher needs to see the first process end, which takes its time, and to end the others.
AFTER_FIRST = 15.0


def prepare_console(args: Any, logger_name: str) -> None:
    """
    Logging of a script and of this package, from level INFO on the first process, or from `args.log_level`; and of
    what other packages say all that means something. Where nobody watches, there are no progress bars.

    Args:
        args (`TrainingArguments`): of the run; changed where a default of transformers only makes for a warning.
    """
    is_watched = sys.stderr.isatty()
    stream: Any = DummyTqdmFile(sys.stderr) if is_watched else sys.stderr  # lines go above the bars
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=stream)
    first = logging.INFO if args.log_level == "passive" else args.get_process_log_level()
    for name in (logger_name, "hf_dynsparse"):
        logging.getLogger(name).setLevel(first if args.should_log else logging.WARNING)
    datasets.utils.logging.set_verbosity_warning()
    if not args.should_log:
        transformers.logging.set_verbosity_error()  # its warnings are those of the first process
    hide_bars()
    if is_watched:
        for handler in logging.getLogger("transformers").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(stream)
    else:
        args.disable_tqdm = True
        datasets.disable_progress_bars()
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # on by default, whereupon torch warns that there is nothing to pin for
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: all would be said twice
    # accelerate knows the old name of an argument of DDP only.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    logging.getLogger("transformers.trainer_utils").addFilter(without_shares)
    logging.getLogger("transformers.modeling_utils").addFilter(with_short_report)


def without_shares(record: logging.LogRecord) -> bool:
    """On resume transformers compares a share of the run, such as 0.02, with the steps that it has made: 2."""
    text = record.getMessage()
    if not text.startswith("Warning: The following arguments do not match"):
        return True
    record.msg, record.args = re.sub(r"\n\t\w+_steps: 0?\.\d+ \(from args\) != \d+ .*", "", text), ()
    return "\n" in record.msg


def with_short_report(record: logging.LogRecord) -> bool:
    """
    A checkpoint that gets the head of another task is as it should be: one line instead of the table of its weights.
    The table stays where a weight of a layer or an embedding is missing, or one has another size.
    """
    text = record.getMessage()
    rows = re.findall(r"^(.+?) *\|\W*(?:\[\d+m)?([A-Z]{4,})", text, re.MULTILINE)
    fresh = sorted({name.rpartition(".")[0] for name, status in rows if status == "MISSING"})
    unused = sorted({name.split(".")[0] for name, status in rows if status == "UNEXPECTED"})
    fits = {status for _, status in rows} <= {"MISSING", "UNEXPECTED"}
    if "LOAD REPORT" in text and fits and not any(re.search(r"\d|embed", name) for name in fresh):
        parts = {"fresh weights": fresh, "left out of the checkpoint": unused}
        record.msg = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
        record.args = ()
    return True


def leave_to_first() -> str:
    """
    Called by a process that is about to end with an error: what to put before it. The first one speaks at once. If it
    fails too, the launcher ends the others meanwhile, and the error is seen once.
    """
    rank = get_cpu_distributed_information().rank
    if rank == 0:
        return ""
    time.sleep(AFTER_FIRST)
    return f"rank {rank}: "
