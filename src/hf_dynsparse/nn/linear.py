"""`BlockSparseLinear`, and what it shares with sparse layers of other numbers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..blocks.dense import to_blocks
from ..blocks.draw import balanced_block_index, random_block_index
from ..blocks.layout import BlockLayout, layout_of
from ..blocks.sizes import as_block_shape, block_grid, check_sparsity, count_active_blocks
from ..ops import Problem, block_sparse_linear, describe_choice, to_dense


Layer = TypeVar("Layer", bound=nn.Module)

# The ends of names of buffers in which training records what it needs; a loaded model has no use for them. The first
# are those of the first version; whatever is new begins with `recorded_`.
TRAINING_BUFFER = r"\.(ever_active|active_since|gradient_momentum|hidden_values|input_range|recorded_\w+)$"

# The parameter that a search for a ticket adds to output projections; a loaded model has no use for it either.
SEARCH_GATES = "gates"

# Where the first blocks are: (block rows and columns, nnzb, generator) -> block index.
INITIAL_TOPOLOGIES: dict[str, Callable[[tuple[int, int], int, torch.Generator | None], torch.Tensor]] = {
    "random": lambda grid, nnzb, generator: random_block_index(grid[0] * grid[1], nnzb, generator),
    "balanced": balanced_block_index,
}


def fan_in_scale(layout: BlockLayout) -> torch.Tensor:
    """
    By how much the values of each slot must be larger than those of a dense layer for outputs of the same variance,
    `sqrt(inputs / active inputs of the block row)`: of shape `(nnzb, 1, 1)` (arXiv:2010.03533, section 4, by blocks).
    """
    rows = layout.rows
    active = torch.bincount(rows, minlength=layout.grid[0])
    return (layout.grid[1] / active[rows]).sqrt().view(-1, 1, 1)


# How large the first values of each slot are beside `std`; `None` leaves them as drawn.
SPARSE_INITS: dict[str, Callable[[BlockLayout], torch.Tensor] | None] = {"normal": None, "fan_in": fan_in_scale}


class LinearLayer(nn.Module):
    """
    What all linear layers of this package have, with weights in floating point or int8: where something is counted or
    replaced, it is enough to know this.
    """

    in_features: int
    out_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.out_features, self.in_features

    @property
    def nnz(self) -> int:
        """Entries of the weight that are stored."""
        raise NotImplementedError


class SparseLayer(LinearLayer):
    """
    What all block-sparse layers have, those that train and int8 ones that do not.

    Attributes:
        block_shape (`tuple[int, int]`): rows and columns of a block.
        grid (`tuple[int, int]`): block rows and block columns.
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`), block_index (`torch.Tensor` of shape `(nnzb,)`,
            `torch.int32`), bias (`torch.Tensor` of shape `(out_features,)`, *optional*).
    """

    block_shape: tuple[int, int]
    grid: tuple[int, int]

    if TYPE_CHECKING:  # to be read only. At run time a property would be in the way of a parameter of that name.

        @property
        def values(self) -> torch.Tensor:
            """One slot per active block."""

        @property
        def block_index(self) -> torch.Tensor:
            """Flat id `row * block_columns + column` of each slot."""

        @property
        def bias(self) -> torch.Tensor | None:
            """Dense, if there is one."""

    @property
    def num_blocks(self) -> int:
        """Number of positions a block can take."""
        return self.grid[0] * self.grid[1]

    @property
    def nnzb(self) -> int:
        """Number of active blocks."""
        return self.values.shape[0]

    @property
    def nnz(self) -> int:
        """Number of active entries."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """Share of inactive positions, as reached."""
        return 1.0 - self.nnzb / self.num_blocks

    @property
    def layout(self) -> BlockLayout:
        """The topology and the orders derived from it."""
        return layout_of(self.block_index, self.shape, self.block_shape)

    def problem(self, tokens: int = 1, *, backward: bool = False, dtype: torch.dtype | None = None) -> Problem:
        """What a backend is chosen by when `tokens` rows pass through the layer, in `dtype` (default: its own)."""
        return Problem.make(
            self.values.device,
            dtype or self.values.dtype,
            self.block_shape,
            self.shape,
            self.nnzb,
            tokens,
            backward,
        )

    def describe_backend(self) -> tuple[str, str]:
        """What serves the layer, and why; see `describe_choice`."""
        return describe_choice(self.problem())

    def multiply(self, input: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """
        `forward` with other `values` and `bias` than the layer's own.

        Raises:
            ValueError: if the sizes, dtypes or devices do not fit together.
        """
        if not input.dim() or input.shape[-1] != self.in_features:
            raise self._wrong_width(input)
        return block_sparse_linear(input, values, self.block_index, bias, self.out_features)

    def _wrong_width(self, input: torch.Tensor) -> ValueError:
        # The operator takes the last side of `input` for the width of the matrix: only the layer knows better.
        return ValueError(
            f"`input` must be of shape (..., {self.in_features}). Got {tuple(input.shape)}. Give the layer the "
            "features that it was made for."
        )

    def to_dense(self) -> torch.Tensor:
        """The dense weight of shape `(out_features, in_features)`, differentiable in `values`."""
        return to_dense(self.values, self.block_index, self.shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        rows, columns = self.block_shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={rows}x{columns}, nnzb={self.nnzb}, sparsity={self.sparsity:.4f}"
        )


class BlockSparseLinear(SparseLayer):
    """
    A linear layer that stores, trains and saves only its active blocks.

    Args:
        in_features, out_features (`int`): as in `torch.nn.Linear`.
        block_size (`int` or `tuple[int, int]`): side of a square block, or `(rows, columns)`. 1 is unstructured.
        sparsity (`float`): share of inactive positions, in [0, 1).
        bias (`bool`): whether to add a dense bias.
        nnzb (`int`, *optional*): exact number of active blocks; overrides `sparsity`.

    Attributes:
        values (`nn.Parameter` of shape `(nnzb, rows, columns)`): one slot per active block.
        block_index (buffer of shape `(nnzb,)`, `torch.int32`): flat id `row * block_columns + column` of each slot.
        bias (`nn.Parameter` of shape `(out_features,)` or `None`): as in `torch.nn.Linear`.

    Raises:
        ValueError: if the block does not divide the layer, or the sparsity is out of range.
    """

    values: nn.Parameter
    block_index: torch.Tensor
    bias: nn.Parameter | None

    # How many blocks the layer had before a run that changes their number, and is to have after it; see
    # `TopologyUpdater`. It outlives an interrupted run, and is not saved.
    given_nnzb: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int | tuple[int, int] = 16,
        sparsity: float = 0.9,
        bias: bool = True,
        *,
        nnzb: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_shape = as_block_shape(block_size)
        self.grid = block_grid((out_features, in_features), self.block_shape)
        if nnzb is None:
            nnzb = count_active_blocks(self.num_blocks, 1.0 - check_sparsity(sparsity))
        if not 1 <= nnzb <= self.num_blocks:
            raise ValueError(f"`nnzb` must lie in [1, {self.num_blocks}]. Got {nnzb}.")
        self.values = nn.Parameter(torch.empty(nnzb, *self.block_shape, device=device, dtype=dtype))
        self.register_buffer("block_index", torch.empty(nnzb, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if self.values.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self,
        std: float = 0.02,
        generator: torch.Generator | None = None,
        sparse_init: str = "normal",
        initial_topology: str = "random",
    ) -> None:
        """
        Draw a topology, uniformly random by default, and values from a normal distribution of standard deviation `std`
        cut at two of them, by default not rescaled by density (arXiv:2108.06277, section 3).

        Args:
            sparse_init (`str`): `"normal"`, or `"fan_in"`: scaled by the active inputs of each block row.
            initial_topology (`str`): `"random"`, or `"balanced"`: as many blocks in each block row, and column.
        """
        self.block_index.copy_(INITIAL_TOPOLOGIES[initial_topology](self.grid, self.nnzb, generator))
        nn.init.trunc_normal_(self.values, std=std, a=-2 * std, b=2 * std, generator=generator)
        if (scale := SPARSE_INITS[sparse_init]) is not None:
            self.values.mul_(scale(self.layout))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}values")
        if saved is not None and len(saved) != self.nnzb:
            raise ValueError(
                f"A sparse layer loads as many active blocks as it has. Got `{prefix}values` with {len(saved)} for "
                f"{self.nnzb}: another sparsity or block size, or half-way through a run whose density changes. Load "
                "the whole model by `from_pretrained`; to resume such a run, use `DynSparseTrainer`."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of shape `(..., in_features)` to `(..., out_features)`."""
        if not input.dim() or input.shape[-1] != self.in_features:
            raise self._wrong_width(input)
        # An attribute costs a Python call, which few tokens feel. Sharded or parametrised, it is elsewhere.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        if "values" in parameters and "bias" in parameters and "block_index" in buffers:
            values, block_index, bias = parameters["values"], buffers["block_index"], parameters["bias"]
        else:
            values, block_index, bias = self.values, self.block_index, self.bias
        return block_sparse_linear(input, values, block_index, bias, self.out_features)

    def to_sparse_bsr(self) -> torch.Tensor:
        """A copy of the weight as `torch.sparse_bsr_tensor` of shape `(out_features, in_features)`."""
        order = self.layout.by_row
        values = self.values.detach()[order.slots]
        return torch.sparse_bsr_tensor(
            order.offsets.long(), order.columns.long(), values, self.shape, check_invariants=True
        )

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense `nn.Linear` with the same outputs; inactive positions become trainable zeros."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.to_dense(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    @staticmethod
    def dense_shape(linear: Any) -> tuple[int, int]:
        """`(out_features, in_features)` of a dense layer that `from_dense` takes."""
        return linear.out_features, linear.in_features

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        linear: nn.Linear,
        block_size: int | tuple[int, int] = 16,
        sparsity: float = 0.9,
        *,
        nnzb: int | None = None,
    ) -> "BlockSparseLinear":
        """
        Keep the blocks of `linear` with the largest L1 norm, ties to the lower id. A layer on the meta device gives
        one there: only its shapes are known.
        """
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            block_size,
            sparsity,
            linear.bias is not None,
            nnzb=nnzb,
            device="meta",
            dtype=weight.dtype,
        )
        if weight.device.type == "meta":
            return layer
        layer.to_empty(device=weight.device)
        blocks = to_blocks(weight, layer.block_shape).flatten(0, 1)  # [num_blocks, rows, columns]
        norm = blocks.abs().sum((1, 2), dtype=torch.float64)
        kept = norm.sort(descending=True, stable=True).indices[: layer.nnzb].sort().values
        layer.block_index.copy_(kept)
        layer.values.copy_(blocks[kept])
        layer.values.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """
    The sparse layers of `model` by name, int8 ones too, in module order; a `torch.compile` wrapper leaves no trace in
    the names.
    """
    return layers_of(model, SparseLayer)


def trainable_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    """As `sparse_layers`, those in floating point: training and topology updates know no others."""
    return layers_of(model, BlockSparseLinear)


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """The modules of one kind by name, in module order."""
    return {name.replace("_orig_mod.", ""): layer for name, layer in model.named_modules() if isinstance(layer, kind)}
