"""Dense linear layers out, sparse ones in, and back: for any `nn.Module`."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ..blocks.distributions import active_blocks
from ..blocks.sizes import as_block_shape
from .linear import BlockSparseLinear, sparse_layers


# Heads and poolers stay dense (arXiv:2108.06277, section 3).
DENSE_PARTS = ("*cls*", "*pooler*", "*classifier*", "*lm_head*", "*score*", "*qa_outputs*", "*head*")


def sparsify_(
    model: nn.Module,
    block_size: int | tuple[int, int] = 16,
    sparsity: float = 0.9,
    *,
    distribution: str = "uniform",
    targets: Iterable[str] = ("*",),
    ignore: Iterable[str] = DENSE_PARTS,
) -> nn.Module:
    """
    Replace, in place, the dense linear layers of any model by sparse ones that keep their largest blocks (L1 norm).

    Args:
        model (`nn.Module`): changed in place and returned.
        targets, ignore (`Iterable[str]`): shell-style patterns of module names; a layer is replaced if it matches a
            target and no ignore. By default every `nn.Linear` outside heads and poolers. A weight that is tied to an
            embedding is never replaced.
        distribution (`str`): how the density is spread over the layers, `"uniform"` or `"erk"`.

    Raises:
        ValueError: if no layer matches, or a block does not divide one of them; the model is then untouched.
    """
    targets, ignore = tuple(targets), tuple(ignore)
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name  # a model that is itself a layer has no place to put another
        and module.weight not in tied
        and any(fnmatchcase(name, pattern) for pattern in targets)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    if not linears:
        present = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"`sparsify_` must find at least one linear layer. Got none for targets={list(targets)} and "
            f"ignore={list(ignore)}. Linear layers of this model: {', '.join(present[:8]) or 'none'}. Change the "
            "patterns."
        )
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    nnzb = active_blocks(shapes, sparsity, as_block_shape(block_size), distribution)
    for name, linear in linears.items():
        model.set_submodule(name, BlockSparseLinear.from_dense(linear, block_size, nnzb=nnzb[name]))
    return model


def densify_(model: nn.Module) -> nn.Module:
    """
    Replace, in place, every sparse layer by a dense one with the same outputs. Optimiser state must be made anew.

    Raises:
        ValueError: if the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            "`densify_` must find at least one `BlockSparseLinear`. Got none: the model is dense already."
        )
    if "" in layers:
        raise ValueError("`densify_` must get a model that contains sparse layers. Got a layer: use `.to_linear()`.")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
    return model
