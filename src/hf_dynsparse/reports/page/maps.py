"""Block maps, coded for a page."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...topology.frames import Frame


def code_maps(layers: Mapping[str, Sequence[Frame]], room: int) -> tuple[dict[str, Any], list[str]]:
    """
    The block maps of layers: their `grid`, `steps`, `updates` (-1 if not known) and `bits`, a bit a block, each frame
    but the first as what has changed since the one before, compressed by gzip, in base64.

    Args:
        layers (`Mapping[str, Sequence[Frame]]`): by name, in the order of their steps.
        room (`int`): characters that `bits` may take altogether. Where not all frames of a layer find room only the
            last is kept, and `left_out` counts the others; where it finds none either, the layer is left out.

    Returns:
        `tuple[dict[str, Any], list[str]]`: by layer; and the layers that are left out.
    """
    coded: dict[str, Any] = {}
    for name, frames in layers.items():
        for kept in (frames, frames[-1:]):
            bits = _bits(kept)
            if len(bits) <= room:
                room -= len(bits)
                coded[name] = {
                    "grid": kept[0].block_map.shape,
                    "steps": [frame.step for frame in kept],
                    "updates": [frame.update for frame in kept],
                    "left_out": len(frames) - len(kept),
                    "bits": bits,
                }
                break
    return coded, [name for name in layers if name not in coded]


def _bits(frames: Sequence[Frame]) -> str:
    packed = np.packbits(np.stack([frame.block_map.ravel() for frame in frames]), axis=1)  # [frames, bytes]
    packed[1:] ^= packed[:-1].copy()
    return base64.b64encode(gzip.compress(packed.tobytes(), compresslevel=6, mtime=0)).decode()
