"""A callback that keeps the log of a run in a file from its first entry on, so that the run can be watched."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...files import write_atomically
from ...reports.facts import LOG_FILE


logger = logging.getLogger(__name__)


class LogFile(TrainerCallback):
    """
    Appends each entry of the log, whole, to `log.jsonl` in the output folder: a line an entry, as in the `log_history`
    of `trainer_state.json`, which is written with a checkpoint only. A resumed run first gives the file the entries of
    its checkpoint. A disk that is full costs lines, not the run.

    The last callback of a trainer: it writes what those before it add to an entry.
    """

    def __init__(self) -> None:
        self._path: Path | None = None  # of the first process, while lines can be written

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._path = Path(str(args.output_dir), LOG_FILE)
            self._write(state.log_history, anew=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(state.log_history[-1:], anew=False)

    def _write(self, entries: list[dict[str, Any]], anew: bool) -> None:
        if self._path is None:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            if anew:
                write_atomically(self._path, lines)
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(lines)
        except OSError as error:
            logger.warning("%s ends here, and the run goes on: %s", self._path, error)
            self._path = None
