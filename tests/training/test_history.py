"""The history of a topology and the pictures of it, against the run that they tell of."""

import io
import logging
import shutil

import numpy as np
import pytest
from toy import toy_model, toy_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_dynsparse import sparse_layers
from hf_dynsparse.reports.pictures.blocks import KINDS, changes, colours_of_kinds, mean_of_squares, paint_blocks
from hf_dynsparse.topology.frames import (
    HISTORY_FOLDER,
    Frame,
    history_files,
    read_history,
    read_layers,
    write_frame,
)
from hf_dynsparse.training.callbacks import history
from hf_dynsparse.training.callbacks.history import TopologyHistory


LAYER = "bert.encoder.layer.0.intermediate.dense"
UPDATES = [0, 3, 6, 9]  # steps of the frames


class Watcher(TrainerCallback):
    """The block map of every layer after every step, marked block by block."""

    def __init__(self):
        self.maps = {}

    def note(self, state, model):
        for name, layer in sparse_layers(model).items():
            block_map = np.zeros(layer.grid, dtype=bool)
            for block in layer.block_index.tolist():
                block_map[divmod(block, layer.grid[1])] = True
            self.maps[name, state.global_step] = block_map

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.note(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.note(state, model)


def train(folder, layer=None, resume=None, **arguments):
    """A run of twelve steps with a history; the trainer and what was watched."""
    trainer = toy_trainer(folder, **arguments)
    trainer.add_callback(TopologyHistory(trainer, layer))
    watcher = Watcher()
    trainer.add_callback(watcher)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, watcher.maps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that reports to TensorBoard and saves every step: folder, log, block maps. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer, maps = train(folder, report_to="tensorboard", save_strategy="steps", save_steps=1)
    return folder, trainer.state.log_history, maps


@pytest.fixture(scope="module")
def events(finished):
    """What TensorBoard reads of that run."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    (file,) = finished[0].glob("runs/*/events.*")
    return accumulator.EventAccumulator(str(file), {"scalars": 0, "images": 0}).Reload()


def assert_same_history(folder, expected):
    for frame, other in zip(read_history(folder), read_history(expected), strict=True):
        assert (frame.layer, frame.update, frame.step) == (other.layer, other.update, other.step)
        np.testing.assert_array_equal(frame.block_map, other.block_map)


def test_frames_are_the_block_maps_of_the_run(finished):
    folder, _, maps = finished
    frames = read_history(folder)
    assert [(frame.layer, frame.update, frame.step) for frame in frames] == [
        (LAYER, update, step) for update, step in enumerate(UPDATES)
    ]
    for frame, following in zip(frames, [*UPDATES[1:], 13], strict=True):
        for step in range(frame.step, following):
            np.testing.assert_array_equal(frame.block_map, maps[LAYER, step])
    assert len({frame.block_map.tobytes() for frame in frames}) == 4


def test_all_layers_are_kept(finished, monkeypatch, tmp_path):
    folder, _, maps = finished
    layers = read_layers(folder)
    assert layers.keys() == {name for name, _ in maps}
    for name, frames in layers.items():
        assert [(frame.layer, frame.step) for frame in frames] == [(name, step) for step in UPDATES]
        for frame in frames:
            np.testing.assert_array_equal(frame.block_map, maps[name, frame.step])
    monkeypatch.setattr(history, "ALL_LAYERS", 1000)  # blocks; the toy has 1024
    trainer = toy_trainer(tmp_path)
    callback = TopologyHistory(trainer)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert list(read_layers(tmp_path)) == [LAYER]


def test_history_is_small(finished):
    assert all(file.stat().st_size < 3000 for file in history_files(finished[0]))
    assert {path.suffix for path in (finished[0] / HISTORY_FOLDER).iterdir()} == {".npz"}


def test_scalars_reach_tensorboard(finished, events):
    log = [entry for entry in finished[1] if "loss" in entry]
    names = {name for entry in log for name in entry if name.startswith("dynsparse/")}
    assert names >= {f"dynsparse/{name}" for name in ("flops", "tokens_per_second", "coverage", "newborn_share")}
    for name in ("loss", "learning_rate", *names):
        logged = [(entry["step"], entry[name]) for entry in log if name in entry]
        read = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        np.testing.assert_allclose(read, logged, rtol=1e-6, err_msg=name)


def test_pictures_reach_tensorboard(finished, events):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    frames = read_history(finished[0])
    pictures = events.Images(f"topology/{LAYER}")
    assert [picture.step for picture in pictures] == UPDATES
    for picture, frame, change in zip(pictures, frames, changes(frames), strict=True):
        pixels = np.asarray(image.open(io.BytesIO(picture.encoded_image_string)))
        np.testing.assert_array_equal(pixels, paint_blocks(frame.block_map, *change))


def test_resume_writes_the_same_frames(finished, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "again", ignore=shutil.ignore_patterns("runs"))
    # As after a kill amid the frame of step 9, which was never saved; and one of a step that is not an update.
    for number in range(6, 13):
        shutil.rmtree(again / f"checkpoint-{number}")
    (again / HISTORY_FOLDER / "step-000000009.npz").write_bytes(b"half a fra")
    write_frame(again, Frame(LAYER, 4, 11, np.ones((16, 8), dtype=bool)))
    (again / HISTORY_FOLDER / ".unfinished").write_bytes(b"hal")
    train(again, resume=again / "checkpoint-5")
    assert_same_history(again, finished[0])


def test_resume_in_another_folder_begins_there(finished, tmp_path):
    train(tmp_path / "other", resume=finished[0] / "checkpoint-5")
    later, all_frames = read_history(tmp_path / "other"), read_history(finished[0])
    assert [(frame.update, frame.step) for frame in later] == [(1, 5), (2, 6), (3, 9)]
    for frame, other in zip(later, all_frames[1:], strict=True):
        np.testing.assert_array_equal(frame.block_map, other.block_map)


def test_another_run_in_the_folder_and_another_layer(finished, tmp_path):
    write_frame(tmp_path, Frame("old", 9, 4, np.ones((2, 2), dtype=bool)))
    layer = "bert.encoder.layer.1.output.dense"
    _, maps = train(tmp_path, layer=layer)
    frames = read_history(tmp_path)
    assert [(frame.layer, frame.step) for frame in frames] == [(layer, step) for step in UPDATES]
    for frame in frames:
        np.testing.assert_array_equal(frame.block_map, maps[layer, frame.step])


def test_a_layer_that_changes_its_size(tmp_path):
    _, maps = train(tmp_path, method="gmp")
    frames = read_history(tmp_path)
    assert len(frames) > 2
    for frame in frames[1:]:
        np.testing.assert_array_equal(frame.block_map, maps[LAYER, frame.step])
    counts = [int(frame.block_map.sum()) for frame in frames]
    assert counts[0] > counts[-1] == 32
    assert counts == sorted(counts, reverse=True)


def test_a_static_run_has_one_frame(tmp_path):
    _, maps = train(tmp_path, num_topology_updates=0, max_steps=2)
    (frame,) = read_history(tmp_path)
    assert (frame.update, frame.step) == (0, 0)
    np.testing.assert_array_equal(frame.block_map, maps[LAYER, 2])


def test_a_disk_that_fails_costs_no_run(tmp_path, caplog):
    (tmp_path / HISTORY_FOLDER).write_text("no folder")
    with caplog.at_level(logging.WARNING):
        trainer, _ = train(tmp_path, max_steps=5, num_topology_updates=1)
    assert trainer.state.global_step == 5
    warnings = [record.message for record in caplog.records if "missing in the history" in record.message]
    assert len(warnings) == 2
    assert HISTORY_FOLDER in warnings[0]


def test_other_ranks_write_nothing(tmp_path):
    trainer = toy_trainer(tmp_path)
    history = TopologyHistory(trainer)
    state = TrainerState(is_world_process_zero=False)
    history.on_train_begin(trainer.args, state, TrainerControl(), model=trainer.model)
    trainer.topology.metrics["topology_updates"] = 1
    history.on_step_end(trainer.args, state, TrainerControl(), model=trainer.model)
    assert history_files(tmp_path) == []


def test_refusals(tmp_path):
    trainer = toy_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`layer` must be a sparse layer of the model. Got 'pooler'. Choose one of"):
        TopologyHistory(trainer, "pooler")
    dense = toy_trainer(tmp_path, toy_model(sparsity=0.0))
    with pytest.raises(ValueError, match="a trainer that updates a topology. Got one without"):
        TopologyHistory(dense)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_a_damaged_frame_is_named(tmp_path, content):
    write_frame(tmp_path, Frame("x", 0, 0, np.ones((2, 3), dtype=bool)))
    (file,) = history_files(tmp_path)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"must be whole. Got {file}.* Delete it"):
        read_history(tmp_path)


def test_changes():
    maps = np.array([[[1, 0, 0]], [[0, 1, 0]], [[1, 0, 0]]], dtype=bool)
    found = [(new.tolist(), ever.tolist()) for new, ever in changes([Frame("x", 0, 0, each) for each in maps])]
    assert found == [
        ([[False, False, False]], [[True, False, False]]),
        ([[False, True, False]], [[True, True, False]]),
        ([[True, False, False]], [[True, True, False]]),
    ]


def test_colours():
    active, newborn, ever_active = (np.array([row], dtype=bool) for row in ([0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]))
    picture = paint_blocks(active, newborn, ever_active)
    assert picture.shape == (128, 512, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[64, 64::128], colours_of_kinds())
    assert ["#" + bytes(colour).hex().upper() for colour in picture[64, 64::128]] == list(KINDS.values())


def test_a_large_layer_is_averaged():
    active = np.zeros((300, 600), dtype=bool)
    active[:3, :3] = np.eye(3)
    picture = paint_blocks(active, np.zeros_like(active), active)
    assert picture.shape == (200, 400, 3)  # cells of 3 x 3 blocks, 2 x 2 pixels each
    never, _, always, _ = colours_of_kinds()
    np.testing.assert_allclose(picture[0, 0], (6 * never + 3 * always) / 9, atol=0.5)
    np.testing.assert_array_equal(picture[50, 50], never)


def test_means_of_cut_squares():
    blocks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    np.testing.assert_allclose(mean_of_squares(blocks, 2), [[0.75, 0.5], [0.5, 1.0]])
