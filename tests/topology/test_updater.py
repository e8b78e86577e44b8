"""A whole model over a run: when, how reproducibly, with which gradients, and what stops it."""

import gc
import logging
import math
import weakref

import pytest
import torch
from helpers import dense_weight, generator, make_layer
from torch import nn
from torch.nn.functional import linear

from hf_dynsparse import BlockSparseLinear, TopologyUpdater
from hf_dynsparse.ops.operators import _observers
from hf_dynsparse.topology import TopologyReport, block_ages, dof_coverage
from hf_dynsparse.topology.dense_gradient import DenseGradientProbe
from hf_dynsparse.topology.report import ChurnWarning


pytestmark = pytest.mark.usefixtures("deterministic")


class Network(nn.Module):
    """Two sparse layers, `first` and `second`, registered in either order."""

    def __init__(self, block_size: int = 4, swap: bool = False) -> None:
        super().__init__()
        layers = {
            "first": make_layer((4, 6), block_size, 8, seed=1),
            "second": make_layer((3, 4), block_size, 5, seed=2),
        }
        self.layers = nn.ModuleDict(dict(reversed(layers.items())) if swap else layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layers["second"](torch.tanh(self.layers["first"](input)))


def batch(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, 24, generator=generator(seed))


def run(model: Network, steps: int = 12, **arguments: object) -> list[TopologyReport | None]:
    """Train with topology updates; the reports of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = TopologyUpdater(model, optimizer, total_steps=steps, **arguments)
    reports = []
    for step in range(1, steps + 1):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(updater.step(step))
    return reports


def indices(model: Network) -> dict[str, list[int]]:
    return {name: model.layers[name].block_index.tolist() for name in ("first", "second")}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [state[name] for state in optimizer.state.values() for name in sorted(state)]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *states]]


def test_reports_come_at_update_steps_only() -> None:
    model = Network()
    reports = run(model, num_topology_updates=3)
    assert [step for step, report in enumerate(reports, start=1) if report] == [3, 6, 9]
    first, second, third = filter(None, reports)
    assert [report.update for report in (first, second, third)] == [0, 1, 2]
    assert [report.pruning_ratio for report in (first, second, third)] == pytest.approx([0.5, 0.375, 0.125])
    assert {name: layer.removed for name, layer in first.layers.items()} == {"layers.first": 4, "layers.second": 3}
    assert [report.removed for report in (first, second, third)] == [7, 3 + 2, 1 + 1]
    assert first.newborn_share == 0.0
    newborn = sum(layer.newborn_removed for layer in second.layers.values())
    assert second.newborn_share == newborn / 5
    assert (first.newborn_survival, second.newborn_survival) == (1.0, 1 - newborn / 7)
    assert first.coverage == pytest.approx((12 / 24 + 8 / 12) / 2)
    assert first.coverage <= second.coverage <= third.coverage == dof_coverage(model.layers.values())
    assert first.block_age == pytest.approx((4 / 8 + 2 / 5) / 2)


def test_newborns_by_hand() -> None:
    model = Network()
    updater = TopologyUpdater(
        model, torch.optim.SGD(model.parameters()), 3, num_topology_updates=2, pruning_schedule="constant"
    )
    assert updater.step(1).newborn_share == 0.0
    # Nothing trains: the zeros of the first update are the lowest of the second.
    report = updater.step(2)
    assert (report.newborn_share, report.newborn_survival) == (1.0, 0.0)


@pytest.mark.parametrize("regrow_rule", ["random", "gradient", "unfired"])
def test_the_same_seed_gives_the_same_run(regrow_rule: str) -> None:
    models = [Network(), Network(), Network(swap=True), Network()]
    for model, seed in zip(models, (3, 3, 3, 4), strict=True):
        run(model, num_topology_updates=4, regrow_rule=regrow_rule, seed=seed)
    assert indices(models[0]) == indices(models[1])
    assert indices(models[0]) == indices(models[2])  # the order of the layers does not matter
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models[:2]), strict=True))
    assert (indices(models[0]) == indices(models[3])) == (regrow_rule == "gradient")


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    models = [Network(), Network()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        run(model, num_topology_updates=4)
        assert torch.equal(torch.get_rng_state(), state)
    assert indices(models[0]) == indices(models[1])


def test_layers_of_equal_shape_draw_differently() -> None:
    model = nn.ModuleDict({"a": make_layer((20, 20), 1, 40), "b": make_layer((20, 20), 1, 40)})
    updater = TopologyUpdater(model, torch.optim.SGD(model.parameters()), total_steps=2, num_topology_updates=1)
    assert torch.equal(model["a"].block_index, model["b"].block_index)
    updater.step(1)
    assert not torch.equal(model["a"].block_index, model["b"].block_index)


def test_a_resumed_run_repeats_the_draws() -> None:
    whole, parts = Network(), Network()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (whole, parts)]
    updaters = [
        TopologyUpdater(model, optimizer, 12, num_topology_updates=5, regrow_rule="gradient")
        for model, optimizer in zip((whole, parts), optimizers, strict=True)
    ]
    for step in range(1, 12):
        if step in (4, 6):  # stop and resume: a new updater that has seen nothing
            updaters[1] = TopologyUpdater(parts, optimizers[1], 12, num_topology_updates=5, regrow_rule="gradient")
            updaters[1].prepare(step)
        for model, optimizer, updater in zip((whole, parts), optimizers, updaters, strict=True):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            updater.step(step)
    assert all(torch.equal(tensor, parts.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("regrow_rule", ["random", "unfired"])
def test_no_dense_gradient_where_nothing_needs_it(regrow_rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dense gradient")

    monkeypatch.setattr(DenseGradientProbe, "__init__", refuse)
    model = Network()
    updater = TopologyUpdater(
        model, torch.optim.SGD(model.parameters()), total_steps=6, topology_update_every=1, regrow_rule=regrow_rule
    )
    for step in range(1, 7):
        assert updater._probe is None
        assert not any(layer._forward_hooks or layer._backward_hooks for layer in model.layers.values())
        model(batch(step)).sum().backward()
        updater.step(step)


@pytest.mark.parametrize(("prune_score", "warnings"), [("l1", 1), ("random", 0)])
def test_a_topology_that_churns_in_place_is_told_once(
    caplog: pytest.LogCaptureFixture, prune_score: str, warnings: int
) -> None:
    # New blocks are zero and nothing trains: by their norm they are the next to go.
    model = Network()
    updater = TopologyUpdater(
        model,
        torch.optim.SGD(model.parameters()),
        total_steps=6,
        topology_update_every=1,
        pruning_schedule="constant",
        pruning_ratio=0.3,
        prune_score=prune_score,
    )
    reports = [updater.step(step) for step in range(1, 6)]
    shares = [report.newborn_share for report in reports if report]
    assert (shares[0], shares[1:] == [1.0] * 4) == (0.0, prune_score == "l1")
    said = [record.message for record in caplog.records if "New blocks do not live" in record.message]
    assert len(said) == warnings
    assert all("updates 2 and 3" in message and "fewer updates" in message for message in said)


@pytest.mark.parametrize("prune_score", ["l1", "weight_gradient"])
def test_the_advice_is_another_score_than_that_of_the_run(caplog: pytest.LogCaptureFixture, prune_score: str) -> None:
    warning = ChurnWarning(prune_score)
    for update in (2, 3):
        warning.look_at(TopologyReport(update, 0.5, 10, 1.0, 0.0, 0.5, 1.0, {}))
    assert ("prune by 'weight_gradient' instead of 'l1'" in caplog.text) == (prune_score == "l1")


def test_the_dense_gradient_is_collected_at_update_steps_only() -> None:
    model = Network()
    updater = TopologyUpdater(
        model, torch.optim.SGD(model.parameters()), total_steps=6, topology_update_every=2, regrow_rule="gradient"
    )
    for step in range(1, 7):
        observed = [layer.block_index in _observers for layer in model.layers.values()]
        assert observed == [step in (2, 4)] * 2
        model(batch(step)).sum().backward()
        assert (updater.step(step) is None) == (step not in (2, 4))


def observed_update(model: Network) -> TopologyUpdater:
    """An updater that collects the dense gradient for the update after the first step."""
    settings = {"total_steps": 6, "topology_update_every": 1, "regrow_rule": "gradient"}
    return TopologyUpdater(model, torch.optim.SGD(model.parameters()), **settings)


def test_a_dropped_updater_observes_nothing() -> None:
    # An interrupted loop of one's own has no hook for its end: its updater goes, and with it all that it held.
    model = Network()
    updater = observed_update(model)
    model(batch(1)).sum().backward()
    assert len(_observers) == 2
    del updater
    assert not _observers
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_updater_that_takes_the_place_of_another_keeps_its_observers() -> None:
    model = Network()
    updater = observed_update(model)
    updater = observed_update(model)  # the first one is dropped after the second was made
    assert len(_observers) == 2
    model(batch(1)).sum().backward()
    assert updater.step(1) is not None


def test_a_closed_updater_observes_nothing_and_can_go_on() -> None:
    model = Network()
    updater = observed_update(model)
    for _ in range(2):
        updater.close()
        assert not _observers
        model(batch(1)).sum().backward()
    updater.prepare(2)
    model(batch(2)).sum().backward()
    assert updater.step(2) is not None


def test_observers_end_where_they_began_though_the_layer_has_another_index_since() -> None:
    model = Network()
    updater = observed_update(model)
    for layer in model.layers.values():
        layer.block_index = layer.block_index.clone()
    updater.close()
    assert not _observers


def dense_gradients(model: Network, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of the two dense weights, by autograd, summed over `batches`."""
    layers = [model.layers[name] for name in ("first", "second")]
    weights = [dense_weight(layer.values, layer.block_index, layer.shape).requires_grad_() for layer in layers]
    for input in batches:
        hidden = torch.tanh(linear(input, weights[0], layers[0].bias))
        linear(hidden, weights[1], layers[1].bias).square().sum().backward()
    return [weight.grad for weight in weights]


def as_blocks(dense: torch.Tensor, layer: BlockSparseLinear) -> torch.Tensor:
    """All blocks of `dense` in order of position, of shape `(blocks, rows, columns)`."""
    rows, columns = layer.block_shape
    return torch.stack(
        [
            dense[row : row + rows, column : column + columns]
            for row in range(0, layer.out_features, rows)
            for column in range(0, layer.in_features, columns)
        ]
    )


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)], ids=str)
def test_the_probe_sums_the_true_dense_gradient(shape: tuple[int, ...]) -> None:
    model = Network()
    batches = [torch.randn(shape, generator=generator(seed)) for seed in range(3)]
    expected = dense_gradients(model, batches)
    probe = DenseGradientProbe(model.layers.values())
    with torch.no_grad():
        model(batches[0])  # an evaluation in between counts for nothing
    for input in batches:
        model(input).square().sum().backward()
    probe.reduce()
    for layer, exact in zip(model.layers.values(), expected, strict=True):
        torch.testing.assert_close(probe.blocks(layer), as_blocks(exact, layer))
        torch.testing.assert_close(probe.blocks(layer)[layer.block_index.long()], layer.values.grad)
    probe.remove()
    assert not any(layer._forward_hooks for layer in model.layers.values())
    assert not probe.gradients


