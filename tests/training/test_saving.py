"""
A checkpoint exists whole or not at all. A long run goes on when a save fails, and stops before a number that is not
finite does harm. Killed processes, and two ranks of which one fails: tests/invariants.

`DYNSPARSE_ROUNDS=20 pytest tests/training/test_saving.py -k small_disk` fills a disk to twenty levels.
"""

import logging
import math
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_resuming import SAVING, assert_same_checkpoint, trainer_of
from transformers.utils import logging as transformers_logging

from hf_dynsparse import sparse_layers
from hf_dynsparse.checkpoints.saved_run import CHECKSUM_FILE, STAGING_FOLDER, last_checkpoint
from hf_dynsparse.training.saving import publish_checkpoint, remove_interrupted_save, rotate_checkpoints
from tests.small_disk import small_disk
from tests.toy import toy_model, toy_trainer


ROUNDS = int(os.environ.get("DYNSPARSE_ROUNDS", "2"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer_of(folder, max_steps=6).train()
    return folder


def staged(run_dir, name, text):
    folder = run_dir / STAGING_FOLDER / name
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)


def test_publish_and_replace(tmp_path):
    for text in ("old", "new"):
        staged(tmp_path, "checkpoint-3", text)
        publish_checkpoint(tmp_path, "checkpoint-3")
        assert (tmp_path / "checkpoint-3" / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    staged(tmp_path, "checkpoint-3", "old")
    publish_checkpoint(tmp_path, "checkpoint-3")
    staged(tmp_path, "checkpoint-3", "new")
    calls, fsync, replace = [], os.fsync, os.replace

    def watch_fsync(descriptor):
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def watch_replace(source, target):
        calls.append(f"to {os.path.relpath(target, tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    publish_checkpoint(tmp_path, "checkpoint-3")
    new = f"{STAGING_FOLDER}/checkpoint-3"
    assert calls == [f"{new}/file", new, f"to {new}.replaced", "to checkpoint-3", "."]


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (2, (), [12, 16]),
        (2, ("checkpoint-2",), [2, 16]),
        (1, ("checkpoint-2", "checkpoint-8"), [2, 8, 16]),
        (1, (), [16]),
        (4, (), [2, 8, 12, 16]),
        (None, (), [2, 8, 12, 16]),
        (0, (), [2, 8, 12, 16]),
    ],
)
def test_the_lowest_steps_go_first_whatever_the_clock_says(tmp_path, monkeypatch, limit, keep, left):
    others = ["checkpoint-4-of-mine", "checkpoint-best"]
    for age, name in enumerate([*(f"checkpoint-{step}" for step in (16, 12, 8, 2)), *others]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1000.0 * age, 1000.0 * age))
    monkeypatch.chdir(tmp_path)
    rotate_checkpoints(tmp_path, limit, keep)
    assert {path.name for path in tmp_path.iterdir()} == {*(f"checkpoint-{step}" for step in left), *others}


def test_publishing_nothing_changes_nothing(tmp_path):
    (tmp_path / STAGING_FOLDER).mkdir()
    with pytest.raises(FileNotFoundError):
        publish_checkpoint(tmp_path, "checkpoint-3")
    assert not (tmp_path / "checkpoint-3").exists()


def test_an_interrupted_save_is_removed_with_a_warning(tmp_path, caplog):
    staged(tmp_path, "checkpoint-3", "whole")
    publish_checkpoint(tmp_path, "checkpoint-3")
    remove_interrupted_save(tmp_path)
    assert not caplog.records
    staged(tmp_path, "checkpoint-6", "half")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    remove_interrupted_save(tmp_path)
    assert "interrupted" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_interrupted_replacement_is_undone(tmp_path):
    staged(tmp_path, "checkpoint-3", "old")
    publish_checkpoint(tmp_path, "checkpoint-3")
    staged(tmp_path, "checkpoint-3", "new")
    # Killed between the two renames.
    (tmp_path / "checkpoint-3").rename(tmp_path / STAGING_FOLDER / "checkpoint-3.replaced")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "file").read_text() == "old"
    remove_interrupted_save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_saving_leaves_only_checkpoints(tmp_path):
    trainer_of(tmp_path, max_steps=6, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} >= FILES


