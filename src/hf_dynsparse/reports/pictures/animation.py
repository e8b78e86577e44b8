"""The topology of a layer as it evolves, from the history of a run. Needs Pillow, which comes with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...topology.frames import Frame
from .blocks import KINDS, blocks_in_cell, changes, colours_of_kinds, paint_blocks


if TYPE_CHECKING:
    from PIL.Image import Image


FONT_SIZE, LINE_HEIGHT, MARGIN = 14, 20, 14  # pixels
LAST_SECONDS = 2.0  # the last frame stays, before the picture begins again
LONGEST = 600  # a GIF counts hundredths of a second in 16 bits


def animate_block_map(
    frames: Sequence[Frame], path: str | PathLike[str], title: str = "", seconds: float = 8.0
) -> None:
    """
    Draw how the topology of a layer evolves, as a moving picture: a frame for the start and one for every update.

    Args:
        frames (`Sequence[Frame]`):
            What [`~topology.frames.read_history`] gives.
        path (`str` or `PathLike`):
            File to write, usually a `.gif`; `.webp` and `.png` move too. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            First line of the picture; by default the name of the layer.
        seconds (`float`, *optional*, defaults to 8.0):
            How long it runs, before the last frame stays for two seconds; a frame lasts 0.02 seconds at the least.

    Raises:
        ValueError: if there is no frame, or `seconds` is not positive, or more than ten minutes.
        ImportError: if Pillow is not installed.
    """
    if not frames:
        raise ValueError("`frames` must hold at least one. Got none. Train with a `TopologyHistory` callback.")
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"`seconds` must lie in (0, {LONGEST}]. Got {seconds:g}. Choose for example 8.")
    try:
        from PIL.Image import Dither
    except ImportError as error:
        raise ImportError(
            "Moving pictures are drawn with Pillow, which could not be imported. Run `pip install "
            "hf_dynsparse[plots]`."
        ) from error

    palette = _palette()
    first, *rest = (picture.quantize(palette=palette, dither=Dither.NONE) for picture in _pictures(frames, title))
    lasting = [max(20, round(1000 * seconds / len(frames)))] * len(frames)  # milliseconds
    lasting[-1] += round(1000 * LAST_SECONDS)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=lasting, loop=0)


def _pictures(frames: Sequence[Frame], title: str) -> Iterator[Image]:
    for frame, (newborn, ever_active) in zip(frames, changes(frames), strict=True):
        lines = [
            title or frame.layer,
            f"update {frame.update} of {frames[-1].update}, step {frame.step:,}",
            f"{frame.block_map.mean():.1%} active, coverage {ever_active.mean():.1%}",
        ]
        factor = blocks_in_cell(frame.block_map.shape)
        if factor > 1:
            lines.append(f"a cell is the mean of {factor} x {factor} blocks")
        yield _compose(paint_blocks(frame.block_map, newborn, ever_active), lines)


def _compose(blocks: np.ndarray, lines: Sequence[str]) -> Image:
    """The picture `blocks` `[height, width, 3]`, and on its right `lines` of text above a legend."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    height, width, _ = blocks.shape
    text_width = round(max(font.getlength(line) for line in lines))
    text_height = LINE_HEIGHT * (len(lines) + len(KINDS) + 1)
    size = (width + text_width + 3 * MARGIN, max(height, text_height) + 2 * MARGIN)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(Image.fromarray(blocks), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(canvas)
    left, top = width + 2 * MARGIN, MARGIN
    for line in lines:
        draw.text((left, top), line, "black", font)
        top += LINE_HEIGHT
    for kind, colour in KINDS.items():
        top += LINE_HEIGHT
        draw.rectangle((left, top + 3, left + FONT_SIZE - 4, top + FONT_SIZE - 1), colour, outline="#808080")
        draw.text((left + FONT_SIZE + 4, top), kind, "black", font)
    return canvas


def _palette() -> Image:
    """256 colours for all frames: the kinds of blocks, their mixtures in ninths, and greys for the text."""
    from PIL import Image

    parts = [(*few, 9 - sum(few)) for few in product(range(10), repeat=3) if sum(few) <= 9]  # 220 rows
    mixtures = np.array(parts) / 9 @ colours_of_kinds()
    greys = np.linspace(0, 255, 256 - len(parts))[:, None].repeat(3, axis=1)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([mixtures, greys]).round().astype(int).ravel().tolist())
    return palette
