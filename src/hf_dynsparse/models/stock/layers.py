"""Which layers of a stock model become sparse, and the layers that take their places."""

import math
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Conv1D, PreTrainedModel

from ...blocks.distributions import active_blocks
from ...blocks.sizes import block_grid
from ...nn.linear import BlockSparseLinear, sparse_layers
from ..body import body_modules
from .configuration import DynSparseQuantizationConfig


About = TypeVar("About")  # what is known of a layer


class SparseLinear(BlockSparseLinear):
    """A [`BlockSparseLinear`] in a stock transformers model."""

    @property
    def weight(self) -> torch.Tensor:
        """
        A stand-in of the dense shape, for architectures whose code asks a linear layer for the dtype, device or shape
        of its weight. It takes no memory, and is NaN throughout: to compute with it would be an error.
        """
        stand_in: Any = self.values.new_full((), math.nan).expand(self.shape)
        stand_in._is_hf_initialized = True  # the initialisation of some architectures is told to leave it alone
        return stand_in


class SparseConv1D(SparseLinear):
    """In the place of a [`~transformers.pytorch_utils.Conv1D`]: a linear layer of GPT-2, stored transposed."""

    @classmethod
    def from_dense(
        cls,
        linear: Any,
        block_size: int | tuple[int, int] = 16,
        sparsity: float = 0.9,
        *,
        nnzb: int | None = None,
    ) -> BlockSparseLinear:
        """See [`BlockSparseLinear.from_dense`]; `linear` is a `Conv1D`."""
        straight = nn.Linear(linear.nx, linear.nf, device="meta").train(linear.training)
        straight.weight = nn.Parameter(linear.weight.detach().T, requires_grad=linear.weight.requires_grad)
        straight.bias = linear.bias
        return super().from_dense(straight, block_size, sparsity, nnzb=nnzb)

    def to_linear(self) -> Any:
        """A `Conv1D` with the same outputs."""
        straight = super().to_linear()
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features).train(self.training)
        conv.weight = nn.Parameter(straight.weight.detach().T.contiguous(), straight.weight.requires_grad)
        conv.bias = straight.bias
        return conv


SPARSE_TYPES: dict[type[nn.Module], type[SparseLinear]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def plan(model: PreTrainedModel, config: DynSparseQuantizationConfig) -> dict[str, int]:
    """
    The layers of `model` that `config` asks to be made sparse, and the active blocks of each.

    Raises:
        ValueError: if no layer matches, or a block does not divide one of them.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # A subclass of a linear layer computes something of its own.
    linears: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) in SPARSE_TYPES}
    body, ignore = (body_modules(model), ()) if config.ignore is None else (linears, config.ignore)
    shapes = {
        name: _shape(linear)
        for name, linear in linears.items()
        if name in body
        and uses[id(linear.weight)] == 1
        and any(fnmatchcase(name, pattern) for pattern in config.targets)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    if not shapes:
        raise ValueError(
            f"At least one linear layer of {type(model).__name__} must be chosen. Got none for "
            f"targets={config.targets} and ignore={config.ignore}. Its linear layers: "
            f"{', '.join(list(linears)[:8]) or 'none'}. Change the patterns; `ignore=()` makes heads sparse too."
        )
    try:
        return active_blocks(shapes, config.sparsity, config.block_shape, config.distribution)
    except ValueError as error:
        raise ValueError(f"{error} Or leave layers out by `targets` or `ignore`.") from error


def _shape(linear: Any) -> tuple[int, int]:
    """`(out_features, in_features)`."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def present_layers(model: PreTrainedModel, layers: Mapping[str, About]) -> dict[str, About]:
    """`layers` by the names that they have in `model`: the loader's own rule for heads and bare models."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    present = {}
    for name, about in layers.items():
        for alias in (name, name.removeprefix(prefix), prefix + name):
            if alias in modules:
                present[alias] = about
                break
    if not present:
        raise ValueError(
            f"`quantization_config` must name layers of {type(model).__name__}. Got none in {model.name_or_path}: it "
            f"names {', '.join(list(layers)[:3]) or 'nothing'}. Load a class of the architecture that was saved."
        )
    return present


def _check_one_block_size(model: nn.Module, config: DynSparseQuantizationConfig) -> None:
    for name, layer in sparse_layers(model).items():
        if layer.block_shape != config.block_shape:
            raise ValueError(
                "All sparse layers of a transformers model must have blocks of one size. Got "
                f"{config.block_shape} for a model with {layer.block_shape} in `{name}`. Use one `block_size`."
            )


def _replace_(model: PreTrainedModel, nnzb: Mapping[str, int], config: DynSparseQuantizationConfig) -> None:
    dense = {name: model.get_submodule(name) for name in nnzb}
    for name, count in nnzb.items():
        if type(dense[name]) not in SPARSE_TYPES:
            raise ValueError(f"`nnzb` must name linear layers. Got `{name}`, which is a {type(dense[name]).__name__}.")
        rows, columns = block_grid(_shape(dense[name]), config.block_shape, f"`{name}`")
        if not 1 <= count <= rows * columns:
            raise ValueError(f"`nnzb` of `{name}` must lie in [1, {rows * columns}]. Got {count}.")
    for name, linear in dense.items():
        sparse: Any = SPARSE_TYPES[type(linear)]
        model.set_submodule(name, sparse.from_dense(linear, config.block_shape, nnzb=nnzb[name]))
