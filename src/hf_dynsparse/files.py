"""Files that are there whole or not at all, and that a power cut does not take back."""

import errno
import os
import threading
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """
    Write a file, and its folder if there is none. Other processes, and whoever looks after a crash or a power cut, see
    all of it or what stood there before. Text is written in UTF-8, as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that nothing takes it for a file of the folder; and no other writer has the same.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """
    Wait until the disk holds a file, or of a folder the names in it. Some systems cannot do the latter: there a rename
    is as lasting as they make it.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """The same for all that is in a folder, and the folder itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(place, name))
        flush(Path(place))
