"""Scores, rules, schedules and methods from outside: found wherever a name is taken, and refused where they clash."""

import re

import pytest
import torch

from hf_dynsparse import (
    BlockSparseLinear,
    prune_regrow_,
    register_method,
    register_regrow_rule,
    register_score,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.blocks.distributions import DISTRIBUTIONS, uniform
from hf_dynsparse.topology import (
    DENSITY_SCHEDULES,
    METHODS,
    PRUNE_SCORES,
    REGROW_RULES,
    SCHEDULES,
    SCORES,
    Replacement,
    TopologySettings,
    TopologyUpdater,
    UpdateContext,
    choose_by_scores,
)
from tests.toy import toy_arguments, toy_config, toy_model, toy_trainer


def first(blocks):
    """The slot or position: what is last is pruned last, and regrown first."""
    return torch.arange(blocks.count, dtype=torch.float32, device=blocks.device)


def first_layer_shrinks(update: UpdateContext) -> dict[str, int]:
    """A block of the first layer goes to the second at every update."""
    one, two, *_ = update.layers
    sizes = {name: layer.nnzb for name, layer in update.layers.items()}
    return {**sizes, one: sizes[one] - 1, two: sizes[two] + 1}


def keep_the_first(update: UpdateContext, name: str, nnzb: int) -> Replacement:
    """Slot 0 keeps its block; the others as usual. For a constant density."""
    chosen = choose_by_scores(update, name, nnzb)
    stays = chosen.slots != 0
    return Replacement(chosen.slots[stays], chosen.block_ids[stays])


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    for table in (SCORES, METHODS):
        for name in ("mine", "by_value", "only_regrows", "moves", "keeps", "wrong"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)  # restored at the end: what a test registers is taken away
    monkeypatch.setitem(SCHEDULES, "mine", lambda progress: 1.0 - progress**2)
    monkeypatch.setitem(DENSITY_SCHEDULES, "mine", lambda progress: 1.0 - progress)
    monkeypatch.setitem(DISTRIBUTIONS, "mine", uniform)
    register_score("mine", first)
    register_score("by_value", lambda blocks: first(blocks) + blocks.values.sum() * 0, needs=["values"])
    register_regrow_rule("only_regrows", lambda blocks: first(blocks) - blocks.ever_active * 1.0, needs="ever_active")
    register_method("mine", {"prune_score": "by_value", "regrow_rule": "mine", "pruning_schedule": "mine"})
    register_method("moves", targets=first_layer_shrinks, source="here")
    register_method("keeps", choose=keep_the_first)


def test_of_scores():
    assert [name in PRUNE_SCORES for name in ("mine", "by_value", "only_regrows")] == [True, True, False]
    assert [name in REGROW_RULES for name in ("mine", "by_value", "only_regrows")] == [True, False, True]


@pytest.mark.parametrize(
    "given",
    [
        {"prune_score": "by_value", "regrow_rule": "only_regrows"},
        {"pruning_schedule": "mine"},
        {"method": "mine"},
        {"density_schedule": "mine", "initial_sparsity": 0.5},
    ],
)
def test_arguments(given, tmp_path):
    toy_arguments(tmp_path, **given)


@pytest.mark.parametrize("method", ["mine", "moves", "keeps"])
def test_a_run_resumes_bit_for_bit(method, tmp_path):
    """And what its own functions decide is what happens."""
    settings = {"method": method, "save_strategy": "steps", "save_steps": 4}
    whole = toy_trainer(tmp_path, **settings)
    layers = sparse_layers(whole.model).values()
    given, first_blocks = [layer.nnzb for layer in layers], [int(layer.block_index[0]) for layer in layers]
    whole.train()
    assert whole.topology.metrics["topology_updates"] == 3
    assert ([int(layer.block_index[0]) for layer in layers] == first_blocks) == (method == "keeps")
    sizes = [layer.nnzb for layer in layers]
    moved = 3 if method == "moves" else 0
    assert sizes == [given[0] - moved, given[1] + moved, *given[2:]]
    assert whole.topology.has_final_density
    resumed = toy_trainer(tmp_path / "resumed", toy_model(seed=1), method=method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "missing", "message"),
    [
        (
            {"regrow_rule": "only_regrows"},
            "only_regrows",
            "`regrow_rule` must be one of .* Got 'only_regrows'. One",
        ),
        ({"method": "keeps"}, "keeps", "`method` must be one of .* Got 'keeps'. One of your own .* as `--plugin`"),
    ],
)
def test_a_resumed_run_needs_them_again(given, missing, message, tmp_path):
    toy_trainer(tmp_path, save_strategy="steps", save_steps=4, **given).train()
    SCORES.pop(missing, None)
    METHODS.pop(missing, None)
    resumed = toy_trainer(tmp_path / "resumed")
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_another_method_is_another_run(tmp_path):
    """A preset may be given as its values; a method with functions of its own may not be left out."""
    toy_trainer(tmp_path, method="keeps", save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match=r"Got method: 'dynsparse' \(checkpoint: 'keeps'\)"):
        toy_trainer(tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    by_values = {"prune_score": "by_value", "regrow_rule": "mine", "pruning_schedule": "mine"}
    preset = toy_trainer(tmp_path, method="mine").topology
    toy_trainer(tmp_path, **by_values).topology.check_settings(preset.state())


def test_what_an_update_does():
    model = toy_model()
    layer = next(iter(sparse_layers(model).values()))
    kept, count = layer.block_index.clone(), layer.nnzb // 2
    free = sorted(set(range(layer.num_blocks)) - set(kept.tolist()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopologyUpdater(model, optimizer, 10, num_topology_updates=1, prune_score="mine", regrow_rule="mine").step(5)
    assert torch.equal(layer.block_index[count:], kept[count:])
    assert sorted(layer.block_index[:count].tolist()) == free[-count:]


@pytest.mark.parametrize(
    ("register", "given", "message"),
    [
        (register_score, ("l1", first), "must be new. Got 'l1', which is taken. Choose another"),
        (register_regrow_rule, ("mine", first), "Got 'mine', which is taken"),
        (register_method, ("rigl", {}), "Got 'rigl', which is taken"),
        (
            register_score,
            ("new", first, ["occupied"]),
            "A prune score may need first_values, gradient, newborn, saliency, second_moment, values. Got occ",
        ),
        (register_regrow_rule, ("new", first, "values"), "A regrow rule may need barred, .* Got values for 'new'"),
        (register_method, ("new", {"ratio": 0.5}), "A method sets topology options: .* Got ratio for 'new'"),
    ],
)
def test_what_cannot_be_registered(register, given, message):
    before = SCORES.keys() | METHODS.keys()
    with pytest.raises(ValueError, match=message):
        register(*given)
    assert SCORES.keys() | METHODS.keys() == before


def test_a_distribution():
    assert toy_config(distribution="mine").nnzb_per_layer() == toy_config().nnzb_per_layer()
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert len(sparse_layers(sparsify_(layers, 4, 0.5, distribution="mine"))) == 1


def test_a_rule_of_norms_alone_is_observed():
    """Without the gradient among its needs."""
    register_regrow_rule("by_value_of_inputs", lambda blocks: blocks.input_scale.sum((1, 2)), needs=["input_scale"])
    try:
        layer = BlockSparseLinear(12, 8, 4, nnzb=2)
        optimizer = torch.optim.SGD(layer.parameters())
        settings = TopologySettings(num_topology_updates=1, regrow_rule="by_value_of_inputs", pruning_ratio=0.5)
        updater = TopologyUpdater(layer, optimizer, 2, settings)
        layer(torch.ones(3, 12)).sum().backward()
        assert updater.step(1).removed == 1
    finally:
        del SCORES["by_value_of_inputs"]


@pytest.mark.parametrize(
    ("function", "error", "problem"),
    [
        (lambda blocks: blocks.values.abs().sum(1), ValueError, r"shape \(\d+,\). Got torch.Size\(\[\d+, \d+\]\)"),
        (lambda blocks: blocks.values.abs().sum(), ValueError, "a number for each block"),
        (lambda blocks: None, ValueError, "Got NoneType"),
        (lambda blocks: blocks.second_moment.sqrt(), AttributeError, "`needs`, here: values. All others are None"),
    ],
)
def test_a_score_that_cannot_be_says_what_it_should_be(function, error, problem):
    register_score("wrong", function, needs=["values"])
    layer = next(iter(sparse_layers(toy_model()).values()))
    with pytest.raises(error) as raised:
        prune_regrow_(layer, None, pruning_ratio=0.5, prune_score="wrong")
    assert re.search(problem, "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])]))
