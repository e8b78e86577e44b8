"""What the regrow rules beyond the paper are for, and the statistics they go by."""

import pytest
import torch
from helpers import SCORES_AND_RULES, blocks_of, generator, make_layer
from torch import nn
from torch.nn.functional import linear

from hf_dynsparse import BlockSparseLinear, TopologyUpdater, prune_regrow_
from hf_dynsparse.optim.moments import check_optimizer_state
from hf_dynsparse.topology import SCORES, BlockStatistics, TopologySettings
from hf_dynsparse.topology.dense_gradient import DenseGradientProbe


pytestmark = pytest.mark.usefixtures("deterministic")

BY_GRADIENT = {"gradient", "gradient_normalised", "correlation", "gradient_random", "weight_gradient", "mest"}
BY_SCALES = {"rank_one", "rank_one_random"}


@pytest.mark.parametrize("block_size", [1, 4, (1, 4), (4, 2)], ids=str)
def test_the_probe_measures_every_channel(block_size: object) -> None:
    layer = make_layer((3, 4), block_size, 5)
    inputs = [torch.randn(2, 7, layer.in_features, generator=generator(seed)) for seed in range(2)]
    outer = torch.randn(layer.out_features, generator=generator(5))
    probe = DenseGradientProbe([layer])
    for input in inputs:
        (layer(input) * outer).square().sum().backward()
    padding = 10 * torch.randn(3, layer.in_features, generator=generator(6))
    (layer(padding) * torch.zeros(3, 1)).sum().backward()
    x = torch.cat(inputs).view(-1, layer.in_features)
    d = 2 * outer.square() * linear(x, layer.to_dense(), layer.bias).detach()
    everything = torch.arange(layer.num_blocks)
    norms = {"input_scale": torch.ones(layer.shape) * x.norm(dim=0), "output_scale": d.norm(dim=0)[:, None]}
    needs = frozenset({"gradient", "input_scale", "output_scale"})
    fields = probe.statistics(layer, needs)
    assert fields.keys() == needs
    assert probe.statistics(layer, frozenset({"values"})) == {}
    for name, norm in norms.items():
        expected = blocks_of(norm.expand(layer.shape), everything, layer.block_shape)
        torch.testing.assert_close(fields[name].expand_as(expected), expected)
    correlation = (d.T @ x) / d.norm(dim=0)[:, None] / x.norm(dim=0)
    torch.testing.assert_close(
        fields["gradient"] / fields["input_scale"] / fields["output_scale"],
        blocks_of(correlation, everything, layer.block_shape),
    )
    assert correlation.abs().max() <= 1
    bound = SCORES["rank_one"].function(BlockStatistics(layer.num_blocks, generator(), x.device, **fields))
    assert (fields["gradient"].square().sum((1, 2)).sqrt() <= bound).all()
    probe.remove()
    assert not probe.squares


def regrown_columns(rule: str, block_size: int, outlier: float) -> list[int]:
    """Block columns of what one update regrows where one input channel, in block column 2, is an `outlier`."""
    layer = BlockSparseLinear(16 * block_size, 16 * block_size, block_size, sparsity=0.9)
    layer.reset_parameters(generator=generator())
    before = set(layer.block_index.tolist())
    updater = TopologyUpdater(
        layer, torch.optim.SGD(layer.parameters()), total_steps=2, num_topology_updates=1, regrow_rule=rule
    )
    input = torch.randn(64, layer.in_features, generator=generator(1))
    input[:, 2 * block_size] *= outlier
    (layer(input) - torch.randn(64, layer.out_features, generator=generator(2))).square().sum().backward()
    updater.step(1)
    return sorted(place % 16 for place in set(layer.block_index.tolist()) - before)


@pytest.mark.parametrize("block_size", [1, 4])
def test_an_input_that_is_an_outlier_draws_regrowth_by_gradient_alone(block_size: int) -> None:
    for rule, share in {"gradient": 0.9, "gradient_random": 0.6, "rank_one": 0.9}.items():
        columns = regrown_columns(rule, block_size, 30.0)
        assert len(columns) == 13
        assert columns.count(2) >= share * 13
    assert 3 < regrown_columns("rank_one_random", block_size, 30.0).count(2) < 13
    for rule in ("gradient_normalised", "correlation"):
        columns = regrown_columns(rule, block_size, 30.0)
        assert len(columns) == 13
        assert columns.count(2) <= 3


@pytest.mark.parametrize("factor", [2.0**5, 2.0**-5])
def test_the_scale_of_a_channel_does_not_matter_where_it_is_divided_out(factor: float) -> None:
    """To the last bit, as powers of two round nothing."""
    draw = generator()
    fields = {
        "gradient": torch.randn(20, 2, 3, generator=draw),
        "input_scale": 1 + torch.rand(20, 1, 3, generator=draw),
        "output_scale": 1 + torch.rand(20, 2, 1, generator=draw),
    }
    changes = {"input_scale": torch.tensor([factor, 1.0, 1.0]), "output_scale": torch.tensor([[factor], [1.0]])}
    blind = {"gradient": (), "gradient_normalised": ("input_scale",), "correlation": tuple(changes)}
    for scale, change in changes.items():
        scaled = fields | {"gradient": fields["gradient"] * change, scale: fields[scale] * change}
        for rule, unseen in blind.items():
            scores = [
                SCORES[rule].function(BlockStatistics(20, draw, torch.device("cpu"), **given))
                for given in (fields, scaled)
            ]
            assert torch.equal(*scores) == (scale in unseen)


