"""Every method in the table, and density that changes: exact counts, survivors untouched, new blocks from zero."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from helpers import generator, make_layer
from torch import nn

from hf_dynsparse import BlockSparseLinear, TopologyUpdater
from hf_dynsparse.blocks.distributions import active_blocks, erk
from hf_dynsparse.blocks.sizes import count_active_blocks
from hf_dynsparse.optim.moments import check_optimizer_state
from hf_dynsparse.topology import METHODS, TopologySettings, block_ages, density_share, ever_active, prune_regrow_
from hf_dynsparse.topology.allocation import allocate_globally, share_out
from hf_dynsparse.topology.counts import count_entries, pruned_count


pytestmark = pytest.mark.usefixtures("deterministic")

STEPS = 40
SIZES_OF = {"first": (8, 12), "second": (6, 8)}
NNZB = {"first": 24, "second": 12}  # a quarter each: sparsity 0.75


class Network(nn.Module):
    """Two sparse layers at sparsity 0.75."""

    def __init__(self, block_size: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: make_layer(grid, block_size, NNZB[name], seed=i) for i, (name, grid) in enumerate(SIZES_OF.items())}
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = self.layers["first"](input)  # [tokens, 16]
        return self.layers["second"](torch.tanh(hidden))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(5, 24, generator=generator(seed))


def settings_of(method: str, **given: object) -> dict:
    settings = TopologySettings(method=method, **given)
    settings = asdict(settings if settings.say_when else replace(settings, num_topology_updates=9))
    del settings["seed"]
    return settings


def start(method: str, seed: int = 0, **given: object) -> tuple[Network, torch.optim.AdamW, TopologyUpdater]:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, TopologyUpdater(model, optimizer, STEPS, seed=seed, **settings_of(method, **given))


def train_step(model: Network, optimizer: torch.optim.Optimizer, updater: TopologyUpdater, step: int) -> None:
    """Up to the update."""
    model(batch(step)).square().mean().backward()
    if updater.replaces_step(step):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def run(method: str, steps: int = STEPS, **given: object) -> Network:
    model, optimizer, updater = start(method, **given)
    for step in range(1, steps + 1):
        train_step(model, optimizer, updater, step)
        updater.step(step)
    return model


def tensors_by_block(layer: BlockSparseLinear, optimizer: torch.optim.Optimizer) -> dict[int, list[torch.Tensor]]:
    """Values and moments of each active block, by its place."""
    rows = [layer.values.detach(), *check_optimizer_state(optimizer, layer.values)]
    return {place: [tensor[slot].clone() for tensor in rows] for slot, place in enumerate(layer.block_index.tolist())}


def sparsity_at(step: int, last: int, settings: dict) -> float:
    """By the words of the paper on gradual pruning, not by our functions."""
    begin, end = settings["density_begin"], settings["density_end"]
    progress = min(1.0, max(0.0, (step / STEPS - begin) / (end - begin)))
    if step >= last:
        progress = 1.0
    return 0.75 + (settings["initial_sparsity"] - 0.75) * (1 - progress) ** 3


def expected_sparsity(step: int, updater: TopologyUpdater, settings: dict) -> float:
    """Of the whole model after `step`."""
    done = [update for update in updater.update_steps if update <= step]
    if settings["density_schedule"] == "constant":
        return 0.75
    if settings["density_schedule"] == "cubic":
        return sparsity_at(done[-1] if done else 0, updater.update_steps[-1], settings)
    phases = [tuple(map(float, part.split(":"))) for part in settings["density_schedule"].split(",")]
    progress = 0.0 if not done else 1.0 if done[-1] == updater.update_steps[-1] else done[-1] / STEPS
    return 0.75 * (1 - [share for begin, share in phases if begin <= progress][-1])


@pytest.mark.parametrize("method", METHODS)
def test_what_holds_for_every_method(method: str) -> None:
    model, optimizer, updater = start(method)
    settings = settings_of(method)
    names, parameters = list(SIZES_OF), list(model.parameters())
    layers, seen = {name: model.layers[name] for name in names}, set[float]()
    remembered: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}  # last values of what was pruned
    for step in range(STEPS + 1):
        if step:
            moving = [parameter.detach().clone() for parameter in parameters]
            train_step(model, optimizer, updater, step)
            replaced = settings["replace_step"] and step in updater.update_steps
            assert all(map(torch.equal, moving, parameters)) == replaced
            index = {name: layer.block_index.clone() for name, layer in layers.items()}
            before = {name: tensors_by_block(layer, optimizer) for name, layer in layers.items()}
            report = updater.step(step)
            assert (report is not None) == (step in updater.update_steps)
        sparsity = expected_sparsity(step, updater, settings)
        seen.add(sparsity)
        counts = {name: count_active_blocks(layer.num_blocks, 1 - sparsity) for name, layer in layers.items()}
        reached = {name: layer.nnzb for name, layer in layers.items()}
        assert sum(reached.values()) == sum(counts.values())
        assert reached == counts or settings["allocation"] != "layer"
        for name, layer in layers.items():
            layer.layout.validate()
            assert len(layer.block_index) == len(layer.active_since) == layer.nnzb
            assert ever_active(layer)[layer.block_index.long()].all()
            if not step:
                continue
            after = tensors_by_block(layer, optimizer)
            for place, rows in after.items():
                if place in before[name]:
                    assert all(map(torch.equal, rows, before[name][place]))
                else:
                    values = remembered[name].get(place) if settings["hidden_copy"] else None
                    assert torch.equal(rows[0], torch.zeros_like(rows[0]) if values is None else values)
                    assert all(not moments.any() for moments in rows[1:])
            remembered[name] |= {place: rows[0] for place, rows in before[name].items() if place not in after}
            stayed = [place for place in index[name].tolist() if place in after]
            if len(after) == len(before[name]):  # every survivor has its slot
                slots = (index[name] == layer.block_index).sum()
                assert slots == len(stayed)
            else:  # and otherwise its place among the survivors
                assert [place for place in layer.block_index.tolist() if place in before[name]] == stayed
    assert list(model.parameters()) == parameters  # the same objects, though of other shapes
    assert (len(seen) > 1) == (method in ("gmp", "prune_ofa", "granet", "ac_dc", "mst"))


def same(first: Network, second: Network) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


FROM_HALF = {"initial_sparsity": 0.5, "density_end": 0.7}
GRANET_AS_RIGL = {"initial_sparsity": 0.75, "density_end": 1.0, "allocation": "layer", "topology_last_step": 0.75}


@pytest.mark.parametrize(
    ("method", "given", "other", "theirs"),
    [
        ("static", {}, "dynsparse", {"num_topology_updates": 0}),
        # RigL with random regrowth, no return and no step left out is SET.
        (
            "rigl",
            {"regrow_rule": "random", "readmit": False, "replace_step": False, "pruning_schedule": "constant"},
            "set",
            {"topology_last_step": 0.75},
        ),
        ("mest", {"prune_score": "l1", "pruning_schedule": "constant", "pruning_ratio": 0.3}, "set", {}),
        ("granet", GRANET_AS_RIGL, "rigl", {"pruning_ratio": 0.5, "replace_step": False}),
        ("granet", {"pruning_ratio": 0.0, "allocation": "layer"}, "gmp", FROM_HALF),
        ("gmp", {"density_schedule": "constant"}, "static", {}),
        ("prune_ofa", {"hidden_copy": False}, "gmp", {"topology_update_every": 0.01, "topology_last_step": 0.8}),
        # Phases that never leave the final density.
        ("dynsparse", {"density_schedule": "0:0"}, "dynsparse", {}),
        ("snfs", {"allocation": "layer", "regrow_rule": "random"}, "dynsparse", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_methods_that_are_each_other(method: str, given: dict, other: str, theirs: dict) -> None:
    assert same(run(method, **given), run(other, **theirs))


def test_the_cubic_hits_both_ends_and_falls_fast_at_first() -> None:
    shares = [density_share(step / 10, "cubic", 0.2, 0.7) for step in range(11)]
    assert shares[:3] == [1.0, 1.0, 1.0]
    assert shares[7:] == [0.0, 0.0, 0.0, 0.0]
    assert shares[3:7] == pytest.approx([0.8**3, 0.6**3, 0.4**3, 0.2**3])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("square", "`density_schedule` must be one of constant, cubic, or phases .* Got 'square'"),
        ("0.1:1,0.5:0", "phases of ascending progress from 0"),
        ("0:1,0.5:0,0.4:1", "phases of ascending progress from 0"),
        ("0:1,0.5:2", r"each with a share in \[0, 1\]"),
    ],
)
def test_bad_density_schedules_are_errors(schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start("gmp", density_schedule=schedule)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density_begin": 0.5}, "0 <= begin < end <= 1. Got density_begin=0.5 and density_end=0.5"),
        ({"initial_sparsity": 1.0}, r"must lie in \[0, 1\). Got 1.0"),
        ({"allocation": "fair"}, "`allocation` must be one of layer, global, momentum. Got 'fair'"),
        ({"final_sparsity": 1.0}, r"must lie in \[0, 1\). Got 1.0"),
        ({"final_sparsity": 0.9, "initial_sparsity": 0.1}, "Got final_sparsity=0.9 and initial_sparsity=0.1"),
        ({"final_sparsity": 0.9, "density_schedule": "constant"}, "Got 0.9 with density_schedule='constant'"),
        ({"final_sparsity": 0.5}, "Got 0.5 for a model with 144 active entries, where it leaves 288"),
        ({"num_topology_updates": 0}, "changes in topology updates only. Got density_schedule='cubic'"),
    ],
)
def test_bad_densities_are_errors(given: dict, message: str) -> None:
    model = Network()
    with pytest.raises(ValueError, match=message):
        start("gmp", **given)
    assert {name: layer.nnzb for name, layer in model.layers.items()} == NNZB


@pytest.mark.parametrize("readmit", [False, True], ids=["barred", "readmit"])
@pytest.mark.parametrize("shrink_counts", [False, True], ids=["sum", "max"])
def test_counts_of_one_update(shrink_counts: bool, readmit: bool) -> None:
    for nnzb in range(1, 7):
        for target in range(1, 7):
            for ratio in (0.0, 0.3, 1.0):
                layer = make_layer((2, 3), 1, nnzb, tracked=True)
                before = set(layer.block_index.tolist())
                settings = {"pruning_ratio": ratio, "readmit": readmit, "shrink_counts": shrink_counts}
                removed = pruned_count(ratio, nnzb, 6, target, readmit, shrink_counts)
                update = prune_regrow_(layer, nnzb=target, generator=generator(nnzb), **settings)
                after = set(layer.block_index.tolist())
                assert len(after) == layer.nnzb == target
                replaced = math.floor(ratio * nnzb + 0.5) or (1 if ratio else 0)
                shrink = max(0, nnzb - target)
                assert removed <= (max(replaced, shrink) if shrink_counts else replaced + shrink)
                assert removed >= shrink
                assert len(before - after) == update.removed <= removed
                if not readmit:
                    assert update.removed == removed
                    assert len(after - before) == target - nnzb + removed
                assert block_ages(layer, 1).eq(0).sum() == len(after - before)


def test_growing_changes_no_output() -> None:
    layer = make_layer((4, 6), 2, 5)
    input = torch.randn(3, 12, generator=generator())
    before = layer(input)
    prune_regrow_(layer, nnzb=17, pruning_ratio=0.0)
    assert layer.nnzb == 17
    torch.testing.assert_close(layer(input), before)
    layer(input).sum().backward()  # all of them train, although the old graph is still there
    assert layer.values.grad.shape == (17, 2, 2)


def test_the_initial_blocks_are_like_those_that_are_there() -> None:
    model = nn.ModuleDict({"layer": BlockSparseLinear(256, 256, 4, sparsity=0.9)})
    layer = model["layer"]
    layer.reset_parameters(0.05, generator(1))
    old, values = layer.block_index.clone(), layer.values.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    TopologyUpdater(model, optimizer, 10, num_topology_updates=2, density_schedule="cubic", seed=3)
    assert layer.nnzb == layer.num_blocks == 4096
    assert torch.equal(layer.block_index[: len(old)], old)
    assert torch.equal(layer.values[: len(old)], values)
    fresh = layer.values.detach()[len(old) :]
    assert float(fresh.std() / values.std()) == pytest.approx(1.0, abs=0.03)
    assert fresh.abs().max() <= 0.105
    again = nn.ModuleDict({"layer": BlockSparseLinear(256, 256, 4, sparsity=0.9)})
    again["layer"].reset_parameters(0.05, generator(1))
    torch.manual_seed(99)  # which plays no part
    optimizer = torch.optim.AdamW(again.parameters())
    TopologyUpdater(again, optimizer, 10, num_topology_updates=2, density_schedule="cubic", seed=3)
    assert torch.equal(again["layer"].values, layer.values)


def test_allocate_globally_keeps_the_highest_of_all() -> None:
    layers = {"a": make_layer((2, 3), 1, 4), "b": make_layer((2, 3), 1, 3)}
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 6.0]), "b": torch.tensor([0.1, 0.2, 0.3])}
    assert allocate_globally(layers, 4, scores) == {"a": 3, "b": 1}  # one stays, however low
    assert allocate_globally(layers, 7, scores) == {"a": 4, "b": 3}
    assert allocate_globally(layers, 12, scores) == {"a": 6, "b": 6}


def test_share_out_is_exact() -> None:
    ones = dict.fromkeys("abc", 1)
    assert share_out(10, {"a": 1.0, "b": 1.0, "c": 1.0}, dict.fromkeys("abc", 10), ones) == {"a": 4, "b": 3, "c": 3}
    assert share_out(10, {"a": 8.0, "b": 1.0, "c": 1.0}, {"a": 3, "b": 9, "c": 9}, ones) == {"a": 3, "b": 4, "c": 3}
    assert share_out(2, {"a": 9.0, "b": 6.0, "c": 5.0}, dict.fromkeys("abc", 9), ones) == {"a": 1, "b": 1, "c": 0}
    assert share_out(5, {"a": 0.0, "b": 0.0}, {"a": 9, "b": 9}, ones) == {"a": 3, "b": 2}
    assert share_out(9, {"a": 1.0, "b": 2.0}, {"a": 2, "b": 2}, ones) == {"a": 2, "b": 2}
    # By entries: blocks of 64 and of 4.
    assert share_out(300, {"a": 1.0, "b": 1.0}, {"a": 9, "b": 99}, {"a": 64, "b": 4}) == {"a": 2, "b": 43}
    assert share_out(300, {"a": 1.0, "b": 1.0}, {"a": 9, "b": 9}, {"a": 64, "b": 4}) == {"a": 4, "b": 9}


def test_allocate_globally_counts_entries() -> None:
    """Blocks of 4 x 4 and of 1 x 1: from the highest score down, what still fits."""
    layers = {"a": make_layer((2, 3), 4, 4), "b": make_layer((4, 5), 1, 18)}
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 6.0]), "b": torch.arange(0.1, 1.9, 0.1)}
    assert allocate_globally(layers, 36, scores) == {"a": 2, "b": 4}
    assert allocate_globally(layers, 40, scores) == {"a": 2, "b": 8}
    assert allocate_globally(layers, 64, scores) == {"a": 3, "b": 16}
    assert allocate_globally(layers, 67, scores) == {"a": 3, "b": 18}  # a block of 16 does not fit
    assert allocate_globally(layers, 3, scores) == {"a": 1, "b": 1}
    high = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.arange(18.0) / 18}
    assert allocate_globally(layers, 18, high) == {"a": 1, "b": 2}  # the second of 16 does not fit, one of 1 does
    assert allocate_globally(layers, 99, scores) == {"a": 4 + 1, "b": 18 + 1}  # of 17 free ones, 32 + 2 entries free


class Mixed(nn.Module):
    """Blocks of 2 x 2 and of 8 x 8, sparsity 0.75 of the entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "first": make_layer((8, 12), 2, 24),
                "second": make_layer((4, 2), 8, 2),
                "third": make_layer((2, 4), 8, 2),
            }
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layers["second"](self.layers["first"](input)))
        return self.layers["third"](hidden)


