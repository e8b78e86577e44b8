"""One run at a time writes to a folder."""

import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"  # says who holds the lock, which itself is the system's: that of a dead process is free
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """
    Have `folder`, which is made if need be, to oneself within the `with` block. The same thread may take it again
    inside, as a script does that trains.

    Raises:
        OSError: if another process or thread has it, saying which; or if nothing can be written there.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    # One object for all who ask in a thread, another in each thread. Forked processes, such as the workers of a data
    # loader, let go of it, so that they do not keep a folder from the next run.
    lock = FileLock(folder / LOCK_FILE, timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        _take(lock, folder)
        yield
    finally:
        # The file goes while the lock is held: whoever waits for it notices, and makes another.
        if lock.lock_counter == 1:
            with suppress(OSError):
                os.unlink(folder / LOCK_FILE)
        lock.release()
        with suppress(OSError):  # what is not empty stays
            for place in made:
                place.rmdir()


def _take(lock: FileLock, folder: Path) -> None:
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if lock.lock_counter == 1:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}", encoding="utf-8")
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = file.read_text(encoding="utf-8", errors="replace")
        raise BlockingIOError(
            f"A run must have its folder to itself. Got {folder}, held by {holder or 'another process'}. Choose "
            "another `output_dir`, or wait until that run has ended."
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise OSError(
                f"A run needs a folder to save to. Got {folder}, and {type(error).__name__}: {error}. Choose another "
                "`output_dir`, or `save_strategy='no'`."
            ) from error
        logger.warning("The file system of %s has no locks: see to it that no other run writes there.", folder)


def lock_holder(folder: str | Path) -> str | None:
    """What holds a folder, as its lock file says; `None` if nothing does, or what did has ended on this machine."""
    try:
        holder = Path(folder, LOCK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.match(r"process (\d+) on (\S+) since ", holder)
    if found and found[2] == socket.gethostname():
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            return None
        except OSError:  # of another user
            pass
    return holder
