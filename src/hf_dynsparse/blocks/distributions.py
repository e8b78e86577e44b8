"""How many blocks each layer keeps: the distribution of a global density over the layers. Pure Python."""

from collections.abc import Callable, Mapping

from .sizes import block_grid, check_sparsity, count_active_blocks


Shapes = Mapping[str, tuple[int, int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density in every layer: the paper's choice (arXiv:2108.06277, section 3)."""
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """
    Erdős-Rényi-Kernel: density proportional to `(out + in) / (out * in)`, at equal total size (arXiv:1911.11134,
    section 3).

    Small layers stay denser. A layer whose share would exceed 1 is kept whole and the rest is scaled again.
    """
    raw = {name: (out + inp) / (out * inp) for name, (out, inp) in shapes.items()}
    size = {name: out * inp for name, (out, inp) in shapes.items()}
    budget, whole = density * sum(size.values()), set[str]()
    while True:
        free = [name for name in shapes if name not in whole]
        share = budget - sum(size[name] for name in whole)
        scale = share / sum(raw[name] * size[name] for name in free) if free else 0.0
        overfull = {name for name in free if scale * raw[name] > 1.0}
        if not overfull:
            return {name: 1.0 if name in whole else scale * raw[name] for name in shapes}
        whole |= overfull


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform, "erk": erk}


def active_blocks(
    shapes: Shapes,
    sparsity: float,
    block_shape: tuple[int, int] | Mapping[str, tuple[int, int]],
    distribution: str = "uniform",
) -> dict[str, int]:
    """
    Number of active blocks `nnzb` of each layer: a function of shapes and arguments alone, so that every tensor size
    is known before a checkpoint is opened.

    Args:
        shapes (`Mapping[str, tuple[int, int]]`): `(out_features, in_features)` per layer name.
        sparsity (`float`): share of inactive positions over all layers, in [0, 1).
        block_shape (`tuple[int, int]` or `Mapping[str, tuple[int, int]]`): rows and columns of a block, for all layers
            or by layer name.
        distribution (`str`): a key of `DISTRIBUTIONS`.

    Raises:
        ValueError: for a sparsity out of range, an unknown distribution or a block that does not divide a layer.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}. Got {distribution!r}.")
    densities = DISTRIBUTIONS[distribution](shapes, 1.0 - check_sparsity(sparsity))
    blocks = block_shape if isinstance(block_shape, Mapping) else dict.fromkeys(shapes, block_shape)
    nnzb = {}
    for name, shape in shapes.items():
        rows, columns = block_grid(shape, blocks[name], f"`{name}`")
        nnzb[name] = count_active_blocks(rows * columns, densities[name])
    return nnzb
