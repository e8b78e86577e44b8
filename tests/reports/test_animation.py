"""The moving picture of a topology: its frames, times and colours."""

import sys

import numpy as np
import pytest

from hf_dynsparse.reports.pictures.animation import animate_block_map
from hf_dynsparse.reports.pictures.blocks import changes, paint_blocks
from hf_dynsparse.topology.frames import Frame


image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def frames_of(grid=(16, 8), count=5, seed=0):
    draw = np.random.default_rng(seed)
    return [Frame("encoder.query", number, 10 * number, draw.random(grid) < 0.3) for number in range(count)]


def read_frames(path):
    """RGB of every frame, and how long each lasts in milliseconds."""
    with image.open(path) as picture:
        shown = []
        for number in range(picture.n_frames):
            picture.seek(number)
            shown.append((np.asarray(picture.convert("RGB")), picture.info["duration"]))
        return shown, picture.info


@pytest.mark.parametrize(("grid", "count"), [((16, 8), 5), ((1, 1), 1), ((3, 40), 12)])
def test_every_frame_shows_its_blocks(tmp_path, grid, count):
    path, frames = tmp_path / "new folder" / "topology.gif", frames_of(grid, count)
    animate_block_map(frames, path, seconds=1)
    shown, info = read_frames(path)
    assert info["loop"] == 0
    assert len(shown) == count
    for (pixels, _), frame, change in zip(shown, frames, changes(frames), strict=True):
        blocks = paint_blocks(frame.block_map, *change)
        height, width, _ = blocks.shape
        np.testing.assert_array_equal(pixels[14 : 14 + height, 14 : 14 + width], blocks)
    each = round(1000 / count / 10) * 10
    assert [duration for _, duration in shown] == pytest.approx([each] * (count - 1) + [each + 2000], abs=10)


def test_text_tells_the_update(tmp_path):
    """The same blocks at another step are another picture, on the right of the map alone."""
    block_map = np.eye(8, dtype=bool)
    animate_block_map([Frame("x", 0, 0, block_map), Frame("x", 1, 7, block_map)], tmp_path / "x.gif")
    ((first, _), (second, _)), _ = read_frames(tmp_path / "x.gif")
    _, columns, _ = np.nonzero(first != second)
    assert len(columns) > 20
    assert columns.min() > 512


def test_a_large_layer_keeps_its_colours(tmp_path):
    frames = frames_of((600, 300), 2)
    animate_block_map(frames, tmp_path / "large.gif", title="large")
    (_, (pixels, _)), _ = read_frames(tmp_path / "large.gif")
    blocks = paint_blocks(frames[1].block_map, *list(changes(frames))[1]).astype(int)
    difference = pixels[14 : 14 + blocks.shape[0], 14 : 14 + blocks.shape[1]] - blocks
    assert np.abs(difference).max() <= 20  # the nearest of 256 colours
    assert np.abs(difference.mean(axis=(0, 1))).max() < 3


def test_other_formats_move_too(tmp_path):
    animate_block_map(frames_of(), tmp_path / "topology.webp")
    assert len(read_frames(tmp_path / "topology.webp")[0]) == 5


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`frames` must hold at least one. Got none"):
        animate_block_map([], tmp_path / "x.gif")
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"`seconds` must lie in \(0, 600\]. Got {seconds:g}"):
            animate_block_map(frames_of(), tmp_path / "x.gif", seconds=seconds)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install hf_dynsparse\[plots\]"):
        animate_block_map(frames_of(), tmp_path / "x.gif")
    assert list(tmp_path.iterdir()) == []
