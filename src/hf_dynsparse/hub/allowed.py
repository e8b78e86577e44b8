"""What may be pushed: a list, by the name of a file and by what is in it. Whatever is not on it stays here."""

import io
import json
import os
import pickletools
import stat
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import constants

from ..models.checksums import open_weights


def check_file(file: Path, root: Path, stays: Callable[[str], bool] = lambda name: False) -> None:
    """
    Check that a file may be pushed. Nothing is opened before it is known to be a regular file.

    Args:
        file (`Path`): in the folder that is to be pushed, or below.
        root (`Path`): that folder, without links in its own path.
        stays (`Callable[[str], bool]`): whether files of a name stay behind: no link may bring them in.

    Raises:
        ValueError: saying what is wrong with it.
    """
    check_regular(file, root, stays)
    for pattern, why_not in _KINDS.items():
        if fnmatchcase(file.name, pattern):
            reason = why_not(file)
            break
    else:
        reason = "of a kind that is not on this list"
    if reason is not None:
        raise ValueError(
            "Only safe files may be pushed: safetensors, JSON, text, pictures, SentencePiece and ONNX models; "
            f"no pickles. Got {file}, {reason}. Remove it, or save it as one of these."
        )


def check_regular(file: Path, root: Path, stays: Callable[[str], bool] = lambda name: False) -> None:
    """
    Check that a file to be pushed is a regular one, or a link to one that the folder or a cache of the Hub holds.

    Raises:
        ValueError: saying what it is.
    """
    reason = None if stat.S_ISREG(file.lstat().st_mode) else "which is neither"
    if file.is_symlink():
        target = Path(os.path.realpath(file))
        inside = target.is_relative_to(root) and not any(map(stays, target.relative_to(root).parts))
        caches = [Path(constants.HF_HUB_CACHE).resolve()]
        if root.parent.name == "snapshots":  # the folder belongs to a cache that stands elsewhere
            caches.append(root.parents[1] / "blobs")
        if not (inside or any(target.is_relative_to(cache) for cache in caches)):
            reason = f"a link to {target}"
        elif target.is_file():
            reason = None
    if reason is not None:
        raise ValueError(
            "Only regular files may be pushed, and links to what is pushed as well or lies in the Hub's cache. Got "
            f"{file}, {reason}. Remove it, or put a copy there."
        )


def _why_not_safetensors(file: Path) -> str | None:
    try:
        with open_weights(file):
            return None
    except ValueError as error:
        return f"which is no whole safetensors file: {error.__cause__}"


def _why_not_json(file: Path) -> str | None:
    try:
        is_json = isinstance(json.loads(file.read_bytes()), dict | list)
    except (ValueError, RecursionError):
        is_json = False
    return None if is_json else "which is no JSON"


def _why_not_text(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if not _CONTROLS.isdisjoint(line):
                    return "which is no text"
    except UnicodeDecodeError:
        return "which is no text in UTF-8"
    return "a pickle" if _is_pickle(file) else None


def _is_pickle(file: Path) -> bool:
    """Whether a text is a pickle too, as those of protocol 0 are. A few words may be one of three operations."""
    listing = io.StringIO()
    try:
        with file.open("rb") as content:
            pickletools.dis(content, listing)
    except Exception:  # of any sort: it is made for pickles
        return False
    return listing.getvalue().count("\n") > 3


def _starts_with(*starts: bytes) -> Callable[[Path], str | None]:
    def why_not(file: Path) -> str | None:
        with file.open("rb") as content:
            return None if content.read(16).startswith(starts) else "which is not what its name says"

    return why_not


_CONTROLS = frozenset(map(chr, range(32))) - frozenset("\t\n\v\f\r\x1b")
_TEXTS = (
    *("*.md", "*.txt", "*.py", "*.jsonl", "*.csv", "*.tsv", "*.yaml", "*.yml", "*.toml", "*.jinja", "*.tiktoken"),
    *("*.log", "*.svg", "*.bib", "*.cff", "LICENSE", "LICENCE", "NOTICE"),
)
# By the name of a file: what is wrong with its content, if anything is.
_KINDS: dict[str, Callable[[Path], str | None]] = {
    "*.safetensors": _why_not_safetensors,
    "*.json": _why_not_json,
    **dict.fromkeys(_TEXTS, _why_not_text),
    "*.png": _starts_with(b"\x89PNG\r\n\x1a\n"),
    "*.gif": _starts_with(b"GIF87a", b"GIF89a"),
    **dict.fromkeys(("*.jpg", "*.jpeg"), _starts_with(b"\xff\xd8\xff")),
    "*.webp": _starts_with(b"RIFF"),
    "*.model": _starts_with(b"\n"),  # SentencePiece: field 1 of a protocol buffer
    "*.onnx": _starts_with(b"\x08"),
}