def full_disk_at(step, trainer, limit):
    """No file of more than `limit` bytes can be written during the save of that step: real errors of the system."""
    save = trainer._save_checkpoint

    def save_in_little_space(*args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer._save_checkpoint = save_in_little_space


@pytest.fixture
def no_progress_bars():
    """They go to a file, too."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.mark.usefixtures("no_progress_bars")
def test_a_full_disk_costs_one_checkpoint(tmp_path, undisturbed, caplog):
    weights = (undisturbed / "checkpoint-6" / "model.safetensors").stat().st_size
    trainer = trainer_of(tmp_path, max_steps=6)
    full_disk_at(4, trainer, weights + 100)
    trainer.train()
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert error.startswith("A checkpoint must be written whole. Got ")
    assert f"while saving checkpoint-4 in {tmp_path}, with " in error
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-2'}. Training goes on" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    assert_same_checkpoint(undisturbed / "checkpoint-6", tmp_path / "checkpoint-6")


@pytest.mark.usefixtures("no_progress_bars")
def test_a_full_disk_at_the_end_is_an_error(tmp_path, undisturbed):
    trainer = trainer_of(tmp_path, max_steps=6)
    full_disk_at(6, trainer, 8_000)
    with pytest.raises(OSError, match=f"last good checkpoint is {tmp_path}/checkpoint-4. The run has ended"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for name, tensor in load_file(undisturbed / "checkpoint-6" / "model.safetensors").items():
        if not name.endswith(("ever_active", "active_since")):
            assert torch.equal(trainer.model.state_dict()[name], tensor)


@pytest.mark.parametrize("level", range(ROUNDS))
@pytest.mark.usefixtures("no_progress_bars")
def test_a_small_disk_costs_one_checkpoint_at_most(tmp_path, undisturbed, level):
    """It is full when a share of the second save has been written; the run ends well, and another goes on from it."""
    whole = sum(file.stat().st_size for file in (undisturbed / "checkpoint-4").iterdir())
    # Between the levels of the weights and the moments, which are nearly all, lie those of the small files.
    room = whole * (level + 1) // (ROUNDS + 1) if level % 2 else whole - 2_000 * (level + 1)
    trainer = trainer_of(tmp_path, max_steps=6)
    save = trainer._save_checkpoint

    def save_in_little_space(*args):
        if trainer.state.global_step != 4:
            save(*args)
            return
        with small_disk(lambda path: max(0, room - used(tmp_path / STAGING_FOLDER))):
            save(*args)

    trainer._save_checkpoint = save_in_little_space
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    assert_same_checkpoint(undisturbed / "checkpoint-6", tmp_path / "checkpoint-6")

    shutil.rmtree(tmp_path / "checkpoint-6")  # as if it had been killed
    trainer_of(tmp_path, seed=1, max_steps=6).train(resume_from_checkpoint=True)
    assert_same_checkpoint(undisturbed / "checkpoint-6", tmp_path / "checkpoint-6")


def used(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer as if amid a run, with a checkpoint at step 2."""
    trainer = trainer_of(tmp_path_factory.mktemp("trained"), max_steps=2, num_topology_updates=1)
    trainer.train()
    trainer.control.should_training_stop = False
    trainer.state.max_steps, trainer.state.global_step = 6, 3
    return trainer


def save_again(trainer, caplog):
    """Save without a success; returns what is said of it."""
    folder = Path(trainer.args.output_dir)
    caplog.clear()
    trainer._save_checkpoint(trainer.model, None)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f"while saving checkpoint-3 in {folder}" in error.getMessage()
    assert f"The last good checkpoint is {folder / 'checkpoint-2'}. Training goes on" in error.getMessage()
    return error


FILES = {
    *("config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("tokenizer_config.json", "trainer_state.json", CHECKSUM_FILE),
}


@pytest.mark.parametrize(("name", "share"), [(name, i % 2 / 2) for i, name in enumerate(sorted(FILES))])
@pytest.mark.usefixtures("no_progress_bars")
def test_any_file_of_a_save_may_fail(trained, caplog, name, share):
    """The disk is full when the file is begun, or half-way through it: every other file in this way."""
    checkpoint = Path(trained.args.output_dir, "checkpoint-2")
    assert {path.name for path in checkpoint.iterdir()} - {"tokenizer.json"} == FILES  # which Rust writes
    limit = int((checkpoint / name).stat().st_size * share)
    with small_disk(lambda path: limit if path.name.strip(".").startswith(name) else 1 << 30):
        save_again(trained, caplog)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("basic_ios::clear: iostream error"),
        SafetensorError("Error while serializing: whatever"),
        MemoryError(),
        ValueError("I/O operation on closed file"),
        Exception("as tokenizers raise it"),
        OSError("Input/output error"),
    ],
    ids=repr,
)
def test_whatever_writing_raises_costs_one_checkpoint(trained, caplog, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    said = save_again(trained, caplog)
    assert f"Got {type(error).__name__}: {error}" in said.getMessage()
    # Where it is not plainly of the disk, the log shows the place.
    assert (said.exc_info is None) == isinstance(error, OSError)
    monkeypatch.setattr(trained.state, "max_steps", 3)
    with pytest.raises(OSError, match="The run has ended and its model is in memory"):
        trained._save_checkpoint(trained.model, None)


@pytest.mark.parametrize("error", [TypeError("mistake"), KeyError("mistake"), AttributeError("mistake")], ids=repr)
def test_a_mistake_in_a_program_is_raised(trained, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(trained, "_save_rng_state", fail)
    with pytest.raises(type(error), match="mistake"):
        trained._save_checkpoint(trained.model, None)


@pytest.mark.parametrize(
    ("writer", "lacking"),
    [
        ("save_model", "model.safetensors"),
        ("_save_optimizer_and_scheduler", "optimizer.pt"),
        ("_save_rng_state", "rng_state.pth"),
    ],
)
def test_nothing_is_published_that_lacks_a_part(trained, caplog, monkeypatch, writer, lacking):
    monkeypatch.setattr(trained, writer, lambda folder, *args, **kwargs: os.makedirs(folder, exist_ok=True))
    said = save_again(trained, caplog).getMessage()
    assert re.search(rf"A checkpoint must be whole. Got .*checkpoint-3 without {lacking}", said)


def test_a_checkpoint_of_weights_alone(tmp_path):
    trainer_of(tmp_path, max_steps=2, num_topology_updates=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="without optimizer.pt.* take those for the start of a new run"):
        trainer_of(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.usefixtures("no_progress_bars")
def test_a_failed_save_is_not_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    trainer = trainer_of(tmp_path, max_steps=6, eval_steps=2, learning_rate=1e-2, **best)
    full_disk_at(4, trainer, 8_000)
    losses = iter((3.0, 1.0, 2.0))
    evaluate = trainer._evaluate
    trainer._evaluate = lambda *args: {**evaluate(*args), "eval_loss": next(losses)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for name, tensor in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items():
        if not name.endswith(("ever_active", "active_since")):
            assert torch.equal(trainer.model.state_dict()[name], tensor)


def test_a_folder_that_stops_being_writable(tmp_path, undisturbed, caplog):
    trainer = trainer_of(tmp_path, max_steps=6)
    save = trainer._save_checkpoint
    staging = tmp_path / STAGING_FOLDER

    def save_in_a_bad_place(*args):  # as root may write anywhere, except into a file as if it were a folder
        staging.touch() if trainer.state.global_step == 2 else staging.unlink(missing_ok=True)
        save(*args)

    trainer._save_checkpoint = save_in_a_bad_place
    trainer.train()
    assert f"while saving checkpoint-2 in {tmp_path}" in caplog.text
    assert "No checkpoint has been saved yet. Training goes on" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert_same_checkpoint(undisturbed / "checkpoint-6", tmp_path / "checkpoint-6")


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match=f"A run needs a folder to save to. Got .*{tmp_path}/run.*`save_strategy='no'`"):
        trainer.train()
    assert trainer.state.global_step == 0


def poison(trainer, step, where):
    """Make a number of that step infinite or NaN: the loss of its last micro-batch, or one entry of a gradient."""
    layer = sparse_layers(trainer.model)["bert.encoder.layer.1.output.dense"]
    compute_loss = trainer.compute_loss

    def compute_bad_loss(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        last = trainer.accelerator.sync_gradients and trainer.state.global_step == step - 1
        return loss * where if last and args[0].training and isinstance(where, float) else loss

    def make_bad(gradient):
        if trainer.state.global_step == step - 1 and where == "gradient":
            return gradient.index_fill(0, torch.tensor([3]), math.inf)
        return gradient

    trainer.compute_loss = compute_bad_loss
    layer.values.register_hook(make_bad)


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        (math.nan, {"gradient_accumulation_steps": 2}),
        (math.inf, {"max_grad_norm": 0.0}),
        ("gradient", {}),
    ],
)
def test_training_stops_before_a_number_that_is_not_finite(tmp_path, where, settings):
    """In step 5, after the save of step 4; the third update would follow it."""
    settings = {**SAVING, **settings, "max_steps": 6, "regrow_rule": "gradient"}
    trainer = toy_trainer(tmp_path, toy_model(), **settings)
    poison(trainer, 5, where)
    with pytest.raises(FloatingPointError, match=f"in step 5. .* checkpoint is {tmp_path}/checkpoint-4. Lower"):
        trainer.train()
    assert trainer.topology.metrics["topology_updates"] == 2
    for name, tensor in load_file(tmp_path / "checkpoint-4" / "model.safetensors").items():
        if not name.endswith(("ever_active", "active_since")):
            assert torch.equal(trainer.model.state_dict()[name], tensor)
