"""Rows of a parameter that lie on several ranks. What several processes reach together: tests/invariants."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import generator, make_layer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_dynsparse import TopologyUpdater, group_lasso_
from hf_dynsparse.nn.shards import (
    gather_rows,
    load_whole_model_,
    load_whole_optimizer_,
    local_rows,
    whole,
    whole_optimizer_state,
    write_rows_,
)
from hf_dynsparse.optim.moments import clear_moments_


@pytest.fixture
def join() -> Iterator[Callable[..., None]]:
    """Join a process group: `join()` as its only rank, `join(rank, size)` of others that do not answer."""

    def join_group(rank: int = 0, size: int = 1) -> None:
        backend, store = ("gloo", torch.distributed.HashStore()) if size == 1 else ("fake", FakeStore())
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)

    yield join_group
    torch.distributed.destroy_process_group()


def shard(tensor: torch.Tensor, *placements: object, shape: tuple[int, ...]) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", shape), placements, src_data_rank=None)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("count", [8, 7, 5, 3, 1])
def test_rows_of_each_rank(join: Callable[..., None], rank: int, count: int) -> None:
    join(rank, 4)
    tensor = torch.randn(count, 2, 3, generator=generator())
    sharded = shard(tensor.clone(), Shard(0), shape=(4,))
    rows, first = local_rows(sharded)
    own = list(range(count))[rank * -(-count // 4) :][: -(-count // 4)]
    assert rows.shape == (len(own), 2, 3)
    assert torch.equal(rows, tensor[own])
    assert first == (own[0] if own else count)
    write_rows_(sharded, torch.arange(0, count, 2), 0.0)
    tensor[::2] = 0
    assert torch.equal(local_rows(sharded)[0], tensor[own])
    new = torch.randn(2, 2, 3, generator=generator(1), dtype=torch.float64)
    places = torch.tensor([count - 1, 0])[: min(count, 2)]
    write_rows_(sharded, places, new[: len(places)])
    tensor[places] = new[: len(places)].float()
    assert torch.equal(local_rows(sharded)[0], tensor[own])


@pytest.mark.parametrize("rank", range(4))
def test_rows_of_replicas(join: Callable[..., None], rank: int) -> None:
    join(rank, 4)
    tensor = torch.arange(10.0).view(5, 2)
    rows, first = local_rows(shard(tensor, Replicate(), Shard(0), shape=(2, 2)))
    assert (rows.tolist(), first) == (tensor[3 * (rank % 2) :][:3].tolist(), 3 * (rank % 2))
    rows, first = local_rows(shard(tensor, Replicate(), shape=(4,)))
    assert (rows.tolist(), first) == (tensor.tolist(), 0)


@pytest.mark.parametrize(("placements", "shape"), [((Shard(1),), (4,)), ((Shard(0), Shard(0)), (2, 2))], ids=str)
def test_other_splits_are_refused(
    join: Callable[..., None], placements: tuple[Shard, ...], shape: tuple[int, ...]
) -> None:
    join(0, 4)
    with pytest.raises(ValueError, match=r"split between ranks by rows only\. Got .*Shard"):
        local_rows(shard(torch.ones(8, 8), *placements, shape=shape))


def test_plain_tensors_are_all_here() -> None:
    tensor = torch.ones(3, 2)
    rows, first = local_rows(tensor)
    assert (rows.data_ptr(), first) == (tensor.data_ptr(), 0)
    assert whole(tensor) is tensor
    assert gather_rows(rows[:, 0], tensor).tolist() == [1, 1, 1]


class Network(nn.Module):
    """A sparse layer in a group of its own, and one in the root's, which stays whole after an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(make_layer((4, 6), 4, 9, seed=1), nn.Tanh())
        self.outer = make_layer((3, 4), 4, 5, seed=2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.outer(self.block(input)).tanh()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updater: TopologyUpdater, steps: range) -> None:
    for step in steps:
        input = torch.randn(5, 24, generator=generator(step))
        model(input).square().mean().backward()
        optimizer.step()
        for layer in updater.layers.values():
            group_lasso_(layer.values, 1e-2, 1.0)
        optimizer.zero_grad()
        with torch.no_grad():
            model(input)  # an evaluation between a step and its update
        updater.step(step)


