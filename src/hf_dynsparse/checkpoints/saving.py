"""Checkpoints that exist whole or not at all: written aside, flushed to the disk, then renamed."""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection
from contextlib import suppress
from fnmatch import filter as matching
from pathlib import Path

from .._transformers import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from ..files import flush, flush_tree, write_atomically
from ..models.checksums import verify_weights


logger = logging.getLogger(__name__)

# Not named checkpoint-*: nothing that looks for the last checkpoint may find a half-written one.
STAGING_FOLDER = "incomplete-save"

# What a resumed run reads beside the weights, which carry checksums of their own; and the file with theirs.
NEEDED_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
STATE_FILES = (*NEEDED_STATE, "scaler.pt")
CHECKSUM_FILE = "checksums.json"
WEIGHTS = "*model*.safetensors"  # one file, or shards, or those of an adapter


def last_checkpoint(run_dir: str | Path) -> str | None:
    """The newest complete checkpoint in `run_dir`, if there is any."""
    _put_back_replaced(run_dir)
    return get_last_checkpoint(str(run_dir)) if Path(run_dir).is_dir() else None


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
    _put_back_replaced(run_dir)
    shutil.rmtree(Path(run_dir) / STAGING_FOLDER, ignore_errors=True)


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
    lacking = _lacking(staging / name, needed)
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


def write_checksums(checkpoint: str | Path) -> None:
    """Write the checksums of the training state of a checkpoint beside it."""
    files = [file for pattern in STATE_FILES for file in sorted(Path(checkpoint).glob(pattern))]
    text = json.dumps({file.name: _checksum(file) for file in files}, indent=2)
    write_atomically(Path(checkpoint, CHECKSUM_FILE), f"{text}\n")


def check_training_state(checkpoint: str | Path, needed: Collection[str] = NEEDED_STATE) -> None:
    """
    Check that the training state of a checkpoint is there and as it was saved: the Trainer would go on without
    moments if they are missing, and would not notice other numbers. A whole one without checksums passes with a line
    in the log.

    Args:
        needed (collection of `str`): names, or patterns of names, of the files without which it is not whole.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    lacking = _lacking(checkpoint, needed)
    if lacking is not None:
        raise ValueError(
            f"A resumed run needs its whole training state. Got {checkpoint} without {lacking}. {_FIX} Of one with "
            "weights alone, take those for the start of a new run."
        )
    list_file = Path(checkpoint, CHECKSUM_FILE)
    if not list_file.is_file():
        logger.warning("%s carries no checksums of its training state, which is taken as it is.", checkpoint)
        return
    try:
        saved = dict(json.loads(list_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"Checksums must be a table. Got {list_file}, which is none: {error}. {_FIX}") from error
    files = {file.name: file for file in Path(checkpoint).iterdir()}
    unlisted = {name for pattern in STATE_FILES for name in matching(files, pattern)} - saved.keys()
    if unlisted:
        raise ValueError(f"Checksums must cover all training state. Got {list_file} without {min(unlisted)}. {_FIX}")
    for name, checksum in saved.items():
        if name not in files:
            raise ValueError(f"A resumed run needs its whole training state. Got {checkpoint} without {name}. {_FIX}")
        if (got := _checksum(files[name])) != checksum:
            raise ValueError(
                f"A resumed run needs its training state as it was saved. Got {files[name]} with checksum {got} "
                f"instead of {checksum}. {_FIX}"
            )


def check_weights(checkpoint: str | Path) -> None:
    """
    Check that the weights of a checkpoint are what was saved; see [`verify_weights`].

    Raises:
        ValueError: naming tensor and file, or a pickle in the place of safetensors.
    """
    files = weight_files(checkpoint)
    pickles = sorted(Path(checkpoint).glob("pytorch_model*.bin"))
    if pickles and not files:
        raise ValueError(f"The weights of a checkpoint must be safetensors. Got {pickles[0]}, a pickle. {_FIX}")
    verify_weights(files)


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The safetensors files of the weights of a checkpoint: one, or shards."""
    return sorted(Path(checkpoint).glob("model*.safetensors"))


_FIX = "The checkpoint is damaged, or was changed afterwards: resume from another."


def _lacking(checkpoint: str | Path, needed: Collection[str]) -> str | None:
    """A name by the first of the patterns that no file there has."""
    missing = (pattern for pattern in needed if not any(Path(checkpoint).glob(pattern)))
    return next((pattern.replace("*", "") for pattern in missing), None)


def _steps(run_dir: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by their steps."""
    folders = [folder for folder in Path(run_dir).resolve().glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    names = {folder: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name) for folder in folders}
    return {int(name[1]): folder for folder, name in names.items() if name}


def _put_back_replaced(run_dir: str | Path) -> None:
    """Undo what was interrupted between the two renames of `publish_checkpoint`."""
    for replaced in Path(run_dir, STAGING_FOLDER).glob("*.replaced"):
        if not Path(run_dir, replaced.stem).exists():
            with suppress(FileNotFoundError):  # another rank was faster
                os.replace(replaced, Path(run_dir, replaced.stem))


def _checksum(file: Path) -> str:
    """CRC-32, as of the weights."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