def entries(model: nn.Module) -> int:
    return sum(layer.values.numel() for layer in model.layers.values())


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("granet", {}),
        ("ac_dc", {}),
        ("snfs", {}),
        ("snfs", {"readmit": True}),
        (
            "snfs",
            {"density_schedule": "cubic", "initial_sparsity": 0.2, "density_end": 0.4},
        ),  # faster than it replaces
        ("snfs", {"density_schedule": "0:0,0.4:1,0.7:0"}),  # through a full model
        ("granet", {"final_sparsity": 0.9}),
    ],
)
def test_active_entries_are_exact_for_blocks_of_mixed_sizes(method: str, given: dict) -> None:
    """To one block at every update; and the updater knows when it has got there."""
    model = Mixed()
    configured = entries(model)
    positions = sum(layer.in_features * layer.out_features for layer in model.layers.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = settings_of(method, **given)
    updater = TopologyUpdater(model, optimizer, STEPS, **settings)
    goal = count_entries(updater.layers, updater._path.at(settings_share(settings, 1.0)))
    assert abs(goal - ((1 - given["final_sparsity"]) * positions if "final_sparsity" in given else configured)) < 64
    for step in range(1, STEPS + 1):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if updater.step(step) is not None:
            share = updater.plan[updater.update_steps.index(step)].density_share
            planned = count_entries(updater.layers, updater._path.at(share))
            assert abs(entries(model) - planned) < 64
            assert updater.has_final_density == (abs(entries(model) - goal) < 64)
    assert updater.has_final_density
    assert abs(entries(model) - goal) < 64


def settings_share(settings: dict, progress: float) -> float:
    when = settings["density_begin"], settings["density_end"]
    return density_share(progress, settings["density_schedule"], *when)


@pytest.mark.parametrize(("nnzb", "readmit"), [(9, False), (21, False), (21, True), (24, True)])  # of 24
def test_the_total_of_snfs_never_falls(nnzb: int, readmit: bool) -> None:
    model = nn.ModuleDict({"layer": make_layer((4, 6), 2, nnzb), "other": make_layer((4, 6), 2, 20)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = TopologyUpdater(model, optimizer, STEPS, **settings_of("snfs", readmit=readmit, pruning_ratio=0.9))
    for step in range(1, STEPS + 1):
        sum(layer(torch.randn(3, 12, generator=generator(step))).square().sum() for layer in model.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step(step)
        assert sum(layer.nnzb for layer in model.values()) == nnzb + 20


def test_momentum_goes_where_the_gradient_is() -> None:
    """SNFS gives blocks to the layer whose gradients are larger; the total stays."""
    model, optimizer, updater = start("snfs", pruning_ratio=0.5)
    for step in range(1, updater.update_steps[0] + 1):
        model(batch(step)).square().mean().backward()
        updater.step(step)
        optimizer.zero_grad()
    momentum = {name: layer.gradient_momentum.abs().mean() for name, layer in model.layers.items()}
    grown = {name: layer.nnzb - NNZB[name] for name, layer in model.layers.items()}
    assert sum(grown.values()) == 0
    richer = max(momentum, key=momentum.get)
    assert grown[richer] > 0


@pytest.mark.parametrize("initial_sparsity", [0.0, 0.9], ids=["grows", "shrinks"])
def test_the_moments_of_a_run_before_follow_the_first_sizes(initial_sparsity: float) -> None:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    before = {name: tensors_by_block(layer, optimizer) for name, layer in model.layers.items()}
    settings = settings_of("gmp", initial_sparsity=initial_sparsity)
    for seed in (0, 1):  # made twice: the second leads where the first did
        updater = TopologyUpdater(model, optimizer, STEPS, seed=seed, **settings)
        assert updater.given_nnzb == {f"layers.{name}": nnzb for name, nnzb in NNZB.items()}
        for name, layer in model.layers.items():
            assert layer.sparsity == pytest.approx(initial_sparsity, abs=0.02)
            kept = set(before[name])
            for place, (values, *moments) in tensors_by_block(layer, optimizer).items():
                if place in before[name]:
                    assert all(map(torch.equal, (values, *moments), before[name][place]))
                    kept.discard(place)
                else:
                    assert values.any()
                    assert not any(moment.any() for moment in moments)
            assert bool(kept) == (initial_sparsity > 0.5)
    train_step(model, optimizer, updater, 1)


def test_layers_of_zeros_begin_with_zeros() -> None:
    model = Network()
    with torch.no_grad():
        model.layers["first"].values.zero_()
    TopologyUpdater(model, torch.optim.SGD(model.parameters()), 10, num_topology_updates=2, density_schedule="cubic")
    assert model.layers["first"].values.shape == (96, 2, 2)
    assert not model.layers["first"].values.any()


def test_a_resumed_updater_leaves_sizes_alone() -> None:
    model, optimizer, updater = start("gmp")
    for step in range(1, 11):
        train_step(model, optimizer, updater, step)
        updater.step(step)
    sizes = {name: layer.nnzb for name, layer in model.layers.items()}
    assert sizes != NNZB
    again = TopologyUpdater(model, optimizer, STEPS, given_nnzb=updater.given_nnzb, **settings_of("gmp"))
    assert {name: layer.nnzb for name, layer in model.layers.items()} == sizes
    for step in range(11, STEPS + 1):
        train_step(model, optimizer, again, step)
        again.step(step)
    assert same(model, run("gmp"))


# Where updates fall and the density changes: steps of updates, then the settings that say so; of 40 steps.
WINDOWS = {
    "to the half, frozen from 0.8 on": (range(2, 33, 2), {"topology_update_every": 2}),
    "by shares of the run": (range(4, 33, 4), {"topology_update_every": 0.1}),
    "a late window": (
        range(6, 37, 3),
        {"topology_update_every": 3, "topology_first_step": 0.1, "topology_last_step": 0.9, "density_begin": 0.25},
    ),
    "updates end inside of it": (range(3, 16, 3), {"topology_update_every": 3, "topology_last_step": 15}),
    "the window ends between updates": (range(7, 29, 7), {"topology_update_every": 7, "density_end": 0.6}),
    "by their number": ((4, 11, 18, 25, 32), {"num_topology_updates": 5, "topology_first_step": 4}),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_model_is_pruned_to_its_final_sparsity_exactly(window: str) -> None:
    (steps, given), block_size = WINDOWS[window], ((1, 1), (1, 4), (4, 4))[list(WINDOWS).index(window) % 3]
    rows, columns = block_size
    grids = {"a": (16 // rows, 24 // columns), "b": (12 // rows, 16 // columns)}
    model = nn.ModuleDict({name: make_layer(grid, block_size, grid[0] * grid[1]) for name, grid in grids.items()})
    before = {name: layer.values.detach().clone() for name, layer in model.items()}
    settings = asdict(TopologySettings(method="prune_ofa", final_sparsity=0.85, **given))
    updater = TopologyUpdater(model, torch.optim.AdamW(model.parameters()), STEPS, **settings)
    assert updater.update_steps == tuple(steps)
    begin, end = settings["density_begin"], settings["density_end"]
    assert all(torch.equal(layer.values, before[name]) for name, layer in model.items())  # nothing is drawn
    sparsity = 0.0
    for step in range(1, STEPS + 1):
        updater.step(step)
        if step in updater.update_steps:
            progress = 1.0 if step == steps[-1] else min(1.0, max(0.0, (step / STEPS - begin) / (end - begin)))
            sparsity = 0.85 + (0.0 - 0.85) * (1 - progress) ** 3
        for layer in model.values():
            assert layer.nnzb == count_active_blocks(layer.num_blocks, 1 - sparsity)
    assert sparsity == 0.85


def test_a_sparse_model_is_pruned_further_by_its_distribution() -> None:
    """From its own density, layer by layer, to that of an ERK; a resumed run goes the same way."""
    model = Network()
    given = {"final_sparsity": 0.9, "topology_update_every": 4, "hidden_copy": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {**settings_of("prune_ofa", **given), "distribution": "erk"}
    updater = TopologyUpdater(model, optimizer, STEPS, **settings)
    shapes = {f"layers.{name}": layer.shape for name, layer in model.layers.items()}
    final = active_blocks(shapes, 0.9, (2, 2), "erk")
    assert final != active_blocks(shapes, 0.9, (2, 2), "uniform")
    for step in range(1, STEPS + 1):
        updater.step(step)
        if step == 12:
            share = (1 - 12 / STEPS / 0.5) ** 3
            for name, layer in updater.layers.items():
                end = 1 - erk(shapes, 0.1)[name]
                assert layer.nnzb == count_active_blocks(layer.num_blocks, 1 - (end + (0.75 - end) * share))
            updater = TopologyUpdater(model, optimizer, STEPS, given_nnzb=updater.given_nnzb, **settings)
    assert {name: layer.nnzb for name, layer in updater.layers.items()} == final


@pytest.mark.parametrize("method", ["gmp", "granet", "ac_dc", "mst"])
def test_other_methods_lead_on_from_a_trained_model(method: str) -> None:
    model, optimizer, updater = start(method, final_sparsity=0.9)
    assert {name: layer.nnzb for name, layer in model.layers.items()} == NNZB
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, updater, step)
        updater.step(step)
    counts = NNZB if method == "mst" else {name: count_active_blocks(4 * n, 1 - 0.9) for name, n in NNZB.items()}
    assert sum(layer.nnzb for layer in model.layers.values()) == sum(counts.values())


def test_numbers_of_the_papers() -> None:
    """First ratio, first and last density, last step: of the sources named beside the presets."""
    names = ("pruning_ratio", "initial_sparsity", "density_end", "topology_last_step")
    found = {method: tuple(getattr(TopologySettings(method=method), name) for name in names) for method in METHODS}
    golden = {
        "dynsparse": (0.5, 0.0, 1.0, None),
        "set": (0.3, 0.0, 1.0, None),
        "rigl": (0.3, 0.0, 1.0, 0.75),
        "gmp": (0.0, 0.0, 0.5, None),
        "prune_ofa": (0.0, 0.0, 0.5, 0.8),
        "granet": (0.5, 0.5, 0.7, None),
        "ac_dc": (0.0, 0.0, 1.0, None),
    }
    assert golden.items() <= found.items()
