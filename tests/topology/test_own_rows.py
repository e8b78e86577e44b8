"""A row that a user adds to a table is found wherever a name is taken."""

import pytest
import torch
from transformers import HfArgumentParser

from hf_dynsparse import DynSparseTrainingArguments, sparse_layers, sparsify_
from hf_dynsparse.blocks.distributions import DISTRIBUTIONS, uniform
from hf_dynsparse.topology import (
    DENSITY_SCHEDULES,
    METHODS,
    PRUNE_SCORES,
    REGROW_RULES,
    SCHEDULES,
    SCORES,
    Method,
    Score,
    TopologyUpdater,
)
from tests.toy import toy_arguments, toy_config, toy_model, toy_trainer


def first(blocks):
    """The slot or position: what is last is pruned last, and regrown first."""
    return torch.arange(blocks.count, dtype=torch.float32, device=blocks.device)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(SCORES, "mine", Score(first))
    monkeypatch.setitem(SCORES, "mine_by_value", Score(first, frozenset({"values"})))
    monkeypatch.setitem(SCHEDULES, "mine", lambda progress: 1.0 - progress**2)
    monkeypatch.setitem(DENSITY_SCHEDULES, "mine", lambda progress: 1.0 - progress)
    monkeypatch.setitem(DISTRIBUTIONS, "mine", uniform)
    settings = {"prune_score": "mine_by_value", "regrow_rule": "mine", "schedule": "mine"}
    monkeypatch.setitem(METHODS, "mine", Method("here", settings))


def test_of_scores():
    assert "mine" in PRUNE_SCORES
    assert "mine_by_value" in PRUNE_SCORES
    assert "mine" in REGROW_RULES
    assert "mine_by_value" not in REGROW_RULES


@pytest.mark.parametrize(
    "given",
    [
        {"prune_score": "mine"},
        {"prune_score": "mine_by_value", "regrow_rule": "mine"},
        {"pruning_schedule": "mine"},
        {"method": "mine"},
        {"density_schedule": "mine", "initial_sparsity": 0.5},
    ],
)
def test_arguments(given, tmp_path):
    toy_arguments(tmp_path, **given)
    flags = [f"--{name}={value}" for name, value in given.items()]
    (args,) = HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", *flags])
    assert {name: getattr(args, name) for name in given} == given


def test_a_run(tmp_path):
    """From the command line to the last update."""
    trainer = toy_trainer(tmp_path, method="mine")
    trainer.train()
    assert trainer.topology.metrics["topology_updates"] == 3


def test_what_an_update_does():
    model = toy_model()
    layer = next(iter(sparse_layers(model).values()))
    kept, count = layer.block_index.clone(), layer.nnzb // 2
    free = sorted(set(range(layer.num_blocks)) - set(kept.tolist()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopologyUpdater(model, optimizer, 10, 1, prune_score="mine", regrow_rule="mine").step(5)
    assert torch.equal(layer.block_index[count:], kept[count:])
    assert sorted(layer.block_index[:count].tolist()) == free[-count:]


def test_a_distribution():
    assert toy_config(distribution="mine").nnzb_per_layer() == toy_config().nnzb_per_layer()
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert len(sparse_layers(sparsify_(layers, 4, 0.5, distribution="mine"))) == 1
