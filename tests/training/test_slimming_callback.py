"""The search: exact penalty, when it stops, what it writes, and that it resumes."""

import json
from types import SimpleNamespace

import pytest
import torch
from toy import TOY_SIZES, toy_arguments, toy_collator, toy_examples, toy_model
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from hf_dynsparse import DynSparseTrainer, EarlyBirdCallback, Ticket
from hf_dynsparse.compress.slimming import draw_ticket, gates_of, ticket_distance, tied_share
from hf_dynsparse.training.callbacks.slimming import schedule


RULE = {"head_ratio": 0.5, "neuron_ratio": 0.4}


def search(folder, callback, model=None, resume=None, **overrides):
    """Twelve steps, two epochs of six, unless the callback stops before."""
    overrides = {"num_topology_updates": None, **overrides}
    model = toy_model(sparsity=0.0) if model is None else model
    trainer = DynSparseTrainer(
        model,
        toy_arguments(folder, **overrides),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def written(folder):
    return json.loads((folder / "ticket.json").read_text())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_penalty_is_exact(tmp_path, accumulation):
    """One step of gradient descent at rate 1: the penalty moves gates by its strength, nothing else by anything."""
    once = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    once |= {"warmup_steps": 0, "per_device_train_batch_size": 4 // accumulation, "max_grad_norm": 1e-3}
    once |= {"gradient_accumulation_steps": accumulation}
    plain, pressed = (
        search(tmp_path / name, EarlyBirdCallback(l1_heads=heads, l1_neurons=neurons, **RULE), **once).model
        for name, heads, neurons in (("plain", 0.0, 0.0), ("pressed", 0.25, 0.125))
    )
    for part, strength in (("heads", 0.25), ("neurons", 0.125)):
        for free, moved in zip(getattr(gates_of(plain), part), getattr(gates_of(pressed), part), strict=True):
            torch.testing.assert_close(free - moved, torch.full_like(free, strength))
    for (name, free), moved in zip(plain.named_parameters(), pressed.parameters(), strict=True):
        assert name.endswith("gates") or torch.equal(free, moved), name


def test_gates_are_trained_as_weights(tmp_path):
    trainer = search(tmp_path, EarlyBirdCallback(fallback=1), max_steps=1)
    assert {f"bert.encoder.layer.{layer}.{part}.gates" for layer in (0, 1) for part in OUTPUTS} <= set(
        trainer.get_decay_parameter_names(trainer.model)
    )


OUTPUTS = ("attention.output.dense", "output.dense")


class Recorder(EarlyBirdCallback):
    """Keeps the gates after every step, to draw from them again."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.seen.append([[gate.detach().clone() for gate in part] for part in gates_of(kwargs["model"])])


def test_stops_when_settled(tmp_path):
    callback = Recorder(draw_every=1, queue_length=3, tolerance=0.3, fallback=12, **RULE)
    trainer = search(tmp_path, callback)
    tickets = [draw_ticket(*gates, **RULE) for gates in callback.seen]
    untied = [tied_share(*gates, **RULE) <= 0.03 for gates in callback.seen]
    # Warm-up: the first step has rate 0, its ticket is that of the lower indices.
    assert not untied[0]
    settled = [
        step + 1
        for step in range(2, len(tickets))
        if all(untied[step - 2 : step + 1])
        and max(ticket_distance(tickets[step], earlier).largest for earlier in tickets[step - 2 : step]) < 0.3
    ]
    assert settled == [trainer.state.global_step]
    assert 4 <= trainer.state.global_step < 12
    assert Ticket.load(tmp_path / "ticket.json") == callback.ticket == tickets[-1]
    found = written(tmp_path)
    assert (found["step"], found["reason"]) == (settled[0], "settled")
    assert found["gates"]["heads"] == [gate.tolist() for gate in callback.seen[-1][0]]
    assert found["draws"][-1]["distance"] < 0.3
    assert found["seconds"] > 0
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["early_bird/neuron_gates"] for entry in logged] == [draw["neuron_gates"] for draw in found["draws"]]
    assert logged[-1]["early_bird/distance"] == found["draws"][-1]["distance"]


def test_gates_that_never_move_never_settle(tmp_path):
    """All tickets are the same by ties: only the fallback ends the search."""
    callback = EarlyBirdCallback(draw_every=1, queue_length=2, fallback=0.7, **RULE)
    trainer = search(tmp_path, callback, learning_rate=0.0)
    assert trainer.state.global_step == 4  # of six in the epoch
    assert written(tmp_path)["reason"] == "fallback"


def test_a_long_interval_and_a_stock_trainer(tmp_path):
    sizes = {name: value for name, value in TOY_SIZES.items() if name not in ("block_size", "sparsity")}
    callback = EarlyBirdCallback(draw_every=2, tolerance=1e-9, fallback=5, **RULE)
    args = TrainingArguments(str(tmp_path), max_steps=12, use_cpu=True, report_to="none", disable_tqdm=True)
    model = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2))
    trainer = Trainer(model, args, data_collator=toy_collator(), train_dataset=toy_examples(96), callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == 5
    assert [draw["step"] for draw in written(tmp_path)["draws"]] == [2, 4, 5]


def test_resumed_search_equals_the_uninterrupted(tmp_path):
    def bird():
        return EarlyBirdCallback(draw_every=1, queue_length=4, tolerance=0.02, fallback=9, **RULE)

    whole = search(tmp_path / "whole", bird())
    search(tmp_path / "halves", bird(), save_strategy="steps", save_steps=5)
    (tmp_path / "halves" / "ticket.json").unlink()
    resumed = search(tmp_path / "halves", bird(), resume=str(tmp_path / "halves" / "checkpoint-5"))
    assert resumed.state.global_step == whole.state.global_step == 9
    for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)
    tickets = written(tmp_path / "whole"), written(tmp_path / "halves")
    for ticket in tickets:
        assert ticket.pop("seconds") > 0
    assert tickets[0] == tickets[1]
    assert len(tickets[0]["draws"]) == 9
    other = EarlyBirdCallback(draw_every=1, queue_length=4, tolerance=0.5, fallback=9, **RULE)
    with pytest.raises(ValueError, match="Got other values of tolerance. Give the checkpoint's"):
        search(tmp_path / "halves", other, resume=str(tmp_path / "halves" / "checkpoint-5"))


@pytest.mark.parametrize(
    ("steps", "batches", "accumulation", "expected"),
    [
        (3000, 1000, 1, (20, 200)),  # a fiftieth and a fifth of an epoch
        (3000, 1001, 4, (5, 50)),
        (10, 1000, 1, (1, 2)),  # the run is shorter than an epoch
        (3000, None, 1, (60, 600)),  # a stream: no epochs
        (3, 4, 1, (1, 1)),
    ],
)
def test_schedule(tmp_path, steps, batches, accumulation, expected):
    class State:
        max_steps = steps

    args = toy_arguments(tmp_path, gradient_accumulation_steps=accumulation)
    loader = iter(()) if batches is None else range(batches)
    assert schedule(args, State, loader, 0.02, 0.2) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1_heads": -1.0}, "`l1_heads` must not be negative"),
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"queue_length": 1}, "`queue_length` must be at least 2"),
        ({"head_ratio": 1.5}, "`head_ratio` must lie"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyBirdCallback(**arguments)


def test_scaled_gradients_are_refused():
    args = SimpleNamespace(fp16=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="Got fp16 without clipping.*Give `max_grad_norm`"):
        EarlyBirdCallback().on_train_begin(args, None, None)
