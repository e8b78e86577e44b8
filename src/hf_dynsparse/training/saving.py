"""
Saving a run: a checkpoint exists whole or not at all, and a save that fails costs that checkpoint and nothing else.

A checkpoint is written into a staging folder, checked for its parts, flushed to the disk, and then takes its place by
being renamed. All ranks go through the parts of a save together.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from .._transformers import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, ExportableState, SaveStrategy
from ..checkpoints.run_lock import run_lock
from ..checkpoints.saved_run import (
    CHECKSUM_FILE,
    NEEDED_STATE,
    STAGING_FOLDER,
    STATE_FILES,
    file_checksum,
    lacking_file,
    last_checkpoint,
    put_back_replaced,
)
from ..files import flush, flush_tree, write_atomically
from ..hub.trainer import HubTrainer


logger = logging.getLogger(__name__)

WEIGHTS = "*model*.safetensors"  # one file, or shards, or those of an adapter

# What Python says of a mistake in a program, which would end every save alike. All else counts as a failed write:
# torch, safetensors and tokenizers speak of a disk in exceptions of their own, in words that change.
MISTAKES = (
    *(TypeError, AttributeError, NameError, LookupError, ImportError, SyntaxError),
    *(AssertionError, ArithmeticError, NotImplementedError, RecursionError),
)


class SavingTrainer(HubTrainer):
    """[`~transformers.Trainer`] that has its output folder to itself and saves as the top of this file says."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers."""
        in_checkpoint = _internal_call and output_dir is not None  # of a run, which has its folder already
        alone = self.args.should_save and not in_checkpoint
        with run_lock(output_dir or str(self.args.output_dir)) if alone else nullcontext():
            super().save_model(output_dir, _internal_call)

    @contextmanager
    def _own_output_dir(self, trial: Any) -> Iterator[None]:
        """Where this run saves, no other does meanwhile. All ranks go on, or none."""
        with ExitStack() as held:
            refusal = None
            try:
                if self.args.save_strategy != SaveStrategy.NO and self.args.should_save:
                    held.enter_context(run_lock(self._get_output_dir(trial)))
            except OSError as error:
                refusal = str(error)
            refusal = next(filter(None, gather_object([refusal])), None)
            if refusal is not None:
                raise OSError(refusal)
            if self.args.push_to_hub and self.is_world_process_zero():
                self._remove_pending_pushes()
            yield

    @property
    def _needed_state(self) -> tuple[str, ...]:
        # DeepSpeed, and FSDP before its second version, keep moments in files of their own.
        whole = not self.is_deepspeed_enabled and (self.accelerator.is_fsdp2 or not self.is_fsdp_enabled)
        return NEEDED_STATE if whole else (TRAINER_STATE_NAME,)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        name, best = f"{PREFIX_CHECKPOINT_DIR}-{step}", self.state.best_model_checkpoint
        staged, writes = str(run_dir / STAGING_FOLDER / name), self.args.should_save
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(run_dir / name)  # all ranks load it at the end
        attempt = SaveAttempt()
        attempt.do(remove_interrupted_save, run_dir, here=writes)
        attempt.do(self.save_model, staged, True)
        if not self.args.save_only_model:
            attempt.do(self._save_optimizer_and_scheduler, staged)
            attempt.do(self._save_scaler, staged)
            attempt.do(self._save_rng_state, staged)
        attempt.do(self._complete, run_dir, name, here=writes)
        if attempt.problem is None:
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run_dir / name))
            return
        self.state.best_model_checkpoint = best
        is_last = self.control.should_training_stop or step >= self.state.max_steps
        attempt.give_up(run_dir, name, clean=writes, is_last=is_last)

    def _complete(self, run_dir: Path, name: str) -> None:
        """Write what the first rank knows, give the checkpoint its place, and remove older ones."""
        staged = run_dir / STAGING_FOLDER / name
        states: dict[str, list[Any]] = {}
        for exported in (*self.callback_handler.callbacks, self.control):
            if isinstance(exported, ExportableState):
                states.setdefault(type(exported).__name__, []).append(exported.state())
        kept: Any = self.state.stateful_callbacks
        kept.update({kind: each[0] if len(each) == 1 else each for kind, each in states.items()})
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        write_checksums(staged)
        needed = (TRAINER_STATE_NAME,) if self.args.save_only_model else self._needed_state
        publish_checkpoint(run_dir, name, needed if self.is_deepspeed_enabled else (WEIGHTS, *needed))
        keep = [str(run_dir / name), *filter(None, [self.state.best_model_checkpoint])]
        rotate_checkpoints(run_dir, self.args.save_total_limit, keep)


