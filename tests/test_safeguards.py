"""A long run goes on when a save fails, and stops before a number that is not finite does harm."""

import logging
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from hf_dynsparse import sparse_layers
from hf_dynsparse.checkpoint import STAGING_FOLDER
from tests.test_checkpoint import SAVING, assert_same_checkpoint, trainer_of
from tests.toy import toy_model, toy_trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer_of(folder, max_steps=6).train()
    return folder


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


# What fails is the configuration, the weights, and the optimiser.
@pytest.mark.parametrize("limit", [0, 8_000, "weights"])
@pytest.mark.usefixtures("no_progress_bars")
def test_a_full_disk_costs_one_checkpoint(tmp_path, undisturbed, caplog, limit):
    weights = (undisturbed / "checkpoint-6" / "model.safetensors").stat().st_size
    trainer = trainer_of(tmp_path, max_steps=6)
    full_disk_at(4, trainer, weights + 100 if limit == "weights" else limit)
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
    toy_trainer(tmp_path, toy_model(), **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    """The first has no disk in step 4, the second a loss of NaN in step 5: neither waits for the other for ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    # Gloo may abort a process that has done its work, in its last moments: what the ranks wrote counts.
    assert sorted(tmp_path.glob("rank-*")) == [tmp_path / "rank-0", tmp_path / "rank-1"], done.stderr[-4000:]
    assert f"while saving checkpoint-4 in {tmp_path}/run" in done.stderr
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}").read_text()
        assert said.startswith("Loss and gradients must be finite.")
        assert (
            f"in step 5. Weights and topology are as after the step before; the last checkpoint is {tmp_path}" in said
        )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def run_rank(folder):
    transformers_logging.disable_progress_bar()
    # Then transformers itself lets the ranks meet amid a save.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    trainer = toy_trainer(folder / "run", toy_model(), **SAVING, max_steps=6, eval_steps=2, **best)
    if trainer.args.process_index == 0:
        full_disk_at(4, trainer, 8_000)
    else:
        poison(trainer, 5, math.nan)
    try:
        trainer.train()
    except FloatingPointError as error:
        (folder / f"rank-{trainer.args.process_index}").write_text(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