@pytest.mark.parametrize(
    ("grid", "nnzb", "readmit"),
    [((16, 16), 26, False), ((16, 16), 26, True), ((64, 16), 102, False), ((16, 64), 102, True), ((6, 5), 12, False)],
)
def test_balanced_leaves_no_row_and_no_column_empty(grid: tuple[int, int], nnzb: int, readmit: bool) -> None:
    layer = make_layer(grid, 1, nnzb)
    empty = [(~layer.layout.to_mask().any(side)).sum() for side in (0, 1)]
    assert sum(empty) > 0
    for update in range(2):
        prune_regrow_(
            layer,
            pruning_ratio=0.5,
            prune_score="random",
            regrow_rule="balanced",
            readmit=readmit,
            generator=generator(update),
        )
    after = layer.layout.to_mask()
    for side in (0, 1):
        assert after.any(side).all()
        assert after.sum(side).max() <= 1.5 * nnzb / after.shape[1 - side] + 2


def test_balanced_draws_differently_with_every_generator() -> None:
    layers = [make_layer((16, 16), 1, 26) for _ in range(3)]
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        prune_regrow_(layer, pruning_ratio=0.5, regrow_rule="balanced", generator=generator(seed))
    assert torch.equal(layers[0].block_index, layers[1].block_index)
    assert not torch.equal(layers[0].block_index, layers[2].block_index)


def test_three_of_four_by_gradient_is_exact() -> None:
    layer = make_layer((20, 20), 1, 40)
    free = torch.ones(400).index_fill(0, layer.block_index.long(), 0)
    gradient = torch.rand(400, generator=generator(1)).view(-1, 1, 1)
    best = set((gradient.flatten() * free).topk(18).indices.tolist())  # 3/4 of 24
    before = set(layer.block_index.tolist())
    prune_regrow_(layer, pruning_ratio=0.6, regrow_rule="gradient_random", dense_gradient=gradient)
    new = set(layer.block_index.tolist()) - before
    assert len(new) == 24
    assert best < new


def test_a_dense_gradient_is_collected_only_where_it_is_needed() -> None:
    for prune_score, regrow_rule in SCORES_AND_RULES:
        settings = TopologySettings(num_topology_updates=1, prune_score=prune_score, regrow_rule=regrow_rule)
        layer = make_layer()
        updater = TopologyUpdater(layer, torch.optim.AdamW(layer.parameters()), 2, settings)
        dense = bool({prune_score, regrow_rule} & {*BY_GRADIENT, "momentum"})
        assert (updater._probe is not None) == (dense or regrow_rule in BY_SCALES)
        assert (updater.observed_positions > 0) == dense
    assert {name for name, score in SCORES.items() if "gradient" in score.needs} == BY_GRADIENT


def test_values_of_new_blocks_by_standard_deviation() -> None:
    layers = [make_layer((40, 40), 4, 200) for _ in range(4)]
    optimizers = [torch.optim.AdamW(layer.parameters()) for layer in layers]
    for layer, optimizer, (std, seed) in zip(
        layers, optimizers, ((0, 1), (0.02, 1), (0.02, 1), (0.02, 2)), strict=True
    ):
        layer(torch.randn(3, 160, generator=generator())).sum().backward()
        optimizer.step()
        old, before = layer.block_index.clone(), layer.values.detach().clone()
        prune_regrow_(layer, optimizer, pruning_ratio=0.5, regrow_std=std, generator=generator(seed))
        new = layer.block_index != old
        assert int(new.sum()) == 100
        assert torch.equal(layer.values[~new], before[~new])
        assert all(not moment[new].any() for moment in check_optimizer_state(optimizer, layer.values))
        drawn = layer.values[new].detach()
        assert float(drawn.std()) == pytest.approx(std, rel=0.1)
        assert abs(float(drawn.mean())) <= 5 * std / 40
    # Where blocks grow does not depend on what they start with.
    assert torch.equal(layers[0].block_index, layers[1].block_index)
    assert torch.equal(layers[1].values, layers[2].values)
    assert not torch.equal(layers[1].values, layers[3].values)


def test_readmitted_blocks_keep_their_values_whatever_new_ones_get() -> None:
    layer = make_layer((3, 4), 2, 6)
    before = dict(zip(layer.block_index.tolist(), layer.values.detach().clone(), strict=True))
    prune_regrow_(layer, pruning_ratio=1.0, readmit=True, regrow_std=0.1, generator=generator(3))
    after = dict(zip(layer.block_index.tolist(), layer.values.detach(), strict=True))
    stayed = before.keys() & after.keys()
    assert 0 < len(stayed) < 6
    for place, values in after.items():
        assert torch.equal(values, before[place]) if place in stayed else 0 < values.abs().max() < 0.5


def test_a_run_with_values_for_new_blocks_can_be_repeated() -> None:
    runs = []
    for _ in range(2):
        model = nn.ModuleDict({"a": make_layer((8, 8), 2, 10), "b": make_layer((8, 8), 2, 10)})
        optimizer = torch.optim.SGD(model.parameters())
        updater = TopologyUpdater(model, optimizer, total_steps=3, num_topology_updates=2, regrow_std=0.1)
        reports = [updater.step(step) for step in (1, 2)]
        assert all(report is not None for report in reports)
        runs.append(model)
    for layer, again in zip(runs[0].values(), runs[1].values(), strict=True):
        assert torch.equal(layer.values, again.values)
    assert not torch.equal(runs[0]["a"].values, runs[0]["b"].values)


def test_a_negative_standard_deviation_is_an_error() -> None:
    layer = make_layer()
    for std in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"`regrow_std` .* must not be negative\. Got {std}\. 0 starts"):
            TopologyUpdater(layer, torch.optim.SGD(layer.parameters()), 2, num_topology_updates=1, regrow_std=std)
