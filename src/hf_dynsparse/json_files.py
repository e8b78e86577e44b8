"""JSON that somebody else may have written: an object with fields of the right kinds, or a line about what is not."""

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin


Kinds = Mapping[str, Any]


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
