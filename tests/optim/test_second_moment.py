"""The second moment by the age of a block, whoever keeps it; and who is refused for not keeping one."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import generator, make_layer
from torch import nn
from transformers.optimization import Adafactor

from hf_dynsparse import BlockAdamW, TopologyUpdater, parameter_groups, prune_regrow_
from hf_dynsparse.optim.moments import clear_moments_
from hf_dynsparse.optim.second_moment import check_second_moment, second_moment
from hf_dynsparse.topology.exploration import ages_in_steps


GRADIENT = torch.tensor([[[1.0, -2.0]], [[3.0, 0.5]], [[-1.0, 4.0]]])
AGES = torch.tensor([torch.inf, 3, torch.inf])


def after_steps(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> None:
    """Five steps of a constant gradient, an update that replaces the block of slot 1, and three more."""
    for step in range(8):
        if step == 5:
            clear_moments_(optimizer, values, torch.tensor([1]))
        values.grad = GRADIENT.to(values.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": False, "amsgrad": True}),
        (torch.optim.NAdam, {}),
        (BlockAdamW, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_constant_gradient_gives_its_square_at_any_age(optimizer_class: Any, options: dict[str, Any]) -> None:
    values = nn.Parameter(torch.zeros(3, 1, 2))
    optimizer = optimizer_class([{"params": [values], "per_block": True}], betas=(0.9, 0.99), **options)
    assert torch.equal(second_moment(optimizer, values, AGES), torch.zeros(3, 1, 2))
    assert not optimizer.state  # a trial leaves no trace
    after_steps(optimizer, values)
    torch.testing.assert_close(second_moment(optimizer, values, AGES), GRADIENT.square())
    by_the_age_of_the_run = torch.tensor([1.0, (1 - 0.99**3) / (1 - 0.99**8), 1.0]).view(3, 1, 1)
    if optimizer_class is BlockAdamW:  # it knows the ages itself
        by_the_age_of_the_run = torch.ones(3, 1, 1)
    torch.testing.assert_close(second_moment(optimizer, values), GRADIENT.square() * by_the_age_of_the_run)


@pytest.mark.parametrize(
    "optimizer_class",
    [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Adafactor, Adafactor],
    ids=lambda cls: f"{cls.__module__}.{cls.__name__}",
)
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_without_one_is_refused(optimizer_class: Any, stepped: bool) -> None:
    layer = make_layer(tracked=True)
    optimizer = optimizer_class(
        layer.parameters(), lr=1e-2, **({"relative_step": False} if optimizer_class is Adafactor else {})
    )
    if stepped:
        layer(torch.ones(1, layer.in_features)).sum().backward()
        optimizer.step()
    before = layer.block_index.clone()
    name = optimizer_class.__name__
    with pytest.raises(ValueError, match=f"`exp_avg_sq`, by `betas`. Got {name} for `first.values`. Use AdamW"):
        TopologyUpdater(nn.ModuleDict({"first": layer}), optimizer, 10, num_topology_updates=2, prune_score="fisher")
    with pytest.raises(ValueError, match=f"Got {name} for `values`"):
        prune_regrow_(layer, optimizer, prune_score="fisher")
    with pytest.raises(ValueError, match="prune_score='fisher' looks at the second moment. Got no optimizer"):
        prune_regrow_(layer, prune_score="fisher")
    assert torch.equal(layer.block_index, before)


def test_one_that_accelerate_wraps_serves() -> None:
    values = nn.Parameter(torch.zeros(3, 1, 2))
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW([values], betas=(0.9, 0.99)))
    check_second_moment(optimizer, values)
    after_steps(optimizer, values)
    torch.testing.assert_close(second_moment(optimizer, values, AGES), GRADIENT.square())
    with pytest.raises(ValueError, match="Got SGD"):
        check_second_moment(Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD([values])), values)


@pytest.mark.parametrize("method", ["dynsparse", "rigl"])
def test_ages_of_a_run_are_those_that_block_adam_counts(method: str) -> None:
    """Steps that an update takes the place of (RigL) do not count."""
    layer = make_layer((6, 6), 2, 18)
    optimizer = BlockAdamW(parameter_groups(layer), lr=1e-2)
    updater = TopologyUpdater(
        layer, optimizer, 16, method=method, topology_update_every=3, regrow_rule="random", prune_score="fisher"
    )
    seen = set[float]()
    for step in range(1, 16):
        layer(torch.randn(4, 12, generator=generator(step))).square().sum().backward()
        if updater.replaces_step(step):
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        if step in updater.update_steps:
            context = updater._context(updater.update_steps.index(step), updater.layers)
            age, steps = optimizer.state[layer.values]["age"].flatten(), optimizer.state[layer.values]["step"]
            assert torch.equal(ages_in_steps(layer, context.steps).clamp(max=steps), age)
            seen |= set(age.tolist())
        updater.step(step)
    assert len(seen) > 3
