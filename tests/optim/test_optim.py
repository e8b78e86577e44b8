"""Moments of new blocks, group lasso, learning rate."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from helpers import generator, make_layer
from torch import nn
from toy import toy_model

from hf_dynsparse import TopologyUpdater, group_lasso_, prune_regrow_, sparse_layers, sparse_learning_rate
from hf_dynsparse.optim.block_adam import BlockAdamW
from hf_dynsparse.optim.groups import parameter_groups
from hf_dynsparse.optim.moments import check_optimizer_state, clear_moments_


def aged_adamw(values: nn.Parameter, bias: nn.Parameter) -> BlockAdamW:
    return BlockAdamW([{"params": [values], "per_block": True}, {"params": [bias]}], lr=1e-2)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {  # and how many moments a parameter has
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2), 2),
    "adamw, fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), 2),
    "adamw, foreach": (lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True), 2),
    "adamw, amsgrad": (lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), 3),
    "adamw with ages of blocks": (lambda p: aged_adamw(*p), 3),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2), 0),
    "sgd, momentum": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 1),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=1e-2), 1),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True), 3),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), 2),
    "adafactor of transformers": (lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False), 2),
    "adafactor, first moment": (lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, beta1=0.9), 3),
}


class Correlated(torch.optim.SGD):
    """An optimiser whose state mixes the blocks."""

    def __init__(self, parameters: object, state: object) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.extra = state

    def step(self, closure: object = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["extra"] = self.extra


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(5, layer.in_features, generator=generator(seed))).square().sum().backward()
        optimizer.step()


def test_learning_rate_of_the_paper() -> None:
    assert sparse_learning_rate(1.0, 0.9) == pytest.approx(6.40, abs=0.005)
    assert sparse_learning_rate(2e-4, 0.9) == pytest.approx(1.28e-3, abs=1e-6)
    assert sparse_learning_rate(2e-4, 0.0) == 2e-4


def test_parameter_groups() -> None:
    model = toy_model()
    layers = sparse_layers(model)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    layers["bert.encoder.layer.1.output.dense"].values.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    values, decayed, rest = parameter_groups(model, 0.1, dense_learning_rate=2e-3)
    assert [names[p] for p in values["params"]] == [f"{name}.values" for name in layers][:-1]
    assert [names[p] for p in decayed["params"]] == [
        *("bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
        "cls.predictions.transform.dense.weight",
    ]
    assert all(names[p].endswith(("bias", "LayerNorm.weight")) for p in rest["params"])
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in (values, decayed, rest)) == trained
    assert [group["weight_decay"] for group in (values, decayed, rest)] == [0.1, 0.1, 0.0]
    assert [group["per_block"] for group in (values, decayed, rest)] == [True, False, False]
    assert [group.get("lr") for group in (values, decayed, rest)] == [None, 2e-3, 2e-3]


def test_parameter_groups_by_names_and_without_sparse_layers() -> None:
    layer = make_layer()
    assert [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(layer, decayed=["bias"])] == [
        (1, 0.0),
        (1, 0.01),
    ]
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False))
    assert (group["per_block"], "lr" in group) == (False, False)


@pytest.mark.parametrize("nnzb", [None, 11])
@pytest.mark.parametrize(
    ("make", "name", "first"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1), "sum", 0.1),
        (lambda p: torch.optim.Adagrad(p, lr=0.02), "sum", 0.0),
    ],
    ids=["rprop", "adagrad from 0.1", "adagrad"],
)
def test_new_blocks_begin_as_the_optimiser_begins(
    make: Callable[..., torch.optim.Optimizer], name: str, first: float, nnzb: int | None
) -> None:
    layer = make_layer((4, 6), 4, 8)
    optimizer = make(layer.parameters())
    train(layer, optimizer)
    before = layer.block_index.tolist()
    prune_regrow_(layer, optimizer, pruning_ratio=0.5, nnzb=nnzb)
    new = torch.tensor([place not in before for place in layer.block_index.tolist()])
    state = optimizer.state[layer.values][name]
    assert state[new].eq(first).all()
    assert not state[~new].eq(first).any()
    train(layer, optimizer, 1)
    assert layer.values.detach()[new].abs().amax() > 0.005


def test_moments_of_another_size_are_refused() -> None:
    layer = make_layer((4, 6), 4, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    train(layer, optimizer)
    prune_regrow_(layer, None, pruning_ratio=0.0, nnzb=12)  # behind the optimiser's back
    message = r"one row for each block .* Got 'exp_avg' of shape \(8, 4, 4\) for `.*values` of shape \(12, 4, 4\)"
    for num_updates in (0, 1):
        with pytest.raises(ValueError, match=message):
            TopologyUpdater(layer, optimizer, 10, num_topology_updates=num_updates)
    with pytest.raises(ValueError, match=message):
        prune_regrow_(layer, optimizer, pruning_ratio=0.5, nnzb=13)
    assert layer.nnzb == 12


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("nnzb", [1, 8])
def test_moments_of_the_slots_are_cleared_and_no_others(name: str, nnzb: int) -> None:
    make, count = OPTIMIZERS[name]
    layer = make_layer((4, 6), 4, nnzb)
    optimizer = make(layer.parameters())
    clear_moments_(optimizer, layer.values, torch.tensor([0]))  # nothing there yet
    train(layer, optimizer)
    moments = check_optimizer_state(optimizer, layer.values)
    assert len(moments) == count
    before = [moment.clone() for moment in moments]
    of_bias = copy.deepcopy(optimizer.state[layer.bias])
    slots = torch.arange(0, nnzb, 3)
    kept = torch.ones(nnzb, dtype=torch.bool)
    kept[slots] = False
    clear_moments_(optimizer, layer.values, slots)
    for old, new in zip(before, moments, strict=True):
        assert old[slots].abs().sum() > 0
        assert new[slots].abs().sum() == 0
        assert torch.equal(old[kept], new[kept])
    torch.testing.assert_close(optimizer.state[layer.bias], of_bias, rtol=0, atol=0)
    train(layer, optimizer)
    assert all(bool(torch.isfinite(moment).all()) for moment in moments)


@pytest.mark.parametrize(
    ("state", "received"),
    [
        (torch.zeros(3, 3), r"torch.float32 of shape \(3, 3\)"),
        (torch.zeros(8, dtype=torch.uint8), r"torch.uint8 of shape \(8,\)"),
        ([1.0, 2.0], "list"),
        ("blocks", "str"),
    ],
)
def test_unknown_state_is_an_error_that_changes_nothing(state: object, received: str) -> None:
    layer = make_layer()
    optimizer = Correlated(layer.parameters(), state)
    train(layer, optimizer)
    momentum = optimizer.state[layer.values]["momentum_buffer"].clone()
    index, values = layer.block_index.clone(), layer.values.detach().clone()
    message = rf"one row per block \(8\). Got 'extra': {received} in Correlated. .* such as AdamW"
    with pytest.raises(TypeError, match=message):
        clear_moments_(optimizer, layer.values, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=message):
        prune_regrow_(layer, optimizer, pruning_ratio=0.5)
    assert torch.equal(optimizer.state[layer.values]["momentum_buffer"], momentum)
    assert torch.equal(layer.block_index, index)
    assert torch.equal(layer.values, values)


def test_group_lasso_by_hand() -> None:
    # Two 2 x 2 blocks of norm 5 and 1: each loses 0.1 * 3 * 0.02 * sqrt(2) along itself.
    values = torch.tensor([[[3.0, 0.0], [0.0, -4.0]], [[0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64)
    step = 0.1 * 3 * 0.02 * math.sqrt(2)
    expected = torch.stack(
        [values[0] * (1 - step / math.sqrt(25 + 1e-6)), values[1] * (1 - step / math.sqrt(1 + 1e-6))]
    )
    group_lasso_(values, learning_rate=0.1, strength=3)
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("shape", "side"), [((1, 1), 1), ((4, 4), 4), ((1, 4), 2), ((2, 8), 4)])
def test_group_lasso_against_the_formula(shape: tuple[int, int], side: float) -> None:
    values = torch.randn(5, *shape, generator=generator(), dtype=torch.float64)
    expected = values.clone()
    for block in expected:
        norm = math.sqrt(sum(entry.item() ** 2 for entry in block.flatten()) + 1e-6)
        block -= 0.01 * 2 * 0.05 * math.sqrt(side) * block.clone() / norm
    group_lasso_(values, 0.01, 2, weight_std=0.05)
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-15)


def test_group_lasso_works_on_a_parameter_and_leaves_zero_alone() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.values[0] = 0
    group_lasso_(layer.values, 0.1, 1.0)
    assert layer.values[0].abs().sum() == 0
    assert layer.values.requires_grad
    assert layer.values.grad is None
