"""Calibrated pruning: blocks are kept, and fitted, by what passes through a dense model."""

from .prune import prune_by_calibration_
from .settings import Calibration
from .stages import Batch


__all__ = ["Batch", "Calibration", "prune_by_calibration_"]
