"""Stop and resume: bit for bit, from any step, after any crash."""

import logging
import os
import re
import shutil
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_dynsparse import DynSparseTrainer, sparse_layers
from hf_dynsparse.checkpoints.saving import (
    CHECKSUM_FILE,
    STAGING_FOLDER,
    check_training_state,
    last_checkpoint,
    publish_checkpoint,
    remove_interrupted_save,
    rotate_checkpoints,
)
from tests.toy import toy_model, toy_trainer


SAVING = {"save_strategy": "steps", "save_steps": 2}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
OF_THE_CLOCK = ("runtime", "_per_second")


def trainer_of(folder, seed=0, **overrides):
    return toy_trainer(folder, toy_model(seed, **DROPOUT), **{**SAVING, **overrides})


def history(checkpoint):
    log = TrainerState.load_from_json(checkpoint / "trainer_state.json").log_history
    return [{name: value for name, value in entry.items() if not name.endswith(OF_THE_CLOCK)} for entry in log]


def assert_same_checkpoint(one, other):
    """Parameters, block index, exploration buffers, moments, schedule, metrics and history, bit for bit."""
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    assert sum(name.endswith(("ever_active", "active_since", "block_index")) for name in left) == 36
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    left, right = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (one, other))
    assert left.keys() == right.keys()
    for parameter, state in left.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, right[parameter][name]), (parameter, name)
    assert torch.load(one / "scheduler.pt") == torch.load(other / "scheduler.pt")
    assert history(one) == history(other)
    states = [TrainerState.load_from_json(path / "trainer_state.json") for path in (one, other)]
    assert states[0].stateful_callbacks["TopologyCallback"] == states[1].stateful_callbacks["TopologyCallback"]
    assert states[0].total_flos == states[1].total_flos


