"""What a long run is spared: to end because one save fails, or to go on with a loss that is not finite."""

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .checkpoint import discard_save, last_checkpoint


logger = logging.getLogger(__name__)

# How torch, safetensors and tokenizers speak of a disk, all of them in exceptions of their own.
_OF_THE_DISK = re.compile(r"\(os error \d+\)|inline_container|Parent directory .* does not exist")


class SaveAttempt:
    """
    One save by all ranks. Where a disk fails, on whichever rank, the save ends on all of them, and none waits for
    another that has left. Any other error is raised as it comes.

    Attributes:
        problem (`str` or `None`): the first error of any rank; known to all after each part.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._own: str | None = None

    def do(self, part: Callable[..., Any], *arguments: Any, here: bool = True) -> None:
        """Do a part of the save, if it is for this rank and none has failed before. Every rank must call it."""
        if self.problem is None:
            with self.noting():
                if here:
                    part(*arguments)
            self.problem = next(filter(None, gather_object([self._own])), None)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Where an error of the disk may not leave the flow of `do`, for the other ranks wait behind it."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and _OF_THE_DISK.search(str(error)) is None:
                raise
            self._own = self._own or f"{type(error).__name__}: {error}"

    def give_up(self, folder: str | Path, name: str, *, clean: bool, is_last: bool) -> None:
        """
        Log that the checkpoint `name` is not saved, and leave `folder` as it was before.

        Args:
            clean (`bool`): whether this rank is the one that writes.
            is_last (`bool`): whether no other save will follow.

        Raises:
            OSError: if none will.
        """
        if clean:
            discard_save(folder)
        last = last_checkpoint(folder)
        message = (
            f"A checkpoint must be written whole. Got {self.problem} while saving {name} in {folder}, with "
            f"{_free_space(Path(folder)) >> 20} MiB free. "
            f"{'No checkpoint has been saved yet.' if last is None else f'The last good checkpoint is {last}.'} "
        )
        if is_last:
            raise OSError(f"{message}The run has ended and its model is in memory: save that elsewhere.")
        logger.error("%sTraining goes on: free space, or make the folder writable, before the next save.", message)


def check_writable(folder: str | Path) -> None:
    """
    Write a file that has no name, so that a run does not learn at its first save that it cannot.

    Raises:
        OSError: if that is impossible.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def are_finite(numbers: Iterable[torch.Tensor | float], accelerator: Accelerator) -> bool:
    """Whether all `numbers` are finite, on all ranks. Every rank must call it."""
    bad = [~torch.as_tensor(number, device=accelerator.device).isfinite() for number in numbers]
    return not bool(accelerator.reduce(torch.stack(bad).float().sum(), "sum"))


def _free_space(folder: Path) -> int:
    """Bytes, of the disk of `folder` or of where it would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