@pytest.mark.parametrize("block_size", [1, 4, 8], ids=str)
def test_gradient_regrow_takes_the_largest_over_micro_batches(block_size: int) -> None:
    model = Network(block_size)
    batches = [torch.randn(5, model.layers["first"].in_features, generator=generator(seed)) for seed in range(3)]
    updater = TopologyUpdater(
        model, torch.optim.SGD(model.parameters()), total_steps=2, num_topology_updates=1, regrow_rule="gradient"
    )
    before = indices(model)
    expected = dense_gradients(model, batches)
    for input in batches:
        model(input).square().sum().backward()
    updater.step(1)
    for (name, index), exact in zip(before.items(), expected, strict=True):
        layer = model.layers[name]
        score = as_blocks(exact, layer).abs().sum((1, 2))
        score[index] = -1
        count = math.floor(0.5 * len(index) + 0.5)
        new = set(layer.block_index.tolist()) - set(index)
        assert new == set(score.topk(count).indices.tolist())


def test_gradient_regrow_without_a_backward_pass_is_an_error() -> None:
    model = Network()
    updater = TopologyUpdater(
        model, torch.optim.SGD(model.parameters()), total_steps=2, num_topology_updates=1, regrow_rule="gradient"
    )
    with pytest.raises(RuntimeError, match="must see a backward pass .* Got none through BlockSparseLinear"):
        updater.step(1)