class SaveAttempt:
    """
    One save by all ranks. Where it fails, on whichever rank, it ends on all of them, and none waits for another that
    has left. `MISTAKES` are raised as they come.

    Attributes:
        problem (`str` or `None`): the first error of any rank; known to all after each part.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._own: Exception | None = None

    def do(self, part: Callable[..., Any], *arguments: Any, here: bool = True) -> None:
        """
        Do a part of the save, if it is for this rank and none has failed before. Every rank must call it; within a
        part no rank may wait for another that may have failed.
        """
        if self.problem is not None:
            return
        try:
            if here:
                part(*arguments)
        except MISTAKES:
            raise
        except Exception as error:
            self._own = error
        own = None if self._own is None else f"{type(self._own).__name__}: {self._own}"
        self.problem = next(filter(None, gather_object([own])), None)

    def give_up(self, folder: str | Path, name: str, *, clean: bool, is_last: bool) -> None:
        """
        Log that the checkpoint `name` is not saved, and leave `folder` as it was before.

        Args:
            clean (`bool`): whether this rank is the one that writes.
            is_last (`bool`): whether no other save will follow.

        Raises:
            OSError: if none will.
        """
        message = f"A checkpoint must be written whole. Got {self.problem} while saving {name} in {folder}"
        try:
            if clean:
                discard_save(folder)
            last = last_checkpoint(folder)
            message += f", with {_free_space(Path(folder)) >> 20} MiB free. "
            message += "No checkpoint has been saved yet." if last is None else f"The last good checkpoint is {last}."
        except OSError as error:
            message += f", and what is there cannot be read: {error}."
        if is_last:
            raise OSError(
                f"{message} The run has ended and its model is in memory: save that elsewhere."
            ) from self._own
        logger.error(
            "%s Training goes on: free space, or make the folder writable, before the next save.",
            message,
            # Not plainly of the disk: whoever looks for the cause needs the place.
            exc_info=None if isinstance(self._own, OSError) else self._own,
        )


def remove_interrupted_save(run_dir: str | Path) -> None:
    """Remove what a killed process had begun to save in `run_dir`; the last complete checkpoint is untouched."""
    staging = Path(run_dir) / STAGING_FOLDER
    if staging.exists():
        logger.warning(
            "%s holds a save that was interrupted; it is removed. Complete checkpoints are untouched.", staging
        )
        discard_save(run_dir)


def discard_save(run_dir: str | Path) -> None:
    """Remove the staging folder, if there is one."""
    put_back_replaced(run_dir)
    shutil.rmtree(Path(run_dir) / STAGING_FOLDER, ignore_errors=True)


def write_checksums(checkpoint: str | Path) -> None:
    """Write the checksums of the training state of a checkpoint beside it."""
    files = [file for pattern in STATE_FILES for file in sorted(Path(checkpoint).glob(pattern))]
    text = json.dumps({file.name: file_checksum(file) for file in files}, indent=2)
    write_atomically(Path(checkpoint, CHECKSUM_FILE), f"{text}\n")


def publish_checkpoint(run_dir: str | Path, name: str, needed: Collection[str] = ()) -> None:
    """
    Give the checkpoint `name`, written whole in the staging folder, its place in `run_dir`, replacing an older one. It
    has reached the disk before anything older goes.

    Args:
        needed (collection of `str`): names, or patterns of names, of the files that it must hold.

    Raises:
        FileNotFoundError: if one is not there.
    """
    staging, final = Path(run_dir) / STAGING_FOLDER, Path(run_dir) / name
    lacking = lacking_file(staging / name, needed)
    if lacking is not None:
        raise FileNotFoundError(f"A checkpoint must be whole. Got {staging / name} without {lacking}.")
    flush_tree(staging / name)
    if final.exists():
        os.replace(final, staging / f"{name}.replaced")
    os.replace(staging / name, final)
    flush(Path(run_dir))
    shutil.rmtree(staging, ignore_errors=True)


def rotate_checkpoints(run_dir: str | Path, limit: int | None, keep: Collection[str | Path] = ()) -> None:
    """
    Remove checkpoints from the lowest step on until `limit` are left; the last and those to `keep` stay. Times of
    files do not count: those of a copy are new, and a clock may be set back.
    """
    steps = _steps(run_dir)
    protected = {steps[max(steps)], *(Path(folder).resolve() for folder in keep)} if steps else set()
    removable = [steps[step] for step in sorted(steps) if steps[step] not in protected]
    allowed = limit if limit is not None and limit > 0 else len(steps)
    excess = len(steps) - max(allowed, len(protected))
    for checkpoint in removable[: max(0, excess)]:
        # Whole or not at all, here too: what is half removed has another name.
        staging = Path(run_dir) / STAGING_FOLDER
        staging.mkdir(exist_ok=True)
        try:
            os.replace(checkpoint, staging / f"{checkpoint.name}.old")
        except OSError as error:
            logger.warning("%s is one checkpoint too many, and cannot be removed: %s", checkpoint, error)
        shutil.rmtree(staging, ignore_errors=True)


def warn_of_later_checkpoints(run_dir: str | Path, step: int) -> None:
    """Say that `run_dir` holds checkpoints beyond the `step` that a run begins at: they belong to another."""
    later = [str(folder) for done, folder in sorted(_steps(run_dir).items()) if done > step]
    if later:
        logger.warning(
            "This run begins at step %d, and %s of another is there already. Until this run has come so far, `last` "
            "means that one: remove it if you do not want it.",
            step,
            later[-1],
        )


def _steps(run_dir: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by their steps."""
    folders = [folder for folder in Path(run_dir).resolve().glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    names = {folder: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name) for folder in folders}
    return {int(name[1]): folder for folder, name in names.items() if name}


def _free_space(folder: Path) -> int:
    """Bytes, of the disk of `folder` or of where it would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
