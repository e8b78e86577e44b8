"""
A run that is stopped and begun again in the same process, whatever stops it: it begins as the first one did, and ends
at the density that the model was given with.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_arguments, toy_model, toy_trainer
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback

from hf_dynsparse import DynSparseTrainer, TopologyCallback, prune_regrow_, sparse_layers
from hf_dynsparse.optim.moments import check_optimizer_state
from hf_dynsparse.training.scripts import check_updates_to_resume


EVERY_OTHER = {"num_topology_updates": None, "topology_update_every": 2}
METHODS: dict[str, dict[str, Any]] = {
    "gmp": {"density_end": 0.75},
    "granet": {},
    "ac_dc": {"density_schedule": "0:1,0.3:0,0.5:1,0.7:0", **EVERY_OTHER},
    "mst": {"density_schedule": "0:1,0.2:0.5,0.4:0,0.8:1", **EVERY_OTHER},
    "snfs": {},
    "prune_ofa": {"density_end": 0.75, **EVERY_OTHER},
    "dynsparse": {},
    "rigl": {},
}


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """accelerate collects garbage before every attempt; most of the time of a test would go into that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class StopOnce(TrainerCallback):
    """Ends the first attempt at step 6, as an interrupt from the keyboard or a lack of memory does."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error
        self.begun: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(active_entries(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6 and self.error is not None:
            error, self.error = self.error, None
            raise error


def active_entries(model: Any) -> int:
    return sum(layer.values.numel() for layer in sparse_layers(model).values())


def interrupt(trainer: DynSparseTrainer, stop: StopOnce) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()


def repeat(trainer: DynSparseTrainer, stop: StopOnce) -> None:
    stop.error = None
    trainer.train()
    trainer.train()


def run_out_of_memory(trainer: DynSparseTrainer, stop: StopOnce) -> None:
    stop.error = RuntimeError("CUDA out of memory.")
    trainer.train()
    assert trainer._train_batch_size == 3


INTERRUPTIONS: dict[str, Callable[[DynSparseTrainer, StopOnce], None]] = {
    "Ctrl-C": interrupt,
    "second train": repeat,
    "out of memory": run_out_of_memory,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_configured(tmp_path: Path, interruption: str, method: str) -> None:
    arguments = {**METHODS[method], "auto_find_batch_size": interruption == "out of memory", "logging_steps": 12}
    trainer = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), method=method, **arguments)
    given, config = active_entries(trainer.model), trainer.model.config.to_dict()
    every_block = sum(layer.in_features * layer.out_features for layer in sparse_layers(trainer.model).values())
    trainer.add_callback(stop := StopOnce(KeyboardInterrupt()))
    INTERRUPTIONS[interruption](trainer, stop)
    begin = {"granet": 2 * given, "snfs": given, "dynsparse": given, "rigl": given}.get(method, every_block)
    assert stop.begun == [begin, begin]
    assert active_entries(trainer.model) == (every_block if method == "mst" else given)
    for layer in sparse_layers(trainer.model).values():
        layer.layout.validate()
        assert len(check_optimizer_state(trainer.optimizer, layer.values)) == 2
        assert layer.values.isfinite().all()
    if method not in ("granet", "ac_dc", "snfs", "mst"):  # nothing is to be said layer by layer
        assert trainer.model.config.to_dict() == config


class StopEarly(TrainerCallback):
    """Ends the first run at step 2, as early stopping does."""

    stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 2 and not self.stopped
        self.stopped |= state.global_step == 2


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_a_run_that_a_callback_ended_leads_on_to_the_configured_density(tmp_path: Path, method: str) -> None:
    trainer = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), method=method, logging_steps=12)
    given = active_entries(trainer.model)
    trainer.add_callback(StopEarly())
    trainer.train()
    assert active_entries(trainer.model) > given
    trainer.train()
    assert active_entries(trainer.model) == given
    assert trainer.model.config.sparsity == pytest.approx(0.75)


def test_what_is_loaded_anew_or_sized_by_hand_is_respected(tmp_path: Path) -> None:
    """Remembered is the size that a run has changed, by the layers themselves."""
    trainer = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), method="gmp", logging_steps=12)
    trainer.add_callback(StopOnce(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    half = active_entries(trainer.model)
    trainer.save_model()
    # The same model under another trainer goes where it was going.
    again = toy_trainer(tmp_path, trainer.model, method="gmp", logging_steps=12)
    again.train()
    assert {layer.sparsity for layer in sparse_layers(again.model).values()} == {0.75}
    # Without a density schedule a model keeps what it has; a file has no other sizes than its own.
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert active_entries(loaded) == half
    toy_trainer(tmp_path, loaded, logging_steps=12).train()
    assert active_entries(loaded) == half
    toy_trainer(tmp_path, loaded, method="gmp", logging_steps=12).train()
    assert active_entries(loaded) == half
    for layer in sparse_layers(loaded).values():
        prune_regrow_(layer, nnzb=5, pruning_ratio=0.0)
    toy_trainer(tmp_path, loaded, method="gmp", logging_steps=12).train()
    assert {layer.nnzb for layer in sparse_layers(loaded).values()} == {5}


@pytest.mark.parametrize("arguments", [{}, {"final_sparsity": 0.9}], ids=["to", "from"])
def test_a_checkpoint_is_resumed_where_a_run_was_interrupted(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """In the same process, by the same trainer, whose model has other sizes by now; the same as undisturbed."""
    models = []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        arguments |= {"method": "gmp", "density_end": 1.0, "save_strategy": "steps", "save_steps": 4}
        trainer = toy_trainer(folder, toy_model(num_hidden_layers=1), **arguments)
        models.append(trainer.model.state_dict())
        if folder.name == "stopped":
            trainer.add_callback(StopOnce(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        models[-1] = trainer.model.state_dict()
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_the_best_model_takes_its_moments_along(tmp_path: Path) -> None:
    """It may have other sizes than the last, layer by layer; the next run goes on from it."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    saved = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "logging_steps": 12}
    sizes = {"method": "granet", "density_end": 0.3, "num_topology_updates": 11}
    trainer = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), **sizes, **best, **saved)
    given = active_entries(trainer.model)
    for _ in range(2):
        trainer.train()
        assert active_entries(trainer.model) == given
        for layer in sparse_layers(trainer.model).values():
            assert len(check_optimizer_state(trainer.optimizer, layer.values)) == 2