@pytest.mark.parametrize(
    "settings",
    [
        {"regrow_rule": "gradient", "prune_score": "fisher"},
        {"regrow_rule": "correlation", "prune_score": "movement", "regrow_std": 0.01},
        {"regrow_rule": "rank_one_random", "prune_score": "saliency", "prune_min_age": 1},
    ],
    ids=lambda settings: settings["regrow_rule"],
)
def test_an_update_of_shards(join: Callable[..., None], settings: dict[str, object]) -> None:
    """On one rank all numbers are those of whole layers, bit for bit; a run that was stopped in between too."""
    join()
    plain, sharded, resumed = Network(), Network(), Network()
    for model in (sharded, resumed):
        fully_shard(model.block)
        fully_shard(model)
    assert isinstance(sharded.outer.values, DTensor)
    models = {"plain": plain, "sharded": sharded, "resumed": resumed}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-2) for name, model in models.items()}
    updaters = {
        name: TopologyUpdater(model, optimizers[name], 12, topology_update_every=3, **settings)
        for name, model in models.items()
    }
    for name in ("plain", "sharded"):
        train(models[name], optimizers[name], updaters[name], range(1, 7))
    moments = copy.deepcopy(whole_optimizer_state(optimizers["sharded"]))
    assert not any(isinstance(tensor, DTensor) for state in moments["state"].values() for tensor in state.values())
    load_whole_model_(resumed, copy.deepcopy(plain.state_dict()))
    load_whole_optimizer_(optimizers["resumed"], moments)
    for name in models:
        train(models[name], optimizers[name], updaters[name], range(7, 13))
        assert updaters[name].checksum() == updaters["plain"].checksum()
        for key, tensor in models[name].state_dict().items():
            assert torch.equal(whole(tensor), plain.state_dict()[key]), (name, key)
        torch.testing.assert_close(
            whole_optimizer_state(optimizers[name]), whole_optimizer_state(optimizers["plain"]), rtol=0, atol=0
        )
    assert updaters["plain"].coverage() > 0.6


def test_an_update_that_sees_a_shard_with_nan_is_skipped(join: Callable[..., None]) -> None:
    join()
    model = fully_shard(Network())
    updater = TopologyUpdater(model, torch.optim.SGD(model.parameters()), 2, num_topology_updates=1)
    local_rows(model.block[0].values)[0][3] = float("nan")
    assert updater.step(1) is None


def test_moments_that_are_not_split_are_cleared(join: Callable[..., None]) -> None:
    join()
    model = fully_shard(Network())
    optimizer = torch.optim.SGD(model.parameters())
    values = model.block[0].values
    optimizer.state[values] = {"rows": torch.ones(9, 4), "step": torch.tensor(3.0)}
    clear_moments_(optimizer, values, torch.tensor([2, 5]))
    assert optimizer.state[values]["rows"].sum(1).tolist() == [4, 4, 0, 4, 4, 0, 4, 4, 4]


def test_flattened_values_are_refused() -> None:
    model = Network()
    model.outer.values = nn.Parameter(model.outer.values.detach().flatten())
    with pytest.raises(ValueError, match=r"needs whole blocks\. Got `outer.values` of shape \(80,\) .* FSDP1"):
        TopologyUpdater(model, torch.optim.SGD(model.parameters()), 2, num_topology_updates=1)


def test_an_optimizer_of_other_parameters_is_refused(join: Callable[..., None]) -> None:
    join()
    model = Network()
    early = torch.optim.SGD(model.parameters())
    fully_shard(model)
    with pytest.raises(ValueError, match=r"must train the parameters .* Got one without `block.0.values`"):
        TopologyUpdater(model, early, 2, num_topology_updates=1)