@pytest.mark.parametrize(
    ("regrow_rule", "what"),
    [
        ("random", "values"),
        ("random", "gradient"),
        ("gradient", "values"),
        ("gradient", "gradient"),
        ("gradient", "dense gradient"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_sees_no_finite_number_is_skipped(
    regrow_rule: str, what: str, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = TopologyUpdater(model, optimizer, total_steps=4, num_topology_updates=2, regrow_rule=regrow_rule)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        if step in updater.update_steps:
            break
    layer = model.layers["second"]
    target = {"values": layer.values.data, "gradient": layer.values.grad}.get(what)
    target = updater._probe.gradients[layer] if target is None else target
    target.view(-1)[3] = bad
    before = snapshot(model, optimizer)
    with caplog.at_level(logging.WARNING, logger="hf_dynsparse"):
        assert updater.step(step) is None
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"Topology update 1 of 2 is skipped: the {what} of `layers.second` holds NaN or infinity."
    ]
    for old, new in zip(before, snapshot(model, optimizer), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_an_update_whose_score_overflows_is_skipped_too(caplog: pytest.LogCaptureFixture) -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters())
    updater = TopologyUpdater(model, optimizer, total_steps=2, num_topology_updates=1, prune_score="l2")
    with torch.no_grad():
        model.layers["second"].values[0] = 1e30  # finite, and its square is not
    before = snapshot(model, optimizer)
    assert updater.step(1) is None
    assert "is skipped" in caplog.text
    assert all(torch.equal(*pair) for pair in zip(before, snapshot(model, optimizer), strict=True))


@pytest.mark.parametrize("part", ["values", "block_index"])
def test_layers_that_share_a_part_are_refused(part: str) -> None:
    model = nn.ModuleDict({"a": make_layer(), "b": make_layer(), "c": make_layer(seed=1)})
    setattr(model["b"], part, getattr(model["a"], part))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=f"of its own for topology updates. Got one `{part}` for `a` and `b`. To tie"):
        TopologyUpdater(model, optimizer, total_steps=10, num_topology_updates=1)
    TopologyUpdater(model, optimizer, total_steps=10, num_topology_updates=0)
    tied = nn.ModuleDict({"a": model["a"], "b": model["a"]})  # one module in two places is one layer
    assert len(TopologyUpdater(tied, optimizer, total_steps=10, num_topology_updates=1).layers) == 1


def test_unknown_optimizer_state_is_an_error_before_anything_changes() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.layers["second"].values]["mixed"] = torch.zeros(3)
    updater = TopologyUpdater(model, optimizer, total_steps=2, num_topology_updates=1)
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match=r"Got 'mixed': torch.float32 of shape \(3,\) in SGD"):
        updater.step(1)
    assert all(torch.equal(*pair) for pair in zip(before, snapshot(model, optimizer), strict=True))