# Two epochs of six steps, updates after steps 3, 6 and 9. A stop at 2 is in the middle of an epoch, right before an
# update and followed by the end of the epoch; one at 6 is that end and right after an update.
@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({"regrow_rule": "random"}, (2, 4, 6, 8)),
        ({"regrow_rule": "gradient", "prune_score": "gradient", "readmit": True}, (2, 6)),
        ({"regrow_rule": "unfired", "regrow_std": 0.01}, (2, 6)),
        ({"regrow_rule": "gradient", "gradient_accumulation_steps": 2, "group_lasso": 0.1}, (2, 6)),
        ({"topology_update_every": 2, "num_topology_updates": None, "eval_strategy": "steps", "eval_steps": 3}, (4,)),
    ],
    ids=["random", "gradient", "unfired", "accumulation", "every"],
)
def test_resume_is_bit_exact(tmp_path, settings, stops):
    straight = trainer_of(tmp_path / "straight", **settings)
    straight.train()
    assert straight.topology.metrics["topology_updates"] >= 3
    for stop in stops:
        resumed = trainer_of(tmp_path / f"from-{stop}", seed=1, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert_same_checkpoint(tmp_path / "straight" / "checkpoint-12", tmp_path / f"from-{stop}" / "checkpoint-12")
        for name, ever in straight.topology.ever_active.items():
            assert torch.equal(ever, resumed.topology.ever_active[name])
        assert resumed.topology.metrics == straight.topology.metrics
        finished = [trainer.model.state_dict() for trainer in (straight, resumed)]
        assert finished[0].keys() == finished[1].keys()
        assert all(torch.equal(tensor, finished[1][name]) for name, tensor in finished[0].items())


def test_the_same_trainer_can_resume(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    (tmp_path / "checkpoint-12").rename(tmp_path / "straight")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "checkpoint-12")


class LoadEverySave(TrainerCallback):
    """Loads each checkpoint as a user would, while the run goes on."""

    def __init__(self, folder, caplog):
        self.folder, self.caplog, self.loaded = folder, caplog, 0

    def on_save(self, args, state, control, **kwargs):
        self.caplog.clear()
        folder = self.folder / f"checkpoint-{state.global_step}"
        other, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not [record.message for record in self.caplog.records if record.levelno >= logging.WARNING]
        model = kwargs["model"].eval()
        for name, layer in sparse_layers(model).items():
            assert torch.equal(sparse_layers(other)[name].block_index, layer.block_index)
        ids = torch.arange(5, 25).view(2, 10)
        assert torch.equal(other(ids).logits, model(ids).logits)
        model.train()
        self.loaded += 1


def test_a_checkpoint_is_a_plain_model_in_mid_run(tmp_path, caplog):
    transformers.logging.enable_propagation()
    trainer = trainer_of(tmp_path)
    trainer.add_callback(watch := LoadEverySave(tmp_path, caplog))
    trainer.train()
    transformers.logging.disable_propagation()
    assert watch.loaded == 6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pruning_ratio": 0.3}, r"pruning_ratio: 0.3 \(checkpoint: 0.5\)"),
        ({"regrow_rule": "gradient"}, r"regrow_rule: 'gradient' \(checkpoint: 'random'\)"),
        ({"num_topology_updates": 2, "seed": 1}, r"num_topology_updates: 2 \(checkpoint: 3\).* seed: 1"),
        ({"group_lasso": 0.1}, r"group_lasso: 0.1 \(checkpoint: 0.0\)"),
    ],
)
def test_other_topology_settings_are_refused(tmp_path, changed, named):
    settings = {"seed": 0, "max_steps": 4, "save_steps": 2}
    trainer = toy_trainer(tmp_path, toy_model(), **{**SAVING, **settings})
    trainer.train()
    with pytest.raises(ValueError, match=f"{named}.*Give the checkpoint's values"):
        toy_trainer(tmp_path, toy_model(), **{**SAVING, **settings, **changed}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_resuming_a_run_without_updates_says_so(tmp_path, caplog):
    plain = trainer_of(tmp_path / "plain", num_topology_updates=0)
    plain.remove_callback(plain.topology)
    plain.train()
    resumed = trainer_of(tmp_path / "resumed")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert "was not written by a run with topology updates" in caplog.text
    assert resumed.topology.metrics["topology_updates"] == 3


# The last thing that a save writes, something in the middle, and the move to its place.
@pytest.mark.parametrize("point", ["_save_rng_state", "_save_optimizer_and_scheduler", "publish"])
def test_a_crash_while_saving(tmp_path, monkeypatch, caplog, point):
    straight = trainer_of(tmp_path / "straight")
    straight.train()

    crashing, folder = trainer_of(tmp_path / "crashed"), tmp_path / "crashed"

    def crash(*args, **kwargs):
        if crashing.state.global_step == 6:
            raise TypeError("crash")
        return original(*args, **kwargs)

    if point == "publish":
        original = publish_checkpoint
        monkeypatch.setattr("hf_dynsparse.training.trainer.publish_checkpoint", crash)
    else:
        original = getattr(crashing, point)
        monkeypatch.setattr(crashing, point, crash)
    with pytest.raises(TypeError, match="crash"):  # a mistake, which no later save would make up for
        crashing.train()
    monkeypatch.undo()
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-4")
    assert (folder / STAGING_FOLDER / "checkpoint-6").exists()

    resumed = trainer_of(folder, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert f"{STAGING_FOLDER} holds a save that was interrupted; it is removed" in caplog.text
    assert not (folder / STAGING_FOLDER).exists()
    assert_same_checkpoint(tmp_path / "straight" / "checkpoint-12", folder / "checkpoint-12")


def test_saving_leaves_only_checkpoints(tmp_path):
    trainer = trainer_of(tmp_path, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= {
        path.name for path in (tmp_path / "checkpoint-12").iterdir()
    }
    assert type(trainer) is DynSparseTrainer


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
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
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


@pytest.fixture(scope="module")
def run_of_six(tmp_path_factory):
    """Checkpoints at steps 2, 4 and 6 of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("run_of_six")
    trainer_of(folder, max_steps=6).train()
    return folder


@pytest.fixture
def checkpoint(run_of_six, tmp_path):
    """One of them, to be damaged."""
    return shutil.copytree(run_of_six / "checkpoint-4", tmp_path / "checkpoint-4")


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, os.remove, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_damaged_training_state_is_refused(checkpoint, name, damage):
    check_training_state(checkpoint)
    damage(checkpoint / name)
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))}.*{name}.*: resume from another"):
        check_training_state(checkpoint)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00", '"a"', '{"optimizer.pt": null}'])
def test_damaged_checksums_are_refused(checkpoint, text):
    (checkpoint / CHECKSUM_FILE).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(checkpoint))):
        check_training_state(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_training_state_that_is_not_there_is_missed(checkpoint, name, with_checksums):
    """Also where no checksum tells of it."""
    (checkpoint / CHECKSUM_FILE).write_text("{}") if with_checksums else (checkpoint / CHECKSUM_FILE).unlink()
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))} without {name[:9]}.*: resume from another"):
        check_training_state(checkpoint)


def test_checksums_that_cover_a_part_only_are_refused(checkpoint):
    (checkpoint / CHECKSUM_FILE).write_text("{}")
    with pytest.raises(ValueError, match=f"{CHECKSUM_FILE} without optimizer.pt.*: resume from another"):
        check_training_state(checkpoint)


def test_a_resumed_run_keeps_its_new_checkpoints(tmp_path, run_of_six, caplog):
    """The old ones were copied: their times are later than those of all that is saved now."""
    shutil.copytree(run_of_six, tmp_path, dirs_exist_ok=True)
    for old in tmp_path.iterdir():
        os.utime(old, (time.time() + 3600,) * 2)
    resume = str(tmp_path / "checkpoint-4")
    trainer_of(tmp_path, seed=1, max_steps=6, save_total_limit=2).train(resume_from_checkpoint=resume)
    assert f"begins at step 4, and {tmp_path / 'checkpoint-6'} of another is there already" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert (tmp_path / "checkpoint-6").stat().st_mtime < time.time() + 60


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "model.safetensors"])
@pytest.mark.parametrize("resume", [str, lambda checkpoint: True])
def test_a_damaged_checkpoint_is_not_resumed(tmp_path, checkpoint, name, resume):
    flip_a_bit(checkpoint / name)
    trainer = trainer_of(tmp_path, seed=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"checkpoint-4.*{name}|`.*{name}"):
        trainer.train(resume_from_checkpoint=resume(checkpoint))
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_an_older_checkpoint_has_no_checksums(tmp_path, run_of_six, checkpoint, caplog):
    (checkpoint / CHECKSUM_FILE).unlink()
    trainer_of(tmp_path, seed=1, max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    assert f"{checkpoint} carries no checksums of its training state" in caplog.text
    assert_same_checkpoint(run_of_six / "checkpoint-6", tmp_path / "checkpoint-6")
