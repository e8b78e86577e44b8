"""The data layout: orders by hand, counts, and what a damaged index says."""

import pytest
import torch
from helpers import generator

from hf_dynsparse import BlockLayout
from hf_dynsparse.blocks import layout as layout_module
from hf_dynsparse.blocks.dense import from_blocks, to_blocks
from hf_dynsparse.blocks.draw import balanced_block_index, random_block_index, spread_evenly
from hf_dynsparse.blocks.layout import layout_of
from hf_dynsparse.blocks.sizes import as_block_shape, block_grid, check_sparsity, count_active_blocks


def layout(block_index: list[int], dtype: torch.dtype = torch.int32) -> BlockLayout:
    """3 x 4 blocks of 2 x 1 entries."""
    return BlockLayout(torch.tensor(block_index, dtype=dtype), (6, 4), (2, 1))


def test_blocks_by_hand_and_back() -> None:
    dense = torch.arange(24).view(4, 6)
    blocks = to_blocks(dense, (2, 3))
    assert blocks.shape == (2, 2, 2, 3)
    assert blocks[1, 0].tolist() == [[12, 13, 14], [18, 19, 20]]
    assert torch.equal(from_blocks(blocks), dense)
    assert torch.equal(to_blocks(dense.T, (3, 2))[0, 1], blocks[1, 0].T)  # a view of a view


def test_what_is_derived_is_kept_until_the_index_changes_or_ends() -> None:
    index, made = torch.tensor([9, 11, 1, 8], dtype=torch.int32), []

    def derive(layout: BlockLayout, more: int) -> list[int]:
        made.append(more)
        return (layout.rows + more).tolist()

    def derived(index: torch.Tensor, more: int = 1) -> list[int]:
        return layout_of(index, (6, 4), (2, 1)).derived(derive, more)

    assert derived(index) == derived(index) == [3, 3, 1, 3]
    assert derived(index, 2) == [4, 4, 2, 4]
    assert layout_of(index, (4, 6), (1, 2)) is not layout_of(index, (6, 4), (2, 1))
    assert made == [1, 2]
    index[0] = 0
    assert derived(index) == [1, 3, 1, 3]
    index.data = torch.tensor([2, 3], dtype=torch.int32)  # no change of version, but of place
    assert derived(index) == [1, 1]
    assert made == [1, 2, 1, 1]
    with torch.inference_mode():
        inferred = torch.tensor([4], dtype=torch.int32)
    assert derived(inferred) == derived(inferred) == [2]  # each time: such a tensor has no version
    assert made == [1, 2, 1, 1, 1, 1]
    count = len(layout_module._known)
    del index
    assert len(layout_module._known) == count - 1


def test_orders_by_hand() -> None:
    # . 2 . .      slots; row 1 is empty
    # . . . .
    # 3 0 . 1
    example = layout([9, 11, 1, 8])
    assert (example.grid, example.num_blocks, example.nnzb, example.density) == ((3, 4), 12, 4, 1 / 3)
    assert example.rows.tolist() == [2, 2, 0, 2]
    assert example.columns.tolist() == [1, 3, 1, 0]
    by_row, by_column = example.by_row, example.by_column
    assert by_row.slots.tolist() == [2, 3, 0, 1]
    assert by_row.offsets.tolist() == [0, 1, 1, 4]
    assert by_row.rows.tolist() == [0, 2, 2, 2]
    assert by_row.sources.tolist() == by_row.columns.tolist() == [1, 0, 1, 3]
    assert by_row.heaviest.tolist() == [2, 0, 1]
    assert by_column.slots.tolist() == [3, 2, 0, 1]
    assert by_column.offsets.tolist() == [0, 1, 3, 3, 4]
    assert by_column.columns.tolist() == [0, 1, 1, 3]
    assert by_column.sources.tolist() == by_column.rows.tolist() == [2, 0, 2, 2]
    assert by_column.heaviest.tolist() == [1, 0, 3, 2]
    assert example.to_mask().int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]


