"""Replaces `models/calibrated.py` beside a checkpoint, which is sparse already."""

from typing import Any, NoReturn


def calibrate_(*_: Any) -> NoReturn:
    """
    Refuse.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "`calibration` is for a dense checkpoint and needs `hf_dynsparse`. Got the code beside a sparse one. Install "
        "the package and import it."
    )
