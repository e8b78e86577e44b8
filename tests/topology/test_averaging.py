"""Averages of weights follow blocks: compared with the average of the dense weight."""

from typing import Any

import pytest
import torch
from helpers import dense_weight, generator, make_layer
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hf_dynsparse import DynSparseBertForMaskedLM, TopologyAverage, TopologyUpdater, sparse_layers
from tests.toy import toy_batch, toy_model


def two_layers() -> nn.Sequential:
    return nn.Sequential(make_layer((4, 6), 4, 8, seed=1), nn.Tanh(), make_layer((3, 4), 4, 5, seed=2))


def dense_weights(model: nn.Module) -> list[torch.Tensor]:
    return [dense_weight(layer.values, layer.block_index, layer.shape) for layer in sparse_layers(model).values()]


def averaged_run(model: nn.Module, average: TopologyAverage, decay: float | None, **settings: Any) -> float:
    """
    Train with updates and average after each step; the largest relative error of the average of a layer, on its active
    blocks, to that of the dense weight.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    updater = TopologyUpdater(model, optimizer, total_steps=12, regrow_rule="unfired", **settings)
    dense: list[torch.Tensor] = []
    for step in range(1, 13):
        model(torch.randn(5, 24, generator=generator(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step(step)
        average.update_parameters(model)
        now = dense_weights(model)
        weight = 1 - decay if decay is not None else 1 / step
        dense = [a.lerp(b, weight) for a, b in zip(dense, now, strict=True)] if dense else now
    errors = []
    layers = zip(sparse_layers(average.module).values(), sparse_layers(model).values(), dense, strict=True)
    for averaged, layer, expected in layers:
        assert torch.equal(averaged.block_index, layer.block_index)
        active = dense_weight(torch.ones_like(layer.values), layer.block_index, layer.shape)
        got = dense_weight(averaged.values, averaged.block_index, layer.shape)
        errors.append(float((got - expected * active).norm() / (expected * active).norm()))
    return max(errors)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_topology_updates": 4, "pruning_ratio": 0.3},
        {"num_topology_updates": 4, "pruning_ratio": 0.0, "density_schedule": "cubic", "initial_sparsity": 0.2},
    ],
    ids=["exchange", "shrink"],
)
@pytest.mark.parametrize("decay", [0.9, None])
def test_the_average_is_that_of_the_dense_weight(decay: float | None, settings: dict[str, Any]) -> None:
    model = two_layers()
    average = TopologyAverage(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    assert averaged_run(model, average, decay, **settings) < 1e-6


def test_blocks_that_move_slots_keep_their_average_and_new_ones_begin_at_zero() -> None:
    model = nn.Sequential(make_layer((2, 2), 2, 2))
    layer = model[0]
    average = TopologyAverage(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    kept = layer.values[1].detach().clone()
    kept_id = int(layer.block_index[1])
    new_id = next(place for place in range(4) if place not in layer.block_index)
    with torch.no_grad():
        layer.block_index.copy_(torch.tensor([kept_id, new_id]))
        layer.values.fill_(1.0)
    average.update_parameters(model)
    expected = torch.stack([0.9 * kept + 0.1, torch.full((2, 2), 0.1)])
    torch.testing.assert_close(average.module[0].values.detach(), expected)


@pytest.mark.parametrize("begun_before", [True, False])
def test_the_averaged_model_is_plain_and_can_be_saved(tmp_path: Any, begun_before: bool) -> None:
    # Whether it was made before or after the model has begun to record, and though the model has become smaller.
    model = toy_model(sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"num_topology_updates": 1, "density_schedule": "cubic", "final_sparsity": 0.75}
    average = TopologyAverage(model) if begun_before else None
    updater = TopologyUpdater(model, optimizer, total_steps=2, **settings)
    average = average or TopologyAverage(model)
    model(**toy_batch()).loss.backward()
    average.update_parameters(model)
    updater.step(1)
    recorded = dict(model.named_buffers()).keys()
    model.config.sparsity = 0.75  # as `TopologyCallback` does
    average.update_parameters(model)
    assert dict(model.named_buffers()).keys() == recorded
    average.module.save_pretrained(tmp_path)
    loaded, info = DynSparseBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, layer in sparse_layers(loaded).items():
        assert torch.equal(layer.block_index, sparse_layers(model)[name].block_index)


def test_weights_that_are_split_between_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dynsparse.topology.averaging.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match=r"must be whole on every rank. Got `bert\.encoder.*, which is split"):
        TopologyAverage(toy_model())
