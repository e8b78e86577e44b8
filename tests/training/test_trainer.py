"""Training runs of a toy model: what a run computes, logs and leaves behind. Interruptions: see test_resuming.py."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback, default_data_collator

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForSequenceClassification,
    DynSparseTrainer,
    TopologyCallback,
    flops_per_sequence,
    sparse_layers,
)
from hf_dynsparse.ops import choice, tuning
from hf_dynsparse.training.callbacks.epoch import EpochCallback
from tests.toy import toy_arguments, toy_collator, toy_examples, toy_model, toy_trainer


def indices(model):
    return {name: layer.block_index.clone() for name, layer in sparse_layers(model).items()}


def assert_equal_models(one, other, **tolerance):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


def test_a_run(tmp_path):
    model = toy_model()
    before = indices(model)
    trainer = toy_trainer(tmp_path, model, eval_strategy="steps", eval_steps=4)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[-2]["eval_loss"] < first - 0.1
    for name, layer in sparse_layers(model).items():
        layer.layout.validate(name)
        assert not torch.equal(layer.block_index, before[name])
        ever = trainer.topology.ever_active[name]
        # Everything that was active at the start or is active now was active at some time.
        assert ever.flatten()[before[name].long()].all()
        assert (ever >= layer.layout.to_mask()).all()
    shares = [ever.float().mean() for ever in trainer.topology.ever_active.values()]
    assert trainer.topology.metrics["coverage"] == pytest.approx(float(sum(shares)) / 12)
    # Training leaves no trace in a finished model, and it can be saved, loaded and used.
    assert model.state_dict().keys() == toy_model().state_dict().keys()
    trainer.save_model()
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_equal_models(model, loaded)


def test_log(tmp_path):
    trainer = toy_trainer(tmp_path, eval_strategy="steps", eval_steps=2, logging_steps=3)
    trainer.train()
    history = trainer.state.log_history
    training = [entry for entry in history if "loss" in entry]
    evaluation = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == [3, 6, 9, 12]
    assert [entry["step"] for entry in evaluation] == [2, 4, 6, 8, 10, 12]
    per_sequence = flops_per_sequence(trainer.model, 16)
    for entry in history[:-1]:
        if entry["step"] >= 3:
            updates = min(entry["step"] // 3, 3)
            ratio = 0.5 * 0.5 * (1 + math.cos(math.pi * (updates - 1) / 3))
            assert entry["dynsparse/topology_updates"] == updates
            assert entry["dynsparse/pruning_ratio"] == pytest.approx(ratio)
            assert 0 <= entry["dynsparse/newborn_share"] <= 1
            assert 0 <= entry["dynsparse/block_age"] <= updates
            assert entry["dynsparse/coverage"] > 0.3
        else:
            assert entry["dynsparse/coverage"] == 0.25
        assert entry["dynsparse/sparsity"] == 0.75
        assert entry["dynsparse/tokens_per_second"] > 0
    assert [entry["dynsparse/flops"] for entry in training] == [4 * per_sequence * step for step in (3, 6, 9, 12)]
    coverage = [entry["dynsparse/coverage"] for entry in training]
    assert coverage == sorted(coverage)
    assert trainer.throughput.tokens == 12 * 4 * 16


def test_flops_of_an_evaluation_between_two_log_entries(tmp_path):
    trainer = toy_trainer(tmp_path, eval_strategy="steps", eval_steps=2, logging_steps=3, max_steps=4)
    trainer.train()
    flops = {entry["step"]: entry["dynsparse/flops"] for entry in trainer.state.log_history if "eval_loss" in entry}
    per_step = 4 * flops_per_sequence(trainer.model, 16)
    assert flops == {2: 2 * per_step, 4: 4 * per_step}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_flops_count_every_sequence(tmp_path, accumulation):
    trainer = toy_trainer(tmp_path, gradient_accumulation_steps=accumulation, max_steps=3, num_topology_updates=0)
    trainer.train()
    assert trainer.state.total_flos == 3 * 4 * accumulation * flops_per_sequence(trainer.model.config, 16)


def test_sequence_and_choice_batches_count_alike(tmp_path):
    trainer = toy_trainer(tmp_path)
    ids = torch.zeros(6, 16, dtype=torch.int64)
    assert trainer.floating_point_ops({"input_ids": ids}) == 6 * flops_per_sequence(trainer.model, 16)
    assert trainer.floating_point_ops({"input_ids": ids.view(2, 3, 16)}) == 6 * flops_per_sequence(trainer.model, 16)


def test_stock_trainer_with_the_callback_is_the_same_run(tmp_path):
    # The stock trainer draws dropout as PyTorch does.
    settings = {"regrow_rule": "gradient", "group_lasso": 0.1, "seeded_dropout": False, "fused_passes": False}
    ours = toy_trainer(tmp_path / "ours", toy_model(hidden_dropout_prob=0.1), **settings)
    ours.train()
    args = toy_arguments(tmp_path / "stock", **settings)
    callback, collator = TopologyCallback(args.topology_settings(), group_lasso=args.group_lasso), toy_collator()
    stock = Trainer(
        toy_model(hidden_dropout_prob=0.1),
        args,
        data_collator=collator,
        train_dataset=toy_examples(24),
        callbacks=[callback, EpochCallback(collator)],
    )
    stock.train()
    assert callback.metrics == ours.topology.metrics
    assert callback.metrics["topology_updates"] == 3
    assert_equal_models(ours.model, stock.model)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, stock)]
    assert losses[0] == losses[1]


class Topologies(TrainerCallback):
    """Remembers the topology after every step."""

    def __init__(self):
        self.topologies = []

    def on_step_end(self, args, state, control, **kwargs):
        self.topologies.append(indices(kwargs["model"]))


def accumulated_run(folder, cls, batch, accumulation, rule):
    examples = [{**row, "labels": i % 2} for i, row in enumerate(toy_examples(24))]
    masked = cls.__name__.endswith("MaskedLM")
    seen = Topologies()
    trainer = DynSparseTrainer(
        toy_model(cls=cls),
        toy_arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            num_topology_updates=2,
            regrow_rule=rule,
            learning_rate=1e-3,
        ),
        data_collator=toy_collator() if masked else default_data_collator,
        train_dataset=toy_examples(24) if masked else examples,
    )
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.topologies


@pytest.mark.parametrize(
    ("cls", "rule"), [(DynSparseBertForMaskedLM, "gradient"), (DynSparseBertForSequenceClassification, "random")]
)
def test_accumulation_changes_nothing(tmp_path, cls, rule):
    whole, topologies = accumulated_run(tmp_path / "whole", cls, 8, 1, rule)
    split, split_topologies = accumulated_run(tmp_path / "split", cls, 1, 8, rule)
    for one, other in zip(topologies, split_topologies, strict=True):
        for name, index in one.items():
            assert torch.equal(index, other[name]), name
    assert not torch.equal(*(topologies[step]["bert.encoder.layer.0.output.dense"] for step in (0, 3)))
    assert_equal_models(whole.model, split.model, rtol=1e-3, atol=1e-5)
    for one, other in zip(whole.state.log_history[:-1], split.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_dense_baseline(tmp_path):
    trainer = toy_trainer(tmp_path, toy_model(sparsity=0), eval_strategy="steps", eval_steps=6)
    assert trainer.topology is None
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("dynsparse/")}
    assert logged == {"dynsparse/flops", "dynsparse/tokens", "dynsparse/tokens_per_second"}
    assert trainer.state.total_flos == 12 * 4 * flops_per_sequence(toy_model(sparsity=0).config, 16)


def test_model_init_is_refused_aloud(tmp_path):
    # A model that is made later would train without topology updates.
    with pytest.raises(TypeError, match="'model'"):
        DynSparseTrainer(args=toy_arguments(tmp_path), model_init=toy_model, train_dataset=toy_examples(24))


def test_a_callback_of_ones_own_is_not_doubled(tmp_path):
    own = TopologyCallback(topology_update_every=5, regrow_rule="unfired")
    trainer = DynSparseTrainer(
        toy_model(),
        toy_arguments(tmp_path),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        callbacks=[own],
    )
    assert trainer.topology is own
    assert [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TopologyCallback)] == [own]
    trainer.train()
    assert own.metrics["topology_updates"] == 2


def test_too_many_updates(tmp_path):
    with pytest.raises(ValueError, match=r"`num_topology_updates` must lie in \[0, 11\] for 12 steps.*Got 12"):
        toy_trainer(tmp_path, num_topology_updates=12).train()


@pytest.mark.parametrize(("method", "updates"), [("dynsparse", 1), ("gmp", 4)])
def test_a_short_run_with_default_updates(tmp_path, caplog, method, updates):
    # New blocks get steps to grow; a method that brings none needs no such interval.
    trainer = toy_trainer(tmp_path, num_topology_updates=None, method=method, max_steps=25)
    with caplog.at_level("INFO", "hf_dynsparse"):
        trainer.train()
    assert trainer.topology.metrics["topology_updates"] == updates
    said = [record.message for record in caplog.records if record.message.startswith("Topology:")]
    assert len(said) == 1
    assert f"{updates} {'updates from' if updates > 1 else 'update at'} step" in said[0]
    assert "(by default: at most 80" in said[0]


def test_static_run_keeps_the_topology(tmp_path):
    model = toy_model()
    before = indices(model)
    trainer = toy_trainer(tmp_path, model, num_topology_updates=0)
    trainer.train()
    assert all(torch.equal(index, before[name]) for name, index in indices(model).items())
    assert trainer.topology.metrics == {"sparsity": 0.75, "coverage": 0.25}


def test_group_lasso_by_hand(tmp_path):
    models = [toy_model(), toy_model()]
    for model, strength in zip(models, (0.0, 3.0), strict=True):
        toy_trainer(
            tmp_path,
            model,
            max_steps=1,
            num_topology_updates=0,
            warmup_steps=0,
            learning_rate=0.1,
            group_lasso=strength,
        ).train()
    with_lasso = sparse_layers(models[1])
    for name, layer in sparse_layers(models[0]).items():
        w = layer.values.detach()
        for slot in (0, 7):
            norm = math.sqrt(float((w[slot] ** 2).sum()) + 1e-6)
            expected = w[slot] - 0.1 * 3.0 * 0.02 * math.sqrt(4) * w[slot] / norm
            torch.testing.assert_close(with_lasso[name].values[slot].detach(), expected)
        assert torch.equal(layer.bias, with_lasso[name].bias)


def test_no_lasso_when_the_optimizer_skipped_its_step(tmp_path):
    # A gradient scaler skips steps whose gradients overflow; weights must then stay as they are.
    trainer = toy_trainer(tmp_path, group_lasso=3.0)
    model, optimizer = trainer.model, trainer.create_optimizer()
    state = SimpleNamespace(global_step=0, max_steps=12, stateful_callbacks={})
    trainer.topology.on_train_begin(trainer.args, state, trainer.control, model=model, optimizer=optimizer)
    before = toy_model().state_dict()
    for skipped in (True, False):
        proxy = SimpleNamespace(param_groups=optimizer.param_groups, step_was_skipped=skipped)
        trainer.topology.on_optimizer_step(trainer.args, state, trainer.control, model=model, optimizer=proxy)
        for name, layer in sparse_layers(model).items():
            assert torch.equal(layer.values, before[f"{name}.values"]) == skipped


class Poison(TrainerCallback):
    """Makes one gradient NaN at step `step`."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            next(iter(sparse_layers(kwargs["model"]).values())).values.grad[0] = float("nan")


