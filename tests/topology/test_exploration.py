"""Coverage and ages against plain bookkeeping."""

import pytest
import torch
from helpers import generator, make_layer, place_

from hf_dynsparse import prune_regrow_
from hf_dynsparse.topology import block_ages, dof_coverage, ever_active, track_
from hf_dynsparse.topology.exploration import is_tracked, newborn_slots, record_active_
from hf_dynsparse.topology.records import untrack_
from hf_dynsparse.topology.update import LayerUpdate


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 4), (3, 3), (5, 13)], ids=str)
def test_packing_against_a_boolean_map(grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1]
    layer = make_layer(grid, 1, max(1, total // 3), tracked=True)
    assert (layer.ever_active.dtype, layer.ever_active.numel()) == (torch.uint8, -(-total // 8))
    seen = torch.zeros(total, dtype=torch.bool)
    seen[layer.block_index.long()] = True
    assert dof_coverage([layer]) == layer.nnzb / total
    for seed in range(6):
        assert torch.equal(ever_active(layer), seen)
        assert dof_coverage([layer]) == int(seen.sum()) / total
        ids = torch.randperm(total, generator=generator(seed))[: layer.nnzb]
        record_active_(layer, ids.int() if seed % 2 else ids, torch.arange(ids.numel()), seed)
        seen[ids] = True


def test_coverage_is_the_mean_over_tensors() -> None:
    small, large = make_layer((2, 2), 1, 1, tracked=True), make_layer((10, 10), 1, 75, tracked=True)
    assert dof_coverage([small, large]) == (0.25 + 0.75) / 2


def test_buffers_come_and_go() -> None:
    layer = make_layer()
    names = list(layer.state_dict())
    assert not is_tracked(layer)
    with pytest.raises(ValueError, match=r"Call `track_\(layer\)` first"):
        ever_active(layer)
    track_(layer)
    assert is_tracked(layer)
    assert list(layer.state_dict()) == [*names, "ever_active", "active_since"]
    untrack_(layer)
    assert not is_tracked(layer)
    assert list(layer.state_dict()) == names


def test_ages_and_newborns_by_hand() -> None:
    layer = place_(make_layer((4, 4), 1, 4), [0, 5, 10, 15], [4.0, 3.0, 2.0, 1.0])
    track_(layer)
    assert block_ages(layer, 0).tolist() == [0, 0, 0, 0]
    # The first update removes slots 2 and 3: nothing is newborn yet.
    assert prune_regrow_(layer, pruning_ratio=0.5, update=0) == LayerUpdate(2, 0)
    assert block_ages(layer, 1).tolist() == [1, 1, 0, 0]
    assert dof_coverage([layer]) == 6 / 16
    # The newborn of slot 2 grew, that of slot 3 did not; slot 1 shrank.
    place_(layer, layer.block_index, [4.0, 0.1, 5.0, 0.0])
    assert prune_regrow_(layer, pruning_ratio=0.5, update=1, generator=generator(1)) == LayerUpdate(2, 1, newborn=2)
    assert block_ages(layer, 2).tolist() == [2, 0, 1, 0]
    # Slots 1 and 3 are zero and newborn; the next lowest is slot 0.
    assert prune_regrow_(layer, pruning_ratio=0.75, update=2, generator=generator(2)) == LayerUpdate(3, 2, newborn=2)
    assert block_ages(layer, 3).tolist() == [0, 0, 2, 0]
    # After an update was skipped, nothing is newborn.
    assert prune_regrow_(layer, pruning_ratio=1.0, update=4, generator=generator(3)) == LayerUpdate(4, 0)


def test_unfired_goes_everywhere_before_it_returns() -> None:
    layer = make_layer((4, 5), 1, 4, tracked=True)
    for update in range(4):
        assert dof_coverage([layer]) == pytest.approx((update + 1) * 4 / 20)
        prune_regrow_(layer, pruning_ratio=1.0, regrow_rule="unfired", update=update, generator=generator(update))
    assert dof_coverage([layer]) == 1.0
    prune_regrow_(layer, pruning_ratio=1.0, regrow_rule="unfired", update=4)
    layer.layout.validate()


def test_newborn_are_those_of_the_last_update_only():
    layer = make_layer((2, 3), 4, 4)
    track_(layer)
    assert not newborn_slots(layer).any()
    layer.active_since.copy_(torch.tensor([0, 1, 2, 2]))
    assert newborn_slots(layer).tolist() == [False, False, True, True]