def test_no_updates_is_static() -> None:
    model = Network()
    before = indices(model)
    assert run(model, num_topology_updates=0) == [None] * 12
    assert indices(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_topology_updates": 1, "pruning_ratio": 1.5}, r"`pruning_ratio` .* Got 1.5"),
        ({"num_topology_updates": 1, "pruning_schedule": "sine"}, "`pruning_schedule` must be one of"),
        ({"num_topology_updates": 1, "prune_score": "l3"}, "`prune_score` must be one of .* Got 'l3'"),
        ({"num_topology_updates": 1, "regrow_rule": "l1"}, "`regrow_rule` must be one of"),
        ({"num_topology_updates": 10}, r"`num_topology_updates` must lie in \[0, 9\]"),
        ({}, "exactly one of"),
        ({"num_topology_updates": 1, "topology_first_step": 0}, "Got topology_first_step=0"),
    ],
)
def test_bad_arguments_are_errors(arguments: dict, message: str) -> None:
    model = Network()
    with pytest.raises(ValueError, match=message):
        TopologyUpdater(model, torch.optim.SGD(model.parameters()), total_steps=10, **arguments)


def test_a_model_without_sparse_layers_is_an_error() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="needs a model with `BlockSparseLinear` layers. Got none: build"):
        TopologyUpdater(model, torch.optim.SGD(model.parameters()), total_steps=10, num_topology_updates=1)


