"""Draws of active blocks: uniformly at random, balanced over rows and columns, or spread evenly."""

import torch


def random_block_index(
    num_blocks: int,
    nnzb: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw `nnzb` different block ids uniformly, in ascending order: `torch.int32` of shape `(nnzb,)` (§3.1, always
    sparse).
    """
    drawn = torch.randperm(num_blocks, generator=generator, device=generator.device if generator else "cpu")
    return drawn[:nnzb].sort().values.to(device=device, dtype=torch.int32)


def balanced_block_index(
    grid: tuple[int, int],
    nnzb: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw `nnzb` different block ids at random, in ascending order, such that all block rows of `grid` hold as many as
    each other, to within one, and so do all block columns: `torch.int32` of shape `(nnzb,)`. Where few blocks are
    active, a uniform draw leaves rows or columns empty, and their outputs or inputs unused.
    """
    rows, columns = grid
    where = generator.device if generator else torch.device("cpu")
    order = torch.randperm(rows, generator=generator, device=where)
    active = torch.zeros(grid, dtype=torch.bool, device=where)
    load = torch.zeros(columns, dtype=torch.float64, device=where)  # exact when a draw is added
    for turn, row in enumerate(order.tolist()):
        # Each row takes the emptiest columns, of equally empty ones any: their loads never differ by more than one.
        preference = load + torch.rand(columns, generator=generator, device=where)
        count = nnzb // rows + (turn < nnzb % rows)
        taken = preference.topk(count, largest=False).indices
        active[row, taken] = True
        load[taken] += 1
    return active.flatten().nonzero().squeeze(1).to(device=device, dtype=torch.int32)


def spread_evenly(
    occupied: torch.Tensor, free: torch.Tensor, count: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Draw `count` free positions at random, the emptiest block rows and block columns first: flat ids in ascending
    order, `torch.int64` of shape `(count,)`.

    Args:
        occupied (`torch.Tensor` of shape `(block_rows, block_columns)`, `torch.bool`): where blocks are.
        free (`torch.Tensor` of the same shape, `torch.bool`): where blocks may come; at least `count` positions.
    """
    free, missing = free.clone(), count
    loads = occupied.sum(1), occupied.sum(0)
    chosen = [torch.empty(0, dtype=torch.int64, device=free.device)]
    # Rows and columns that lack blocks are paired at random; pairs that are taken try again.
    for _ in range(16):
        if missing == 0:
            break
        rows, columns = (
            _lines_to_fill(load, free.sum(1 - side), missing, generator) for side, load in enumerate(loads)
        )
        ids = (rows * free.shape[1] + columns).unique()
        ids = ids[free.view(-1)[ids]]
        free.view(-1)[ids] = False
        loads[0].add_(torch.bincount(ids // free.shape[1], minlength=free.shape[0]))
        loads[1].add_(torch.bincount(ids % free.shape[1], minlength=free.shape[1]))
        chosen.append(ids)
        missing -= len(ids)
    if missing:  # a few that lack partners go to rows and columns that hold little
        rows, columns = free.nonzero(as_tuple=True)
        fullness = loads[0][rows] + loads[1][columns] + torch.rand(len(rows), generator=generator, device=free.device)
        rest = fullness.argsort()[:missing]
        chosen.append(rows[rest] * free.shape[1] + columns[rest])
    return torch.cat(chosen).sort().values


def _lines_to_fill(
    load: torch.Tensor, capacity: torch.Tensor, count: int, generator: torch.Generator | None
) -> torch.Tensor:
    """
    Rows (or columns) in which to put `count` blocks so that all end as level as their `load` and `capacity` allow, in
    random order: `torch.int64` of shape `(count,)`.
    """
    low, high = int(load.min()), int(load.max()) + count
    while low < high:  # the highest level to which all can be filled
        middle = (low + high + 1) // 2
        if int((middle - load).clamp(min=0).minimum(capacity).sum()) <= count:
            low = middle
        else:
            high = middle - 1
    added = (low - load).clamp(min=0).minimum(capacity)
    higher = ((load + added == low) & (added < capacity)).nonzero().squeeze(1)
    added[_shuffled(higher, generator)[: count - int(added.sum())]] += 1
    return _shuffled(torch.arange(len(load), device=load.device).repeat_interleave(added), generator)


def _shuffled(numbers: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return numbers[torch.randperm(len(numbers), generator=generator, device=numbers.device)]
