"""AdamW with an age for every block: as torch's where nothing is replaced, and as Adam starts where something is."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generator, make_layer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy import toy_arguments, toy_model, toy_trainer

from hf_dynsparse import TopologyUpdater, sparse_layers
from hf_dynsparse.nn.shards import load_whole_model_, load_whole_optimizer_, whole, whole_optimizer_state
from hf_dynsparse.optim.block_adam import BlockAdamW
from hf_dynsparse.optim.groups import parameter_groups
from hf_dynsparse.optim.moments import clear_moments_
from hf_dynsparse.topology import TopologySettings


RATE = 1e-2
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]
AGED, STOCK = BlockAdamW, torch.optim.AdamW


def factor(age: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """Length of the step of age `age` under a constant gradient if no bias is corrected, in learning rates."""
    return (1 - beta1**age) / math.sqrt(1 - beta2**age)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for seed in steps:
        optimizer.zero_grad()
        model(torch.randn(5, 24, generator=generator(seed)).to(dtype)).square().sum().backward()
        optimizer.step()


def step_lengths(optimizer: torch.optim.Optimizer, values: torch.Tensor, steps: int) -> torch.Tensor:
    """Mean length of each step under a gradient of ones, by block: of shape `(steps, nnzb)`."""
    lengths = []
    for _ in range(steps):
        before = values.detach().clone()
        values.grad = torch.ones_like(values)
        optimizer.step()
        lengths.append((before - values.detach()).mean((1, 2)))
    return torch.stack(lengths)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("warmup", [0, 5])
def test_without_replaced_blocks_the_steps_are_those_of_adamw(kernel: dict[str, bool], warmup: int) -> None:
    layers = {cls: make_layer((4, 6), 4, 8) for cls in (AGED, STOCK)}
    for cls, layer in layers.items():
        options = {"new_block_warmup": warmup, **kernel} if cls is AGED else kernel
        train(layer, cls(parameter_groups(layer, 0.1), lr=RATE, **options), range(40))
    torch.testing.assert_close(layers[AGED].values, layers[STOCK].values, rtol=2e-6, atol=1e-7)
    # The bias differs by what the values differ; with the same gradients it is stepped by the same kernel.
    torch.testing.assert_close(layers[AGED].bias, layers[STOCK].bias, rtol=2e-6, atol=1e-7)
    dense = {cls: nn.Linear(3, 2) for cls in (AGED, STOCK)}
    dense[AGED].load_state_dict(dense[STOCK].state_dict())
    for cls, linear in dense.items():
        optimizer = cls(parameter_groups(linear), lr=RATE, **kernel)
        for seed in range(3):
            linear(torch.randn(4, 3, generator=generator(seed))).square().sum().backward()
            optimizer.step()
    assert torch.equal(dense[AGED].weight, dense[STOCK].weight)


def test_a_new_block_steps_as_in_a_young_run_and_too_far_with_the_age_of_the_run() -> None:
    """The closed form `r(a) / r(t)`: after a thousand steps 2.5 times as far at first, 5.2 times after a dozen."""
    lengths = {}
    for cls in (AGED, STOCK):
        values = nn.Parameter(torch.zeros(3, 2, 2, dtype=torch.float64))
        optimizer = cls([{"params": [values], "per_block": True}], lr=RATE, eps=0.0, weight_decay=0.0)
        step_lengths(optimizer, values, 1000)
        clear_moments_(optimizer, values, torch.tensor([1]))
        lengths[cls] = step_lengths(optimizer, values, 50) / RATE
    expected = torch.tensor([factor(age) / factor(1000 + age) for age in range(1, 51)])
    torch.testing.assert_close(lengths[STOCK][:, 1].float(), expected, rtol=1e-5, atol=0)
    assert expected[0] == pytest.approx(2.51, abs=0.01)
    assert expected.max() == expected[11] == pytest.approx(5.24, abs=0.01)
    torch.testing.assert_close(lengths[AGED], torch.ones(50, 3, dtype=torch.float64), rtol=1e-6, atol=0)
    # In the limit of a long run, as documented.
    assert [factor(age) for age in (1, 12, 270)] == pytest.approx([3.16, 6.57, 2.06], abs=0.01)


def test_the_rate_of_new_blocks_rises_and_of_no_others() -> None:
    values = nn.Parameter(torch.zeros(3, 2, 2))
    groups = [{"params": [values], "per_block": True}]
    optimizer = BlockAdamW(groups, lr=RATE, eps=0.0, weight_decay=0.0, new_block_warmup=3)
    started = step_lengths(optimizer, values, 5)
    clear_moments_(optimizer, values, torch.tensor([0, 2]))
    assert optimizer.state[values]["age"].flatten().tolist() == [0, 5, 0]
    replaced = step_lengths(optimizer, values, 5)
    torch.testing.assert_close(started, torch.full((5, 3), RATE))
    new = [RATE * share for share in (0.25, 0.5, 0.75, 1.0, 1.0)]
    torch.testing.assert_close(replaced, torch.tensor([new, [RATE] * 5, new]).T, rtol=1e-5, atol=0)
    assert optimizer.state[values]["age"].flatten().tolist() == [5, 10, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [make_layer((4, 6), 4, 8).to(dtype) for _ in range(2)]
    first, second = (BlockAdamW(parameter_groups(layer), lr=RATE, fused=True, new_block_warmup=3) for layer in layers)
    train(layers[0], first, range(300))  # bfloat16 has no 299
    clear_moments_(first, layers[0].values, torch.tensor([1, 5]))
    train(layers[0], first, range(1))
    layers[1].load_state_dict(layers[0].state_dict())
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for layer, optimizer in zip(layers, (first, second), strict=True):
        train(layer, optimizer, range(301, 304))
    for one, two in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(one, two)
    ages = second.state[layers[1].values]["age"]
    assert ages.dtype == torch.float32
    assert ages.flatten().tolist() == [304, 4, 304, 304, 304, 4, 304, 304]
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_moments_that_adamw_has_saved_are_as_old_as_the_run() -> None:
    layer, twin = make_layer(), make_layer()
    stock = torch.optim.AdamW([layer.values], lr=RATE)
    train(layer, stock, range(7))
    aged = BlockAdamW([{"params": [twin.values], "per_block": True}], lr=RATE)
    aged.load_state_dict(copy.deepcopy(stock.state_dict()))
    twin.load_state_dict(layer.state_dict())
    train(layer, stock, range(7, 9))
    train(twin, aged, range(7, 9))
    assert aged.state[twin.values]["age"].flatten().tolist() == [9.0] * 8
    torch.testing.assert_close(twin.values, layer.values, rtol=2e-6, atol=1e-7)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_ages(one_rank: None) -> None:
    """FSDP2 on one rank, with updates and a stop in between: all numbers are those of whole layers."""
    models = {name: nn.Sequential(make_layer((4, 6), 4, 9), nn.Tanh()) for name in ("plain", "sharded", "resumed")}
    fully_shard(models["sharded"])
    fully_shard(models["resumed"])
    optimizers = {
        name: BlockAdamW(parameter_groups(model), lr=RATE, new_block_warmup=2) for name, model in models.items()
    }
    settings = TopologySettings(topology_update_every=2)
    updaters = {name: TopologyUpdater(model, optimizers[name], 8, settings) for name, model in models.items()}

    def run(name: str, steps: range) -> None:
        for step in steps:
            train(models[name], optimizers[name], range(step, step + 1))
            updaters[name].step(step)

    run("plain", range(1, 5))
    run("sharded", range(1, 5))
    saved = copy.deepcopy(whole_optimizer_state(optimizers["sharded"]))
    assert sorted(set(saved["state"][0]["age"].flatten().tolist())) == [0, 2, 4]
    load_whole_model_(models["resumed"], copy.deepcopy(models["plain"].state_dict()))
    load_whole_optimizer_(optimizers["resumed"], saved)
    assert isinstance(optimizers["resumed"].state[models["resumed"][0].values]["age"], DTensor)
    for name, model in models.items():
        run(name, range(5, 9))
        for key, tensor in model.state_dict().items():
            assert torch.equal(whole(tensor), models["plain"].state_dict()[key])
        ages = whole_optimizer_state(optimizers[name])
        torch.testing.assert_close(ages, whole_optimizer_state(optimizers["plain"]), rtol=0, atol=0)


def test_a_gradient_scaler_leaves_out_a_step_with_infinity() -> None:
    layer = make_layer()
    before = layer.values.detach().clone()
    optimizer = BlockAdamW(parameter_groups(layer, weight_decay=0.0), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(layer(torch.full((5, layer.in_features), 1e3)).square().sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(layer.values, before)
    scaler.update(4.0)
    optimizer.zero_grad()
    scaler.scale(layer(torch.ones(5, layer.in_features)).square().sum()).backward()
    scaler.step(optimizer)
    moved = (layer.values.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, RATE), rtol=1e-4, atol=0)


def test_negative_warmup() -> None:
    with pytest.raises(ValueError, match="`new_block_warmup` must not be negative. Got -1. 0 turns it off"):
        BlockAdamW([nn.Parameter(torch.ones(1))], new_block_warmup=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_block_warmup": 5}, "goes by the ages of blocks. Got 5 .* give `block_age_adam=True`"),
        ({"new_block_warmup": -5}, "`new_block_warmup` must not be negative. Got -5"),
        ({"dense_learning_rate": -1e-3}, "`dense_learning_rate` must not be negative. Got -0.001"),
        ({"block_age_adam": True, "optim": "sgd"}, "must be adamw_torch_fused or adamw_torch. Got sgd. Leave it out"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        toy_arguments(tmp_path, **arguments)


def test_smet_brings_ages_and_their_warmup_unless_told_otherwise(tmp_path: Path) -> None:
    def of(**given: Any) -> tuple[bool, int]:
        args = toy_arguments(tmp_path, num_topology_updates=None, **given)
        return args.block_age_adam, args.new_block_warmup

    assert of() == (False, 0)
    assert of(method="smet") == (True, 100)
    assert of(method="smet", new_block_warmup=5) == (True, 5)
    assert of(method="smet", block_age_adam=False) == (False, 0)


def test_the_trainer_groups_parameters_and_the_schedule_scales_both_rates(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, dense_learning_rate=2e-3, optim="adamw_torch", warmup_steps=4)
    trainer.create_optimizer_and_scheduler(12)
    assert type(trainer.optimizer) is torch.optim.AdamW
    values = [layer.values for layer in sparse_layers(trainer.model).values()]
    groups = trainer.optimizer.param_groups
    assert groups[0]["params"] == values
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01, 0.0]
    for share in (0.0, 0.25, 0.5):  # of the warm-up
        assert [group["lr"] for group in groups] == pytest.approx([1e-2 * share, 2e-3 * share, 2e-3 * share])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_a_trainer_resumes_ages_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **{"block_age_adam": True, "new_block_warmup": 2, "dense_learning_rate": 2e-3},
        **{"save_strategy": "steps", "save_steps": 6},
    }
    whole_run = toy_trainer(tmp_path / "whole", toy_model(), **options)
    whole_run.train()
    resumed = toy_trainer(tmp_path / "resumed", toy_model(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    state, expected = resumed.model.state_dict(), whole_run.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    moments = [run.optimizer.state_dict()["state"] for run in (resumed, whole_run)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)
    assert {float(age) for age in moments[0][0]["age"].flatten()} == {3.0, 6.0, 9.0, 12.0}
    assert whole_run.state.log_history[1]["learning_rate"] == pytest.approx(1e-2)
