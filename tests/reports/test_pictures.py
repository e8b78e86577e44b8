import sys

import numpy as np
import pytest

from hf_dynsparse.reports.pictures.layers import plot_block_map, plot_layer_maps
from hf_dynsparse.reports.pictures.runs import _flops_of, plot_comparison, plot_over_seconds, plot_training


image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")


def run_log(steps=200, flops_per_step=3.2e12, floor=3.0, prefix="dynsparse/"):
    """A log as the trainer writes it: training entries with metrics, evaluations without."""
    history = []
    for step in range(10, steps + 1, 10):
        progress = step / steps
        loss = floor + 6.0 * np.exp(-4 * progress)
        metrics = {
            "flops": flops_per_step * step,
            "coverage": 1 - 0.9 * 0.1**progress,
            "newborn_share": 0.3 * progress,
            "pruning_ratio": 0.25 * (1 + np.cos(np.pi * progress)),
        }
        history.append({"loss": loss, "step": step} | {prefix + name: value for name, value in metrics.items()})
        if step % 40 == 0:
            history.append({"eval_loss": loss + 0.15, "step": step})
    return history + [{"train_runtime": 1.0, "train_loss": 4.0, "step": steps}]


def block_maps(rows, columns, density=0.1, seed=0):
    generator = np.random.default_rng(seed)
    initial, final = generator.random((2, rows, columns)) < density
    return initial, initial | final | (generator.random((rows, columns)) < 0.7), final


def read_picture(path):
    """The decoded picture; it must hold more than a few shades."""
    pixels = image.imread(path)  # [height, width, channels]
    assert path.stat().st_size > 5_000
    shades = (pixels[::2, ::2, :3] * 255).astype(int) @ (1, 256, 65536)
    assert len(np.unique(shades)) > 20
    return pixels


def test_training(tmp_path):
    """Of a dense model there is one panel instead of two; the context gain has its own."""
    path = tmp_path / "new folder" / "training.png"
    plot_training(run_log(), path, title="BERT-Mini, s = 0.9, B = 16")
    height, width, _ = read_picture(path).shape
    assert 1000 < height < width
    dense = [{key: entry[key] for key in entry.keys() & {"loss", "step", "dynsparse/flops"}} for entry in run_log()]
    plot_training(dense, tmp_path / "dense.png")
    assert read_picture(tmp_path / "dense.png").shape[0] < 0.7 * height
    gains = [{"eval_context_gain": step / 99, "step": step} for step in (40, 80, 200)]
    plot_training(run_log() + gains, tmp_path / "gain.png")
    assert read_picture(tmp_path / "gain.png").shape[0] > 1.2 * height


def test_over_seconds(tmp_path):
    """A panel of its own for the context gain, if a run has logged it."""
    runs = {"sparse": (run_log(), 140.0), "dense": (run_log(flops_per_step=9e12), 141.0)}
    plot_over_seconds(runs, tmp_path / "loss.png")
    height = read_picture(tmp_path / "loss.png").shape[0]
    runs["dense"][0][4]["eval_context_gain"] = 0.1
    plot_over_seconds(runs, tmp_path / "gain.png", title="Two models")
    assert read_picture(tmp_path / "gain.png").shape[0] > 1.3 * height
    with pytest.raises(ValueError, match="of run 'dense' must hold at least one entry with `dynsparse/flops`"):
        plot_over_seconds({"dense": ([{"loss": 1.0, "step": 1}], 1.0)}, tmp_path / "no.png")


def test_training_without_evaluation(tmp_path):
    path = tmp_path / "training.png"
    plot_training([entry for entry in run_log() if "eval_loss" not in entry], path)
    read_picture(path)


@pytest.mark.parametrize("grid", [(1, 1), (48, 192), (192, 48), (1100, 400)])
def test_block_map(tmp_path, grid):
    path = tmp_path / "map.png"
    maps = block_maps(*grid)
    plot_block_map(*maps, path, title="layer.0.intermediate.dense", shape=(16 * grid[0], 16 * grid[1]))
    read_picture(path)


@pytest.mark.parametrize(("number", "ratio"), [(1, 1), (9, 30)])
def test_comparison(tmp_path, number, ratio):
    path = tmp_path / "comparison.png"
    runs = {f"run {i}": run_log(200 + 40 * i, 1e12 * ratio**i, floor=3 - 0.02 * i) for i in range(number)}
    plot_comparison(runs, path, title="evaluation")
    height, width, _ = read_picture(path).shape
    assert height < width


def test_flops_between_and_beyond_the_logged_steps():
    history = [{"step": 10, "dynsparse/flops": 100.0}, *2 * [{"step": 20, "dynsparse/flops": 300.0}]]
    np.testing.assert_allclose(_flops_of(history, np.array([0, 5, 10, 15, 22])), [0, 50, 100, 200, 340])


@pytest.mark.parametrize(
    ("missing", "keys"),
    [
        ("`loss` or `eval_loss`", ("loss", "eval_loss")),
        ("`dynsparse/flops`", ("dynsparse/flops",)),
    ],
)
def test_training_says_what_the_log_lacks(tmp_path, missing, keys):
    history = [{key: value for key, value in entry.items() if key not in keys} for entry in run_log()]
    with pytest.raises(ValueError, match=f"at least one entry with {missing}.*Got 26 entries.*DynSparseTrainer"):
        plot_training(history, tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


def test_empty_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Got 0 entries with the keys: none"):
        plot_training([], tmp_path / "training.png")
    with pytest.raises(ValueError, match="at least one run. Got none"):
        plot_comparison({}, tmp_path / "comparison.png")
    with pytest.raises(ValueError, match="run 'static' must hold at least one entry with `eval_loss`.*and evaluated"):
        plot_comparison({"static": [{"loss": 1.0, "step": 1}]}, tmp_path / "comparison.png")


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.zeros(4, dtype=bool), np.zeros((4, 5), dtype=bool)])
def test_block_map_says_which_map_is_wrong(tmp_path, wrong):
    right = np.eye(4, dtype=bool)
    with pytest.raises(ValueError, match="Boolean matrix.*Got .* for the ever active one.*np.zeros"):
        plot_block_map(right, wrong, right, tmp_path / "map.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install hf_dynsparse\[plots\]"):
        plot_training(run_log(), tmp_path / "training.png")


def test_layer_maps(tmp_path):
    sides = {"query": (8, 8), "up": (32, 8), "down": (8, 400)}
    maps = {f"encoder.{name}": block_maps(*grid, density=0.5)[0] for name, grid in sides.items()}
    plot_layer_maps(maps, tmp_path / "wide.png", title="three layers")
    height, width, _ = read_picture(tmp_path / "wide.png").shape
    plot_layer_maps(maps, tmp_path / "tall.png", columns=1)
    taller, narrower, _ = read_picture(tmp_path / "tall.png").shape
    assert taller > 2 * height
    assert narrower < width


def test_a_dense_model_has_no_layer_map(tmp_path):
    with pytest.raises(ValueError, match="must hold at least one layer. Got none"):
        plot_layer_maps({}, tmp_path / "none.png")
