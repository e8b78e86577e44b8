"""Blocks of a matrix: their sizes, the index of the active ones, and how it is drawn."""

from .layout import BlockLayout


__all__ = ["BlockLayout"]