def test_an_update_on_nan_is_skipped_and_the_next_step_is_not_made(tmp_path, caplog):
    trainer = toy_trainer(tmp_path, regrow_rule="gradient", max_steps=7)
    trainer.add_callback(Poison(step=4))
    trainer.add_callback(seen := Topologies())
    with pytest.raises(FloatingPointError, match="Got loss nan and gradient norm nan in step 5"):
        trainer.train()
    # Updates after steps 2, 4 and 5: the second would act on NaN.
    assert [record.args[0] for record in caplog.records if "is skipped" in record.message] == [2]
    assert "`bert.encoder.layer.0.attention.self.query` holds NaN" in caplog.text
    for name, index in seen.topologies[1].items():
        assert torch.equal(index, seen.topologies[-1][name])
    assert trainer.topology.metrics["topology_updates"] == 1


def test_optimizer_of_the_paper(tmp_path):
    trainer = toy_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["eps"] == 1e-6 and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(
        decay[layer.values] == 0.01 and decay[layer.bias] == 0 for layer in sparse_layers(trainer.model).values()
    )
    names = {name for name, parameter in trainer.model.named_parameters() if decay[parameter] == 0}
    assert names == {n for n, _ in trainer.model.named_parameters() if "LayerNorm" in n or n.endswith("bias")}


