"""Files that are there whole or not at all, and that a power cut does not take back."""

import errno
import json
import os
import shutil
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union, get_args, get_origin


Kinds = Mapping[str, Any]


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


def read_object(file: str | Path, kinds: Kinds | None = None) -> dict[str, Any]:
    """
    The object in a JSON file.

    Args:
        kinds (`Mapping[str, type]`, *optional*): of fields, such as `{"steps": int, "metrics": dict[str, float]}`.
            They may all be missing or null; `float` includes whole numbers. Other fields may hold anything.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and field, if it is not JSON, no object, or a field is of another kind.
    """
    file = Path(file)
    if file.exists() and not file.is_file():  # reading a pipe would wait for a writer
        raise ValueError(f"A JSON file must be a regular file. Got {file}, which is none. Remove it.")
    return parse_object(file.read_bytes(), str(file), kinds)


def parse_object(text: bytes, place: str, kinds: Kinds | None = None) -> dict[str, Any]:
    """As [`read_object`], of the content of a file `place`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must be JSON. Got {_reason(error)}. Load an intact one.") from error
    return check_object(content, place, kinds)


def check_object(content: Any, place: str, kinds: Kinds | None = None) -> dict[str, Any]:
    """As [`read_object`], of an object that has been read from `place`."""
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold a JSON object. Got {_shown(content)}. Load an intact one.")
    for name, kind in (kinds or {}).items():
        value = content.get(name)
        if value is not None and not fits(value, kind):
            raise ValueError(
                f"`{name}` in {place} must be {_words(kind)}. Got {_shown(value)}. Load an intact file, or mend it."
            )
    return content


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a kind such as `dict[str, list[int]]`; true and false are no numbers."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Any:
        return True
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    if not isinstance(value, types.NoneType if origin is None else origin):
        return False
    parts: Any = value.values() if isinstance(value, dict) else value
    return not arguments or all(fits(part, arguments[-1]) for part in parts)


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}
    return names.get(kind) or str(kind).replace("typing.", "")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _reason(error: Exception) -> str:
    return "lists in lists without end" if isinstance(error, RecursionError) else str(error)


@contextmanager
def written_aside(target: str | Path) -> Iterator[Path]:
    """
    A path to write a file or folder to. When the block ends it takes the name `target`; after an error, or a process
    that was killed, nothing stands there. Other files that were written beside it come along.

    Raises:
        FileExistsError: if `target` exists and is more than an empty folder.
    """
    target = Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"The target must not exist yet. Got {target}, which does. Choose another name.")
    aside = target.parent / f".{target.name}.incomplete"
    if aside.exists():  # of a process that was killed
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside / target.name
        flush_tree(aside)
        # The target last: where it stands, everything does.
        for written in sorted(aside.iterdir(), key=lambda path: path.name == target.name):
            os.replace(written, target.parent / written.name)
        flush(target.parent)
    finally:
        shutil.rmtree(aside)
