"""What a long run is spared: to end because one save fails, or to go on with a loss that is not finite."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpoints.saving import discard_save, last_checkpoint


logger = logging.getLogger(__name__)

# What Python says of a mistake in a program, which would end every save alike. All else counts as a failed write:
# torch, safetensors and tokenizers speak of a disk in exceptions of their own, in words that change.
MISTAKES = (
    *(TypeError, AttributeError, NameError, LookupError, ImportError, SyntaxError),
    *(AssertionError, ArithmeticError, NotImplementedError, RecursionError),
)


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
        """Do a part of the save, if it is for this rank and none has failed before. Every rank must call it."""
        if self.problem is None:
            with self.noting():
                if here:
                    part(*arguments)
            own = None if self._own is None else f"{type(self._own).__name__}: {self._own}"
            self.problem = next(filter(None, gather_object([own])), None)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Where a failed write may not leave the flow of `do`, for the other ranks wait behind it."""
        try:
            yield
        except MISTAKES:
            raise
        except Exception as error:
            self._own = self._own or error

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


def are_finite(numbers: Iterable[torch.Tensor | float], accelerator: Accelerator) -> bool:
    """Whether all `numbers` are finite, on all ranks. Every rank must call it."""
    bad = [~torch.as_tensor(number, device=accelerator.device).isfinite() for number in numbers]
    return not bool(accelerator.reduce(torch.stack(bad).float().sum(), "sum"))


def _free_space(folder: Path) -> int:
    """Bytes, of the disk of `folder` or of where it would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