CONSTANT = {"method": "set", "topology_update_every": 3, "num_topology_updates": None}


@pytest.mark.parametrize(
    ("arguments", "steps", "resumed_at", "max_steps", "refused"),
    [
        (
            {"method": "gmp"},
            24,
            8,
            10,
            "Got max_steps=10, but the checkpoint at step 8 is of a run of 24 steps",
        ),
        ({"method": "gmp"}, 12, 7, 24, "with 2 of 3 updates made. Give max_steps=12"),
        ({"method": "gmp"}, 24, 8, 8, "Got max_steps=8"),  # it would pass for finished
        ({}, 12, 7, 24, "Got max_steps=24"),
        ({}, 12, 7, 12, None),
        ({}, 12, 2, 10, None),  # no update yet
        ({}, 12, 12, 24, None),
        ({"method": "gmp"}, 12, 11, 24, None),
        ({"num_topology_updates": 0}, 12, 7, 24, None),
        (CONSTANT, 12, 7, 24, None),  # nothing depends on the number of steps
    ],
)
def test_the_number_of_steps_is_agreed_on(
    tmp_path: Path, arguments: dict[str, Any], steps: int, resumed_at: int, max_steps: int, refused: str | None
) -> None:
    stop = {"save_strategy": "steps", "save_steps": resumed_at, "logging_steps": 24, "lr_scheduler_type": "constant"}
    first = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), max_steps=steps, **arguments, **stop)
    first.train()
    checkpoint = str(tmp_path / f"checkpoint-{resumed_at}")
    index = [layer.block_index for layer in sparse_layers(AutoModelForMaskedLM.from_pretrained(checkpoint)).values()]
    again = toy_trainer(tmp_path / "again", toy_model(num_hidden_layers=1), max_steps=max_steps, **arguments, **stop)
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            check_updates_to_resume(again.args, checkpoint)
        with pytest.raises(ValueError, match=refused):
            again.train(resume_from_checkpoint=checkpoint)
        return
    check_updates_to_resume(again.args, checkpoint)
    again.train(resume_from_checkpoint=checkpoint)
    reached = [layer.block_index for layer in sparse_layers(again.model).values()]
    stays = arguments != CONSTANT and resumed_at > 9 or arguments.get("num_topology_updates") == 0
    assert all(map(torch.equal, index, reached)) == stays
    if resumed_at in (11, 12):  # and its own checkpoints go on likewise
        last = sorted(tmp_path.glob("again/checkpoint-*"))[-1]
        further = toy_trainer(tmp_path / "3", toy_model(num_hidden_layers=1), max_steps=30, **arguments, **stop)
        further.train(resume_from_checkpoint=str(last))
        assert all(map(torch.equal, index, [layer.block_index for layer in sparse_layers(further.model).values()]))
    elif not stays:
        whole = toy_trainer(tmp_path / "2", toy_model(num_hidden_layers=1), max_steps=max_steps, **arguments, **stop)
        whole.train()
        state = whole.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_the_stock_trainer_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    ours = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), method="gmp", save_strategy="steps", save_steps=3)
    ours.train()

    def stock(model: Any, **arguments: Any) -> Trainer:
        args = toy_arguments(tmp_path / "stock", method="gmp", **arguments)
        callbacks = [TopologyCallback(args.topology_settings(), group_lasso=args.group_lasso)]
        data = {"train_dataset": ours.train_dataset, "eval_dataset": ours.eval_dataset}
        return Trainer(model, args, data_collator=ours.data_collator, callbacks=callbacks, **data)

    trainer = stock(toy_model(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"Got `bert\..*values` with \d+ for 16: .* use `DynSparseTrainer`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}
    with pytest.raises(ValueError, match="one process that loads no checkpoint. Got `load_best_model_at_end`"):
        stock(toy_model(num_hidden_layers=1), save_strategy="steps", save_steps=6, **best)


class Freeze(TrainerCallback):
    """Freezes the first sparse layer after step 4."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            next(iter(sparse_layers(kwargs["model"]).values())).values.requires_grad_(False)


@pytest.mark.parametrize("method", ["dynsparse", "rigl-block", "gmp", "granet", "snfs", "prune_ofa"])
def test_a_frozen_layer_keeps_its_blocks(tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments: dict[str, Any] = {"num_topology_updates": None, "topology_update_every": 3, "group_lasso": 0.1}
    if method == "prune_ofa":
        arguments["topology_last_step"] = 0.75
    trainer = toy_trainer(tmp_path, toy_model(num_hidden_layers=1), method=method, logging_steps=12, **arguments)
    given = active_entries(trainer.model)
    frozen, *others = sparse_layers(trainer.model).values()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((frozen.block_index.clone(), frozen.values.detach().clone()))

    trainer.add_callback(Freeze())
    trainer.add_callback(Look())
    before = [layer.block_index.clone() for layer in others]
    trainer.train()
    assert all(torch.equal(seen[3][what], seen[step][what]) for step in range(4, 12) for what in (0, 1))
    assert not frozen.block_index.equal(others[0].block_index)
    assert any(not torch.equal(index, layer.block_index) for index, layer in zip(before, others, strict=True))
    told = [record.getMessage() for record in caplog.records if "leave them as they are" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("1 of 6 sparse layers, first `bert.encoder.layer.0.attention.self.query`, are frozen")
    if method in ("granet", "snfs", "dynsparse", "rigl-block"):  # where the others can make up for it
        assert active_entries(trainer.model) == given
