"""Sparse layers in the places of dense ones, and back: the tool, for any `nn.Module`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..blocks.distributions import active_blocks
from .linear import BlockSparseLinear, trainable_layers


# Heads and poolers stay dense (arXiv:2108.06277, section 3).
DENSE_PARTS = ("*cls*", "*pooler*", "*classifier*", "*lm_head*", "*score*", "*qa_outputs*", "*head*")

# The class that replaces each dense one. Each has `from_dense` and `dense_shape`.
SPARSE_TYPES: dict[type[nn.Module], type[BlockSparseLinear]] = {nn.Linear: BlockSparseLinear}

SparseTypes = Mapping[type[nn.Module], type[BlockSparseLinear]]


def plan_blocks(
    model: nn.Module,
    block_shape: tuple[int, int],
    sparsity: float,
    distribution: str = "uniform",
    targets: Iterable[str] = ("*",),
    ignore: Iterable[str] = DENSE_PARTS,
    *,
    among: Iterable[str] | None = None,
    types: SparseTypes = SPARSE_TYPES,
) -> dict[str, int]:
    """
    The dense layers of `model` to be made sparse, and the active blocks of each. A weight that two modules share is
    never among them.

    Args:
        targets, ignore (`Iterable[str]`): shell-style patterns of module names. A layer is chosen if it matches a
            target and no ignore.
        among (`Iterable[str]`, *optional*): the modules to choose from, by name. By default all.

    Raises:
        ValueError: if no layer matches, or a block does not divide one of them.
    """
    targets, ignore = list(targets), list(ignore)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # By exact type: a subclass computes something of its own. A model that is itself a layer has no place for another.
    linears: dict[str, Any] = {name: layer for name, layer in model.named_modules() if name and type(layer) in types}
    allowed = set(linears if among is None else among)
    shapes = {
        name: types[type(linear)].dense_shape(linear)
        for name, linear in linears.items()
        if name in allowed
        and uses[id(linear.weight)] == 1
        and any(fnmatchcase(name, pattern) for pattern in targets)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    if not shapes:
        raise ValueError(
            f"At least one linear layer of {type(model).__name__} must be chosen. Got none for targets={targets} and "
            f"ignore={ignore}. Its linear layers: {', '.join(list(linears)[:8]) or 'none'}. Change the patterns; "
            "`ignore=()` makes heads sparse too."
        )
    try:
        return active_blocks(shapes, sparsity, block_shape, distribution)
    except ValueError as error:
        raise ValueError(f"{error} Or leave layers out by `targets` or `ignore`.") from error


def replace_by_sparse_(
    model: nn.Module, nnzb: Mapping[str, int], block_shape: tuple[int, int], types: SparseTypes = SPARSE_TYPES
) -> None:
    """Replace the dense layers that `nnzb` names by sparse ones that keep so many of their largest blocks."""
    for name, count in nnzb.items():
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, types[type(linear)].from_dense(linear, block_shape, nnzb=count))


def replace_by_dense_(model: nn.Module) -> None:
    """
    Replace every sparse layer by a dense one with the same outputs.

    Raises:
        ValueError: if the model has no sparse layer.
    """
    layers = trainable_layers(model)
    if not layers:
        raise ValueError(
            "`densify_` must find at least one `BlockSparseLinear`. Got none: the model is dense already."
        )
    if "" in layers:
        raise ValueError("`densify_` must get a model that contains sparse layers. Got a layer: use `.to_linear()`.")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