def test_gradient_regrow_of_a_compiled_model() -> None:
    torch.compiler.reset()
    model, plain = Network(), Network()
    compiled = torch.compile(model, backend="aot_eager")
    updaters = [
        TopologyUpdater(net, torch.optim.SGD(net.parameters()), 3, num_topology_updates=1, regrow_rule="gradient")
        for net in (compiled, plain)
    ]
    assert updaters[0].update_steps == (2,)  # compiled in step 1, when nobody looks
    for step in (1, 2):
        for net, updater in zip((compiled, plain), updaters, strict=True):
            net(batch(step)).square().sum().backward()
            updater.step(step)
    assert indices(model) == indices(plain)


def test_updates_that_spare_newborn_blocks_remove_none() -> None:
    patient = {"score": {"prune_score": "l1_patient"}, "one": {"prune_min_age": 1}, "two": {"prune_min_age": 2}}
    shares, ages, index = {}, {}, {}
    for name, spared in ({"none": {}} | patient).items():
        layer = make_layer((16, 16), 2, 128)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)  # new blocks stay zero
        settings = {"num_topology_updates": 4, "pruning_ratio": 0.25, "pruning_schedule": "constant", **spared}
        updater = TopologyUpdater(nn.Sequential(layer), optimizer, 10, **settings)
        reports = [report for step in range(1, 11) if (report := updater.step(step)) is not None]
        shares[name] = [report.newborn_share for report in reports]
        ages[name], index[name] = block_ages(layer, 4).bincount(minlength=5).tolist(), layer.block_index.tolist()
    assert shares == {"none": [0.0, 1.0, 1.0, 1.0], **dict.fromkeys(patient, [0.0, 0.0, 0.0, 0.0])}
    # A quarter each: the second update takes the first topology, the third it again or what has survived one update.
    assert ages["one"] == [32, 32, 0, 0, 64]
    assert ages["two"] == [32, 32, 32, 0, 32]
    assert index["one"] == index["score"]


def test_saliency_sums_what_each_block_does_since_the_last_update() -> None:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = TopologyUpdater(model, optimizer, 8, topology_update_every=3, prune_score="saliency")
    expected = {layer: torch.zeros(layer.nnzb) for layer in model.layers.values()}
    for step in range(1, 9):
        for part in (1, 2):  # micro-batches
            model(batch(part * step)).square().mean().backward()
        for layer in expected:
            if step < 7:  # no update follows
                expected[layer] += (layer.values * layer.values.grad).abs().sum((1, 2)).detach()
        optimizer.step()
        optimizer.zero_grad()
        for layer, saliency in expected.items():
            torch.testing.assert_close(layer.recorded_saliency, saliency)
        lowest = {layer: saliency.argmin() for layer, saliency in expected.items()}
        before = {layer: layer.block_index.clone() for layer in expected}
        if updater.step(step) is not None:
            for layer, saliency in expected.items():
                assert layer.block_index[lowest[layer]] != before[layer][lowest[layer]]
                saliency.zero_()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_dropped_updater_leaves_no_hook_in_the_optimizer() -> None:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    updater = TopologyUpdater(model, optimizer, 8, topology_update_every=3, prune_score="saliency")
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del updater
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("regrow_std", [0.0, 0.1])
def test_movement_is_counted_from_the_birth_of_a_block(regrow_std: float) -> None:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"topology_update_every": 2, "prune_score": "movement", "regrow_std": regrow_std}
    updater = TopologyUpdater(model, optimizer, 8, **settings)
    born = {layer: layer.values.detach().clone() for layer in model.layers.values()}
    for step in range(1, 8):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {layer: layer.block_index.clone() for layer in born}
        moved = {layer: (layer.values - first).abs().sum((1, 2)) for layer, first in born.items()}
        report = updater.step(step)
        for layer, first in born.items():
            new = layer.block_index != before[layer]
            assert bool(new.any()) == (report is not None)
            if report is not None:
                assert moved[layer][new].max() <= moved[layer][~new].min()
            first[new] = layer.values.detach()[new]
            assert torch.equal(layer.recorded_first_values, first)