def test_masks_of_training_change_and_masks_of_evaluation_do_not(tmp_path):
    # Nothing is learned and every epoch has the same single batch: only masks can change a loss.
    trainer = DynSparseTrainer(
        toy_model(),
        toy_arguments(
            tmp_path, learning_rate=0.0, max_steps=4, num_topology_updates=0, eval_strategy="steps", eval_steps=1
        ),
        data_collator=toy_collator(),
        train_dataset=toy_examples(4),
        eval_dataset=toy_examples(4),
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.data_collator.epoch == 3
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations == [start] * 4
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len({round(loss, 5) for loss in losses}) == 4
    # The masks of epoch 0 serve evaluation; only the order of the rows differs.
    assert losses[0] == pytest.approx(start, rel=1e-5)


def test_best_model_and_save_total_limit(tmp_path):
    trainer = toy_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that the best is the first
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-2"]
    best = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal_models(best, trainer.model)
    last = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-12")
    name = "bert.encoder.layer.0.output.dense.block_index"
    assert not torch.equal(last.state_dict()[name], best.state_dict()[name])


def test_a_resumed_run_keeps_the_backends_of_the_interrupted_one(tmp_path, monkeypatch, caplog):
    def fastest(name):
        def times(problem, backends):
            return tuning.Timing({backend.name: float(backend.name != name) for backend in backends})

        monkeypatch.setattr(tuning, "time_backends", times)

    settings = {"kernel_tuning": "force", "save_steps": 6, "save_strategy": "steps"}
    fastest("workspace")
    toy_trainer(tmp_path, **settings).train()
    made = set(choice.plan.choices.values())
    assert {made_choice.backend for made_choice in made} == {"workspace"}
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["KernelCallback"]["attributes"]["choices"]
    assert len(kept) == 2 * 3  # three shapes of layers, both ways

    fastest("native")
    toy_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert {made_choice.backend for made_choice in choice.plan.choices.values()} == {"workspace"}
    # What the interrupted run used is not allowed any more: chosen anew, and said.
    settings["dense_workspace"] = False
    fastest("tiled")
    toy_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert {made_choice.backend for made_choice in choice.plan.choices.values()} == {"tiled"}
    assert "6 backends of the interrupted run are not to be had here" in caplog.text
    # A run of its own times for itself.
    fastest("native")
    toy_trainer(tmp_path / "other", **settings).train()
    assert {made_choice.backend for made_choice in choice.plan.choices.values()} <= {"native", "tiled"}


def test_kernel_arguments_are_checked_before_work_starts(tmp_path):
    with pytest.raises(ValueError, match="`kernel_tuning` must be one of off, once, force. Got 'on'."):
        toy_arguments(tmp_path, kernel_tuning="on")


def test_throughput_is_that_of_the_whole_run(tmp_path):
    settings = {"save_steps": 6, "save_strategy": "steps"}
    first = toy_trainer(tmp_path, **settings)
    first.train()
    assert first.throughput.tokens == 12 * 4 * 16
    resumed = toy_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.throughput.tokens == 12 * 4 * 16
    finished = toy_trainer(tmp_path, **settings)
    finished.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert finished.throughput.tokens == 12 * 4 * 16
    assert finished.throughput.tokens_per_second > 0