def test_orders_of_a_random_layout() -> None:
    index = torch.randperm(35, generator=generator())[:17].int()
    drawn = BlockLayout(index, (10, 21), (2, 3))
    assert index[drawn.by_row.slots].tolist() == sorted(index.tolist())
    places = [(drawn.columns[slot].item(), drawn.rows[slot].item()) for slot in drawn.by_column.slots]
    assert places == sorted((place % 7, place // 7) for place in index.tolist())
    for row in range(5):
        slots = drawn.by_row.slots[drawn.by_row.offsets[row] : drawn.by_row.offsets[row + 1]]
        assert sorted(index[slots].tolist()) == sorted(place for place in index.tolist() if place // 7 == row)
    drawn.validate()


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (layout([1, 2], torch.int64), r"1-D int32 tensor. Got torch.int64 of shape \(2,\)"),
        (BlockLayout(torch.zeros(2, 2, dtype=torch.int32), (6, 4), (2, 1)), r"Got torch.int32 of shape \(2, 2\)"),
        (layout([3, 12, 13]), r"must lie in \[0, 12\). Got 12 in slot 1"),
        (layout([3, 4, -1]), "Got -1 in slot 2"),
        (layout([3, 7, 0, 7]), "must name each block once. Got 7 twice"),
    ],
)
def test_a_damaged_index_is_named_and_a_remedy_given(damaged: BlockLayout, message: str) -> None:
    with pytest.raises(ValueError, match=f"^`block_index` of query .*{message}.*load an intact one.$"):
        damaged.validate("query")


def test_counts_are_rounded_half_up_between_one_and_all() -> None:
    cases = {(10, 0.25): 3, (10, 0.24): 2, (10, 0.05): 1, (10, 0.0): 1, (10, 1.0): 10, (1, 0.1): 1, (16, 0.5): 8}
    assert {case: count_active_blocks(*case) for case in cases} == cases


def test_a_drawn_index_is_sorted_unique_and_uniform() -> None:
    index = random_block_index(50, 20, generator())
    assert index.dtype == torch.int32
    assert index.tolist() == sorted(set(index.tolist()))
    assert random_block_index(50, 20, generator()).tolist() == index.tolist()
    draw = generator()
    hits = sum(torch.bincount(random_block_index(10, 3, draw), minlength=10) for _ in range(1000))
    assert (hits - 300).abs().max() < 75  # five standard deviations
    assert random_block_index(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("grid", "nnzb"),
    [((16, 16), 26), ((64, 16), 102), ((16, 64), 102), ((4, 4), 4), ((3, 5), 7), ((1, 6), 3), ((5, 1), 5)],
)
def test_a_balanced_index_fills_rows_and_columns_alike(grid: tuple[int, int], nnzb: int) -> None:
    for seed in range(10):
        index = balanced_block_index(grid, nnzb, generator(seed))
        assert index.dtype == torch.int32
        assert index.tolist() == sorted(set(index.tolist()))
        assert index.tolist() == balanced_block_index(grid, nnzb, generator(seed)).tolist()
        active = torch.zeros(grid).index_put_((index.long() // grid[1], index.long() % grid[1]), torch.tensor(1.0))
        for side in (0, 1):
            held = active.sum(side)
            assert held.max() - held.min() <= 1
            assert held.sum() == nnzb
    assert len({tuple(balanced_block_index((16, 16), 26, generator(seed)).tolist()) for seed in range(10)}) == 10


@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 0.99, 1.0])
def test_an_uneven_start_is_levelled_as_far_as_there_is_room(density: float) -> None:
    draw = generator(int(100 * density))
    occupied = torch.rand(12, 20, generator=draw) < torch.linspace(0, 0.8, 12)[:, None]
    free = ~occupied & (torch.rand(12, 20, generator=draw) < 0.8)
    count = int(density * int(free.sum()))
    chosen = spread_evenly(occupied, free, count, draw)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == count
    assert free.view(-1)[chosen].all()
    after = occupied.view(-1).index_fill(0, chosen, True).view(12, 20)
    room = (free & ~after).any(1)
    if room.any():  # a row that could have taken more holds nearly as many as any that took some
        took = (after & ~occupied).any(1)
        assert after.sum(1)[room].min() >= after.sum(1)[took].max() - 4


@pytest.mark.parametrize(
    ("block_size", "block_shape"), [(1, (1, 1)), (16, (16, 16)), ((1, 4), (1, 4)), ([4, 2], (4, 2))]
)
def test_block_size_is_a_side_or_a_pair(block_size: object, block_shape: tuple[int, int]) -> None:
    assert as_block_shape(block_size) == block_shape


@pytest.mark.parametrize("block_size", [0, -4, True, (4,), (4, 0), (4, 4, 4), (2.0, 4), "16", 2.5, None], ids=repr)
def test_a_bad_block_size_is_an_error(block_size: object) -> None:
    with pytest.raises(ValueError, match=r"`block_size` must be a positive integer or a pair .* Got .* Choose for ex"):
        as_block_shape(block_size)


def test_a_block_that_does_not_divide_the_matrix_is_an_error() -> None:
    assert block_grid((6, 4), (2, 1)) == (3, 4)
    message = r"must divide both sides of `query` \(768 x 40\). Got 20 x 20. Choose 1, 2, 4, 8.$"
    with pytest.raises(ValueError, match=message):
        block_grid((768, 40), (20, 20), "`query`")
    with pytest.raises(ValueError, match="Choose 1, 2, 4, 8, 16, 32, 64.$"):
        block_grid((768, 64), (5, 4))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90, float("nan")])
def test_a_sparsity_out_of_range_is_an_error(sparsity: float) -> None:
    assert check_sparsity(0.0) == 0.0
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\). Got .*Choose 0.9 to keep"):
        check_sparsity(sparsity)
