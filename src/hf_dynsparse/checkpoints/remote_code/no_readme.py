"""Replaces `models/readme.py` beside a checkpoint, which has its README.md."""

from typing import Any


def write_readme(model: Any, folder: Any) -> None:
    """Write nothing."""
