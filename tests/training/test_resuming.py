"""Stop and resume: bit for bit, from any step, after any crash, and only with the run of the checkpoint."""

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, TrainerCallback, TrainerState

from hf_dynsparse import sparse_layers
from hf_dynsparse.checkpoints.saved_run import CHECKSUM_FILE, STAGING_FOLDER, last_checkpoint
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed, with a checkpoint at every second of its twelve steps. Not to be changed."""
    trainer = trainer_of(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


def checkpoint_of(trainer, step):
    return str(Path(trainer.args.output_dir, f"checkpoint-{step}"))


# Two epochs of six steps, updates after steps 3, 6 and 9. A stop at 2 is in the middle of an epoch, right before an
# update and followed by the end of the epoch; one at 6 is that end and right after an update.
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({}, 2),
        ({}, 6),
        ({"regrow_rule": "gradient", "prune_score": "gradient", "readmit": True}, 6),
        ({"regrow_rule": "unfired", "regrow_std": 0.01, "prune_score": "movement"}, 4),
        ({"regrow_rule": "gradient", "gradient_accumulation_steps": 2, "group_lasso": 0.1}, 2),
        ({"seq_length_schedule": "4:0.3,16", "mlm_probability_schedule": "0.3:0.1", "prune_score": "saliency"}, 4),
        ({"topology_update_every": 2, "num_topology_updates": None, "eval_strategy": "steps", "eval_steps": 3}, 4),
    ],
    ids=["random-2", "random-6", "gradient", "unfired", "accumulation", "easy first", "every"],
)
def test_resume_is_bit_exact(tmp_path, straight, settings, stop):
    whole = trainer_of(tmp_path / "straight", **settings) if settings else straight
    if settings:
        whole.train()
    folder = Path(whole.args.output_dir)
    assert whole.topology.metrics["topology_updates"] >= 3
    resumed = trainer_of(tmp_path / "resumed", seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert_same_checkpoint(folder / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12")
    for name, ever in whole.topology.ever_active.items():
        assert torch.equal(ever, resumed.topology.ever_active[name])
    assert resumed.topology.metrics == whole.topology.metrics
    finished = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert finished[0].keys() == finished[1].keys()
    assert all(torch.equal(tensor, finished[1][name]) for name, tensor in finished[0].items())


def test_the_same_trainer_can_resume(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=6)
    trainer.train()
    (tmp_path / "checkpoint-6").rename(tmp_path / "straight")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "checkpoint-6")


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
    trainer = trainer_of(tmp_path, max_steps=6)
    trainer.add_callback(watch := LoadEverySave(tmp_path, caplog))
    trainer.train()
    transformers.logging.disable_propagation()
    assert watch.loaded == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pruning_ratio": 0.3}, r"pruning_ratio: 0.3 \(checkpoint: 0.5\)"),
        ({"regrow_rule": "gradient"}, r"regrow_rule: 'gradient' \(checkpoint: 'random'\)"),
        ({"num_topology_updates": 2, "seed": 1}, r"num_topology_updates: 2 \(checkpoint: 3\).* seed: 1"),
        ({"group_lasso": 0.1}, r"group_lasso: 0.1 \(checkpoint: 0.0\)"),
    ],
)
def test_other_topology_settings_are_refused(tmp_path, straight, changed, named):
    with pytest.raises(ValueError, match=f"{named}.*Give the checkpoint's values"):
        toy_trainer(tmp_path, toy_model(), **changed).train(resume_from_checkpoint=checkpoint_of(straight, 2))


def test_resuming_a_run_without_updates_says_so(tmp_path, caplog):
    plain = trainer_of(tmp_path / "plain", num_topology_updates=0, max_steps=2)
    plain.remove_callback(plain.topology)
    plain.train()
    resumed = trainer_of(tmp_path / "resumed", max_steps=6)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert "was not written by a run with topology updates" in caplog.text
    assert resumed.topology.metrics["topology_updates"] == 3


def test_a_crash_while_saving(tmp_path, straight, monkeypatch, caplog):
    """By a mistake in a program, which no later save would make up for. A killed process: tests/invariants."""
    crashing = trainer_of(tmp_path)
    write = crashing._save_optimizer_and_scheduler

    def crash(*args):
        if crashing.state.global_step == 6:
            raise TypeError("crash")
        write(*args)

    monkeypatch.setattr(crashing, "_save_optimizer_and_scheduler", crash)
    with pytest.raises(TypeError, match="crash"):
        crashing.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / STAGING_FOLDER / "checkpoint-6").exists()

    resumed = trainer_of(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert f"{STAGING_FOLDER} holds a save that was interrupted; it is removed" in caplog.text
    assert not (tmp_path / STAGING_FOLDER).exists()
    assert_same_checkpoint(Path(checkpoint_of(straight, 12)), tmp_path / "checkpoint-12")


@pytest.fixture
def checkpoint(straight, tmp_path):
    """One of a run that nothing disturbed, to be damaged."""
    return shutil.copytree(checkpoint_of(straight, 10), tmp_path / "checkpoint-10")


def test_a_resumed_run_keeps_its_new_checkpoints(tmp_path, straight, caplog):
    """The old ones were copied: their times are later than those of all that is saved now."""
    for step in (8, 10, 12):
        shutil.copytree(checkpoint_of(straight, step), tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (time.time() + 3600,) * 2)
    resume = str(tmp_path / "checkpoint-10")
    trainer_of(tmp_path, seed=1, save_total_limit=2).train(resume_from_checkpoint=resume)
    assert f"begins at step 10, and {tmp_path / 'checkpoint-12'} of another is there already" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-12"}
    assert (tmp_path / "checkpoint-12").stat().st_mtime < time.time() + 60


@pytest.mark.parametrize(
    ("name", "resume"), [("optimizer.pt", str), ("trainer_state.json", lambda _: True), ("model.safetensors", str)]
)
def test_a_damaged_checkpoint_is_not_resumed(tmp_path, checkpoint, name, resume):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    trainer = trainer_of(tmp_path, seed=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"checkpoint-10.*{name}|`.*{name}"):
        trainer.train(resume_from_checkpoint=resume(checkpoint))
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_an_older_checkpoint_has_no_checksums(tmp_path, straight, checkpoint, caplog):
    (checkpoint / CHECKSUM_FILE).unlink()
    trainer_of(tmp_path, seed=1).train(resume_from_checkpoint=str(checkpoint))
    assert f"{checkpoint} carries no checksums of its training state" in caplog.text
    assert_same_checkpoint(Path(checkpoint_of(straight, 12)), tmp_path / "checkpoint-12")
