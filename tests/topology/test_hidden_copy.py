"""Pruned blocks that are remembered: what returns and what it holds, against a dense weight with a mask beside it."""

import re

import pytest
import torch
from helpers import generator, make_layer
from torch import nn

from hf_dynsparse import TopologyUpdater
from hf_dynsparse.blocks.sizes import count_active_blocks
from hf_dynsparse.optim.moments import check_optimizer_state
from hf_dynsparse.topology import Replacement, TopologySettings, UpdateContext, track_
from hf_dynsparse.topology.update import replace_blocks_


pytestmark = pytest.mark.usefixtures("deterministic")

STEPS = 40


def single_values(values: list[float]) -> nn.Module:
    """A layer of 1 x 1 blocks, all of them active."""
    layer = make_layer((1, len(values)), 1, len(values))
    with torch.no_grad():
        layer.values.copy_(torch.tensor(values).view(-1, 1, 1)[layer.block_index.long()])
    track_(layer, {"hidden_copy"})
    return layer


def choose(layer: nn.Module, nnzb: int, **options: object) -> Replacement:
    settings = TopologySettings(method="prune_ofa", **options)
    return UpdateContext(0, 0.0, settings, {"layer": layer}, {"layer": nnzb}, nnzb).choose("layer", nnzb)


def update(layer: nn.Module, nnzb: int) -> dict[int, float]:
    replace_blocks_(layer, choose(layer, nnzb))
    return dict(sorted(zip(layer.block_index.tolist(), layer.values.flatten().tolist(), strict=True)))


def test_a_block_returns_when_survivors_have_shrunk_below_it() -> None:
    layer = single_values([4.0, -3.0, 2.0, 1.0])
    assert update(layer, 2) == {0: 4.0, 1: -3.0}
    assert update(layer, 2) == {0: 4.0, 1: -3.0}  # a second look changes nothing
    with torch.no_grad():
        layer.values[layer.block_index == 0] = 1.5
    assert update(layer, 2) == {1: -3.0, 2: 2.0}
    with torch.no_grad():
        layer.values[layer.block_index == 2] = 0.5
    # What left last is remembered as it was then, and what returned before as it was pruned this time.
    assert update(layer, 2) == {0: 1.5, 1: -3.0}
    assert update(layer, 4) == {0: 1.5, 1: -3.0, 2: 0.5, 3: 1.0}


def test_ties_stay_and_what_was_never_active_is_zero() -> None:
    layer = make_layer((1, 5), 1, 2)
    track_(layer, {"hidden_copy"})
    with torch.no_grad():
        layer.values.zero_()
    before = layer.block_index.tolist()
    assert list(update(layer, 2)) == sorted(before)
    grown = update(layer, 4)
    assert set(before) < set(grown)
    assert set(grown.values()) == {0.0}


def test_choosing_changes_nothing() -> None:
    layer = single_values([4.0, -3.0, 2.0, 1.0])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    choose(layer, 2, prune_score="l2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("block_size", [1, (1, 4), 4], ids=str)
def test_a_run_is_that_of_a_dense_weight_with_a_mask(block_size: int | tuple[int, int]) -> None:
    """At each update the top blocks of the whole weight; between updates what is masked stands still."""
    rows, columns = (block_size, block_size) if isinstance(block_size, int) else block_size
    grid = (12 // rows, 16 // columns)
    layer = make_layer(grid, block_size, grid[0] * grid[1])
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    updater = TopologyUpdater(
        model, optimizer, STEPS, method="prune_ofa", topology_update_every=2, final_sparsity=0.75
    )
    blocks = torch.empty(layer.num_blocks, rows, columns)  # the dense weight, block by block
    returned = 0
    for step in range(1, STEPS + 1):
        input, goal = (torch.randn(6, side, generator=generator(10 * step + side)) for side in (16, 12))
        (model(input) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        blocks[layer.block_index.long()] = layer.values.detach()
        was = set(layer.block_index.tolist())
        updater.step(step)
        if step not in updater.update_steps:
            assert set(layer.block_index.tolist()) == was
            continue
        progress = min(1.0, step / STEPS / 0.5)
        nnzb = count_active_blocks(layer.num_blocks, 1 - (0.75 - 0.75 * (1 - progress) ** 3))
        best = set(blocks.abs().sum((1, 2)).sort(descending=True).indices[:nnzb].tolist())
        assert set(layer.block_index.tolist()) == best
        new = torch.tensor([place not in was for place in layer.block_index.tolist()])
        returned += int(new.sum())
        for moment in check_optimizer_state(optimizer, layer.values):
            assert not moment[new].any()
        assert torch.equal(layer.values, blocks[layer.block_index.long()])
    assert returned > 3
    assert updater.update_steps[-1] == 0.8 * STEPS
    assert layer.nnzb == count_active_blocks(layer.num_blocks, 1 - 0.75)


def test_a_block_is_forgotten_without_it() -> None:
    """The same run with active values alone never brings anything back."""
    layer = make_layer((12, 16), 1, 192)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    given = {"topology_update_every": 2, "final_sparsity": 0.75, "hidden_copy": False}
    updater = TopologyUpdater(model, optimizer, STEPS, method="prune_ofa", **given)
    for step in range(1, STEPS + 1):
        model(torch.randn(6, 16, generator=generator(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        was = set(layer.block_index.tolist())
        updater.step(step)
        assert set(layer.block_index.tolist()) <= was
    assert "hidden_values" not in layer.state_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prune_score": "mest"}, "prune_score='mest', which looks at something else. Choose l1, l2, linf."),
        ({"prune_score": "l1_patient"}, "prune_score='l1_patient'"),
        ({"prune_score": "random"}, "prune_score='random'"),
        ({"pruning_ratio": 0.1}, "nothing regrows beside it. Got density_schedule='cubic', pruning_ratio=0.1"),
        ({"allocation": "global"}, "allocation='global'"),
        ({"prune_min_age": 1}, "prune_min_age=1"),
        ({"density_schedule": "constant"}, "density_schedule='constant'"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TopologySettings(method="prune_ofa", **given)
