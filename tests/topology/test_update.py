"""One update of one layer: by hand, as a table over all variants, and its coverage over a run."""

import math

import pytest
import torch
from helpers import COVERAGE_ATOL, SCORES_AND_RULES, cosine_ratio, generator, make_layer, place_

from hf_dynsparse import BlockSparseLinear, prune_regrow_
from hf_dynsparse.optim.moments import check_optimizer_state
from hf_dynsparse.topology import REGROW_RULES, LayerUpdate, block_ages, dof_coverage, ever_active, track_
from hf_dynsparse.topology.counts import replaced_count


pytestmark = pytest.mark.usefixtures("deterministic")

INDEX, VALUES = [5, 0, 10, 3], [0.5, -0.1, 0.25, -0.2]


def example() -> BlockSparseLinear:
    """3 x 4 positions, of which four are active; by magnitude slots 1, 3, 2, 0."""
    return place_(make_layer((3, 4), 1, 4), INDEX, VALUES)


def gradient(**entries: float) -> torch.Tensor:
    """The dense gradient of `example`; `p7=2.0` is that of position 7, 0.01 elsewhere."""
    dense = torch.full((12, 1, 1), 0.01)
    for name, entry in entries.items():
        dense[int(name[1:])] = entry
    return dense


@pytest.mark.parametrize(
    ("ratio", "replaced"),
    [
        (0.0, []),
        (0.01, [1]),
        (0.25, [1]),
        (0.374, [1]),
        (0.375, [1, 3]),
        (0.5, [1, 3]),
        (0.75, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_the_lowest_go_and_random_inactive_ones_come(ratio: float, replaced: list[int]) -> None:
    layer = example()
    assert prune_regrow_(layer, pruning_ratio=ratio, generator=generator(5)) == LayerUpdate(len(replaced), 0)
    for slot in range(4):
        if slot in replaced:
            assert layer.block_index[slot] not in INDEX
            assert layer.values[slot] == 0
        else:
            assert layer.block_index[slot] == INDEX[slot]
            assert layer.values[slot] == torch.tensor(VALUES[slot])
    layer.layout.validate()


def test_gradient_regrow_by_hand() -> None:
    layer = example()
    # The largest are active (5) or just pruned (0, 3): none of them may come.
    dense = gradient(p5=100.0, p0=9.0, p3=-8.0, p7=-5.0, p2=4.0, p11=3.0)
    prune_regrow_(layer, pruning_ratio=0.5, regrow_rule="gradient", dense_gradient=dense)
    assert layer.block_index.tolist() == [5, 2, 10, 7]
    assert layer.values.flatten().tolist() == [0.5, 0.0, 0.25, 0.0]


@pytest.mark.parametrize(
    ("entries", "index", "values", "removed"),
    [
        ({"p0": 9.0, "p3": -8.0, "p7": -5.0}, [5, 0, 10, 3], [0.5, -0.1, 0.25, -0.2], 0),
        ({"p0": 9.0, "p7": -5.0, "p3": 1.0}, [5, 0, 10, 7], [0.5, -0.1, 0.25, 0.0], 1),
        ({"p3": 9.0, "p7": -5.0, "p0": 1.0}, [5, 7, 10, 3], [0.5, 0.0, 0.25, -0.2], 1),
        ({"p11": 9.0, "p7": -5.0, "p10": 100.0}, [5, 7, 10, 11], [0.5, 0.0, 0.25, 0.0], 2),
    ],
)
def test_readmitted_blocks_keep_slot_and_values(
    entries: dict[str, float], index: list[int], values: list[float], removed: int
) -> None:
    layer = example()
    update = prune_regrow_(
        layer, pruning_ratio=0.5, regrow_rule="gradient", readmit=True, dense_gradient=gradient(**entries)
    )
    assert update == LayerUpdate(removed, 0)
    assert layer.block_index.tolist() == index
    assert layer.values.flatten().tolist() == torch.tensor(values).tolist()


def test_ties_go_to_the_lower_slot_and_position() -> None:
    layer = place_(make_layer((3, 4), 1, 4), INDEX, [1.0, 1.0, 1.0, 1.0])
    prune_regrow_(layer, pruning_ratio=0.5, regrow_rule="gradient", dense_gradient=gradient())
    assert layer.block_index.tolist() == [1, 2, 10, 3]


@pytest.mark.parametrize(("score", "slot"), [("l1", 1), ("l2", 2), ("linf", 0)])
def test_each_score_prunes_another_block(score: str, slot: int) -> None:
    blocks = [[[1, -1], [1, 1]], [[0, 0], [0, -2.5]], [[1.25, 0], [-1.25, 0.5]]]
    layer = place_(make_layer((2, 3), 2, 3), [4, 2, 0], blocks)
    prune_regrow_(layer, pruning_ratio=0.1, prune_score=score)
    assert (layer.block_index != torch.tensor([4, 2, 0])).nonzero().flatten().tolist() == [slot]


def test_gradient_prune_by_hand() -> None:
    layer = example()
    dense = gradient(p5=-0.1, p0=5.0, p10=0.2, p3=-7.0, p8=3.0, p9=2.0)
    prune_regrow_(layer, pruning_ratio=0.5, prune_score="gradient", regrow_rule="gradient", dense_gradient=dense)
    assert layer.block_index.tolist() == [8, 0, 9, 3]


def trained(grid: tuple[int, int], block_size: object, nnzb: int) -> tuple[BlockSparseLinear, torch.optim.Optimizer]:
    """A tracked layer after one step of AdamW: every moment is there and not zero."""
    layer = make_layer(grid, block_size, nnzb, tracked=True)
    track_(layer, {"first_values", "saliency"})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    layer(torch.randn(5, layer.in_features, generator=generator())).square().sum().backward()
    optimizer.step()
    return layer, optimizer


def observed(layer: BlockSparseLinear) -> dict[str, torch.Tensor]:
    """What training alone could tell, of every position."""
    (rows, columns), draw = layer.block_shape, generator(3)
    shapes = {"momentum": (rows, columns), "input_scale": (1, columns), "output_scale": (rows, 1)}
    return {name: torch.rand(layer.num_blocks, *shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("readmit", [False, True], ids=["barred", "readmit"])
@pytest.mark.parametrize(("prune_score", "regrow_rule"), SCORES_AND_RULES)
def test_what_holds_for_every_variant(prune_score: str, regrow_rule: str, readmit: bool) -> None:
    """Each pair of a ratio and a block size within four tests, each rule with each ratio."""
    first = SCORES_AND_RULES.index((prune_score, regrow_rule)) + readmit
    for number, ratio in enumerate((0.0, 0.01, 0.4, 1.0)):
        layer, optimizer = trained((5, 6), (1, 4, (4, 2))[(first + number) % 3], 12)
        moments = check_optimizer_state(optimizer, layer.values)
        assert len(moments) == 2
        tensors = [layer.values.detach(), *moments]
        before = [tensor.clone() for tensor in tensors]
        index, storage = layer.block_index.clone(), layer.values.data_ptr()
        update = prune_regrow_(
            layer,
            optimizer,
            pruning_ratio=ratio,
            prune_score=prune_score,
            regrow_rule=regrow_rule,
            readmit=readmit,
            generator=generator(1),
            dense_gradient=torch.randn(30, *layer.block_shape, generator=generator(2)),
            observed=observed(layer),
        )
        layer.layout.validate()
        changed = layer.block_index != index
        assert (layer.nnzb, layer.values.data_ptr(), layer.block_index.dtype) == (12, storage, torch.int32)
        assert update.removed == int(changed.sum())
        count = replaced_count(ratio, 12, 30, readmit)
        assert count == {0.0: 0, 0.01: 1, 0.4: 5, 1.0: 12}[ratio]
        assert update.removed <= count if readmit else update.removed == count
        assert not torch.isin(layer.block_index[changed], index).any()
        for old, new in zip(before, tensors, strict=True):
            assert torch.equal(old[~changed], new[~changed])
            assert new[changed].abs().sum() == 0
            assert (old[changed] != 0).all()
        assert block_ages(layer, 1).tolist() == [0 if new else 1 for new in changed]
        assert set(ever_active(layer).nonzero().flatten().tolist()) == {*index.tolist(), *layer.block_index.tolist()}


@pytest.mark.parametrize("readmit", [False, True])
def test_a_full_layer_has_nowhere_to_go(readmit: bool) -> None:
    layer, optimizer = trained((3, 4), 2, 12)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for rule in REGROW_RULES:
        update = prune_regrow_(layer, optimizer, pruning_ratio=1.0, regrow_rule=rule, readmit=readmit)
        assert update == LayerUpdate(0, 0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_an_almost_full_layer_replaces_what_it_can() -> None:
    layer = make_layer((3, 4), 1, 10)
    free = set(range(12)) - set(layer.block_index.tolist())
    assert prune_regrow_(layer, pruning_ratio=1.0) == LayerUpdate(2, 0)
    assert free <= set(layer.block_index.tolist())


def test_random_regrow_is_uniform_and_depends_on_the_generator_alone() -> None:
    draw, hits = generator(), torch.zeros(12)
    for _ in range(200):
        layer = example()
        prune_regrow_(layer, pruning_ratio=0.5, generator=draw)
        hits[layer.block_index.long()] += 1
    assert hits[[0, 3, 5, 10]].tolist() == [0, 0, 200, 200]
    inactive = hits[[1, 2, 4, 6, 7, 8, 9, 11]]
    assert (inactive - 50).abs().max() < 31  # five standard deviations
    layers = [example(), example()]
    for layer in layers:
        prune_regrow_(layer, pruning_ratio=1.0, generator=generator(7))
    assert torch.equal(layers[0].block_index, layers[1].block_index)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"prune_score": "unfired"},
            ValueError,
            "`prune_score` must be one of l1, l1_patient, l2, linf, random, gradient",
        ),
        ({"regrow_rule": "l1"}, ValueError, "`regrow_rule` must be one of random, gradient, unfired, .* Got 'l1'"),
        ({"regrow_rule": "gradient"}, ValueError, "dense_gradient"),
        ({"prune_score": "gradient"}, ValueError, "dense_gradient"),
        ({"prune_score": "movement"}, ValueError, "needs 'first_values', which is recorded .* Got a layer without it"),
        ({"prune_score": "l1", "prune_min_age": -1}, ValueError, "`prune_min_age` must not be negative. Got -1"),
        ({"regrow_rule": "unfired"}, ValueError, "does not record its exploration"),
        (
            {"regrow_rule": "gradient", "dense_gradient": gradient(p1=math.nan)},
            FloatingPointError,
            "`regrow_rule` 'gradient' gave a score that is not finite",
        ),
    ],
)
def test_an_error_changes_nothing(arguments: dict, error: type[Exception], message: str) -> None:
    layer = example()
    with pytest.raises(error, match=message):
        prune_regrow_(layer, pruning_ratio=0.5, **arguments)
    assert layer.block_index.tolist() == INDEX
    assert layer.values.flatten().tolist() == torch.tensor(VALUES).tolist()


def test_values_that_are_not_finite_are_an_error() -> None:
    layer = example()
    with torch.no_grad():
        layer.values[0] = math.inf
    with pytest.raises(FloatingPointError, match="`prune_score` 'l1' gave a score that is not finite"):
        prune_regrow_(layer, pruning_ratio=0.5)
    assert layer.block_index.tolist() == INDEX


@pytest.mark.parametrize(("num_updates", "readmit"), [(40, True), (80, False)], ids=["readmit", "barred"])
def test_coverage_of_a_run_is_the_closed_form(num_updates: int, readmit: bool) -> None:
    layer = BlockSparseLinear(512, 512, block_size=1, sparsity=0.9)
    density, missed = layer.nnzb / layer.num_blocks, 1 - layer.nnzb / layer.num_blocks
    layer.reset_parameters(generator=generator(1))
    track_(layer)
    for update in range(num_updates):
        with torch.no_grad():  # as if training had made old and new weights alike
            layer.values.normal_(generator=generator(1000 + update))
        ratio = cosine_ratio(update, num_updates, 0.5)
        prune_regrow_(layer, pruning_ratio=ratio, readmit=readmit, generator=generator(update), update=update)
        replaced = density * ratio
        missed *= 1 - replaced / (1 - density + replaced * readmit)
    assert dof_coverage([layer]) == pytest.approx(1 - missed, abs=COVERAGE_ATOL)
