"""Who owns the callbacks of a run, and what a run leaves behind, however it ends."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_dynsparse import DynSparseTrainer, EarlyBirdCallback, KernelCallback, TopologyCallback, sparse_layers
from hf_dynsparse.ops.operators import _observers
from hf_dynsparse.topology.frames import read_history
from hf_dynsparse.training.callbacks.epoch import EpochCallback
from hf_dynsparse.training.callbacks.history import TopologyHistory
from hf_dynsparse.training.callbacks.throughput import ThroughputCallback
from tests.toy import toy_arguments, toy_collator, toy_config, toy_examples, toy_model, toy_trainer


OF_THE_CLOCK = ("runtime", "_per_second")
SAVING = {"save_strategy": "steps", "save_steps": 2}


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    history = trainer.state.log_history
    return [{name: value for name, value in e.items() if not name.endswith(OF_THE_CLOCK)} for e in history]


def stock_trainer(folder: Path, *callbacks: Any, model: Any = None, **settings: Any) -> Trainer:
    return Trainer(
        toy_model() if model is None else model,
        toy_arguments(folder, **settings),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        callbacks=list(callbacks),
    )


def own_trainer(folder: Path, *callbacks: Any, model: Any = None, **settings: Any) -> DynSparseTrainer:
    return DynSparseTrainer(
        toy_model() if model is None else model,
        toy_arguments(folder, **settings),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        eval_dataset=toy_examples(6, seed=1),
        callbacks=list(callbacks),
    )


def test_callbacks_that_are_made_anew_on_resume_serve_as_the_first(tmp_path: Path) -> None:
    """In a run whose layers shrink, and regrow by the gradient that they observe."""
    settings = {"method": "granet", "num_topology_updates": 5, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    own_trainer(tmp_path / "straight", **SAVING, **settings).train()
    runs = []
    for restore in (False, True):
        trainer = own_trainer(
            tmp_path / str(restore), restore_callback_states_from_checkpoint=restore, **SAVING, **settings
        )
        trainer.add_callback(TopologyHistory(trainer))
        first = trainer.topology, trainer.kernels, trainer.throughput
        trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
        now = trainer.topology, trainer.kernels, trainer.throughput
        assert [a is b for a, b in zip(first, now, strict=True)] == [not restore] * 3
        assert all(callback in trainer.callback_handler.callbacks for callback in now)
        runs.append(trainer)
    assert log_of(runs[0]) == log_of(runs[1])
    assert "dynsparse/newborn_share" in runs[1].state.log_history[-2]
    assert runs[0].state.total_flos == runs[1].state.total_flos
    assert runs[0].state.best_global_step == runs[1].state.best_global_step
    assert runs[0].throughput.tokens == runs[1].throughput.tokens
    left, right = (run.model.state_dict() for run in runs)
    assert left.keys() == right.keys() == toy_model().state_dict().keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    frames = [[(frame.step, frame.update) for frame in read_history(tmp_path / name)] for name in ("False", "True")]
    assert frames[0] == frames[1]
    assert len(frames[0]) > 1


def test_a_stock_trainer_that_makes_its_callbacks_anew_keeps_the_history_in_step(tmp_path: Path) -> None:
    for restore, resume in ((False, None), (True, str(tmp_path / "checkpoint-4"))):
        settings = {"restore_callback_states_from_checkpoint": restore, **SAVING}
        trainer = stock_trainer(tmp_path, TopologyCallback(num_topology_updates=3), **settings)
        trainer.add_callback(TopologyHistory(trainer))
        trainer.train(resume_from_checkpoint=resume)
        assert [frame.step for frame in read_history(tmp_path)] == [0, 3, 6, 9]


def test_callbacks_may_be_given_as_classes(tmp_path: Path) -> None:
    kinds = [ThroughputCallback, KernelCallback, TopologyCallback]
    trainer = own_trainer(tmp_path, *kinds, kernel_tuning="off")
    made = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert [kind for kind in made if kind in kinds] == kinds
    trainer.train()
    assert trainer.topology.metrics["topology_updates"] == 3  # as the arguments say
    assert trainer.kernels.tuning == "off"


def test_a_search_may_be_given_as_a_class(tmp_path: Path) -> None:
    trainer = own_trainer(tmp_path, EarlyBirdCallback, model=toy_model(sparsity=0), max_steps=4)
    trainer.train()
    assert isinstance(trainer.early_bird, EarlyBirdCallback)
    assert "early_bird/head_gates" in trainer.state.log_history[-2]


@pytest.mark.parametrize("kind", [TopologyCallback, EarlyBirdCallback, KernelCallback, ThroughputCallback])
def test_a_second_callback_of_a_kind_is_refused_at_once(tmp_path: Path, kind: type[TrainerCallback]) -> None:
    name, model = kind.__name__, toy_model(sparsity=0 if kind is EarlyBirdCallback else 0.75)
    refused = rf"must have one `{name}`.* Got {name}, {name}\. Give one, or `remove_callback\({name}\)` first\."
    with pytest.raises(ValueError, match=refused):
        own_trainer(tmp_path, kind, kind(), model=model)
    trainer = own_trainer(tmp_path, kind(), model=model)
    before = list(trainer.callback_handler.callbacks)
    for second in (kind, kind()):
        with pytest.raises(ValueError, match=refused):
            trainer.add_callback(second)
    assert trainer.callback_handler.callbacks == before
    # In the place of another, one is welcome.
    trainer.remove_callback(kind)
    trainer.add_callback(kind)
    assert len(trainer.callback_handler.callbacks) == len(before)


@pytest.mark.parametrize("kind", [TopologyCallback, EarlyBirdCallback])
def test_a_stock_trainer_with_two_is_stopped_at_once(tmp_path: Path, kind: type[TrainerCallback]) -> None:
    model = toy_model(sparsity=0 if kind is EarlyBirdCallback else 0.75)
    trainer = stock_trainer(tmp_path, kind, kind(), model=model)
    with pytest.raises(ValueError, match=f"must have one `{kind.__name__}`"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", [KernelCallback, ThroughputCallback])
def test_a_callback_that_the_trainer_works_with_is_missed_by_its_name(
    tmp_path: Path, kind: type[TrainerCallback]
) -> None:
    trainer = own_trainer(tmp_path)
    trainer.remove_callback(kind)
    with pytest.raises(ValueError, match=rf"works with its `{kind.__name__}`\. Got none: it was removed\."):
        trainer.train()


def test_the_end_of_training_may_come_twice(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.train()
    ever = dict(trainer.topology.ever_active)
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    assert len(ever) == 12
    assert all(torch.equal(ever[name], now) for name, now in trainer.topology.ever_active.items())


class End(TrainerCallback):
    """Ends a run in its second step, right before an update: in order, or with an exception."""

    def __init__(self, error: type[BaseException] | None) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


@pytest.mark.parametrize(
    ("error", "rule"), [(None, "gradient"), (KeyboardInterrupt, "momentum"), (RuntimeError, "gradient")]
)
def test_a_run_leaves_nothing_behind_however_it_ends(
    tmp_path: Path, error: type[BaseException] | None, rule: str
) -> None:
    method = {"method": "snfs"} if rule == "momentum" else {"regrow_rule": rule}
    trainer = own_trainer(tmp_path, End(error), **method)
    if error is None:
        trainer.train()
    else:
        with pytest.raises(error):
            trainer.train()
    assert not _observers
    assert trainer.model.state_dict().keys() == toy_model().state_dict().keys()
    assert len(trainer.topology.ever_active) == 12
    gone = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert gone() is None


def test_a_stock_run_that_stops_early_observes_nothing_any_more(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, TopologyCallback(num_topology_updates=3, regrow_rule="gradient"), End(None))
    trainer.train()
    assert trainer.state.global_step == 2
    assert not _observers


def test_an_interrupted_stock_run_observes_nothing_once_it_is_dropped_or_told_to_end(tmp_path: Path) -> None:
    for drop in (True, False):
        callback = TopologyCallback(num_topology_updates=3, regrow_rule="gradient")
        trainer = stock_trainer(tmp_path, callback, End(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(_observers) == 12  # nobody has told the callback
        if drop:
            del trainer, callback
            gc.collect()
        else:
            callback.end(trainer.model)
            assert trainer.model.state_dict().keys() == toy_model().state_dict().keys()
        assert not _observers


def test_the_log_of_a_stock_trainer_has_the_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"seeded_dropout": False, "fused_passes": False, "logging_steps": 2}
    with caplog.at_level(logging.INFO, "hf_dynsparse"):
        how = toy_arguments(tmp_path, **settings).topology_settings()
        stock = stock_trainer(tmp_path / "stock", TopologyCallback(how), **settings)
        stock.add_callback(EpochCallback(stock.data_collator))
        stock.train()
    assert [record.message[:34] for record in caplog.records if record.name.endswith("callbacks.topology")] == [
        "Topology: 12 sparse layers at spar"
    ]
    own = own_trainer(tmp_path / "own", **settings)
    assert "Topology:" not in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, "hf_dynsparse"):
        own.train()
    assert capsys.readouterr().out.count("Topology: 12 sparse layers at spar") == 1  # where nobody hears level INFO
    names = {f"dynsparse/{name}" for name in own.topology.metrics}
    assert names == {n for e in stock.state.log_history for n in e if n.startswith("dynsparse/")}
    logs = [[{n: e.get(n) for n in {*names, "loss"}} for e in t.state.log_history[:-1]] for t in (stock, own)]
    assert logs[0] == logs[1]


def test_the_log_of_a_search_in_a_stock_trainer_has_its_metrics(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, EarlyBirdCallback(), model=toy_model(sparsity=0), max_steps=4)
    trainer.train()
    assert "early_bird/neuron_gates" in trainer.state.log_history[-2]


@pytest.mark.parametrize(("make", "removed"), [(stock_trainer, True), (own_trainer, False)])
def test_a_model_that_is_saved_untrained_or_without_updates_is_plain(tmp_path: Path, make: Any, removed: bool) -> None:
    trainer = make(tmp_path, TopologyCallback(num_topology_updates=3))
    if removed:
        trainer.remove_callback(TopologyCallback)
        trainer.args.max_steps = 2
        trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if name.endswith(("ever_active", "active_since"))} == set()
    assert sum(name.endswith("block_index") for name in saved) == 12


def test_a_stock_trainer_resumes_what_was_recorded(tmp_path: Path) -> None:
    straight = stock_trainer(tmp_path / "straight", callback := TopologyCallback(num_topology_updates=3), **SAVING)
    straight.train()
    resumed = stock_trainer(
        tmp_path / "resumed", other := TopologyCallback(callback.settings), model=toy_model(seed=1), **SAVING
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    assert other.metrics == callback.metrics
    assert all(torch.equal(ever, other.ever_active[name]) for name, ever in callback.ever_active.items())


def test_a_dense_model_has_no_topology(tmp_path: Path) -> None:
    trainer = own_trainer(tmp_path, model=toy_model(sparsity=0))
    assert trainer.topology is None
    assert not sparse_layers(trainer.model)
    assert toy_config(sparsity=0).sparsity == 0
