"""
Layers that hold int8 and compute with integers. They are made from trained ones and train no more.

The kernels of `ops/int8.py` compute where they can. Elsewhere those for floating-point numbers do, given integers that
they add without rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar, final

import torch
from torch import nn

from ...blocks.sizes import as_block_shape, block_grid
from ...nn.linear import BlockSparseLinear, LinearLayer, SparseLayer
from ...ops import Problem, to_dense
from ...ops.int8 import Ending, PackedLinear, pack
from .affine import (
    INPUT_LEVELS,
    INT32_LEVELS,
    SMALLEST_SCALE,
    input_parameters,
    product_step,
    quantize_input,
    quantize_weight,
    round_bias,
    weight_scale,
)
from .index_coding import decode_index, encode_index
from .qat import QatBlockSparseLinear, QatLinear


Floats = TypeVar("Floats", nn.Linear, BlockSparseLinear)

# Sums of integers up to these are exact in a matrix product of the dtype.
EXACT_IN_FLOAT32 = 2**24


class Int8Layer(LinearLayer):
    """
    What int8 linear layers share.

    Args:
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        values_shape (`tuple[int, ...]`): that of `int8_values`.

    Attributes:
        int8_values (buffer, `torch.int8`): the weight in [-127, 127].
        scale, input_scale (buffers of shape `()`, `torch.float32`).
        input_zero_point (buffer of shape `()`, `torch.uint8`).
        int32_bias (buffer of shape `(out_features,)`, `torch.int32`, or `None`): on the grid of `step`.
    """

    int8_values: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    int32_bias: torch.Tensor | None
    _known: "_Constants | None"

    def __init__(
        self, shape: tuple[int, int], values_shape: tuple[int, ...], bias: bool, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        shapes_and_dtypes = {
            "int8_values": (values_shape, torch.int8),
            "scale": ((), torch.float32),
            "input_scale": ((), torch.float32),
            "input_zero_point": ((), torch.uint8),
            "int32_bias": (shape[:1], torch.int32),
        }
        for name, (sizes, dtype) in shapes_and_dtypes.items():
            empty = torch.empty(sizes, dtype=dtype, device=device)
            self.register_buffer(name, empty if bias or name != "int32_bias" else None)
        self._known = None
        self._is_hf_initialized = True  # random numbers would be of no use
        self.eval()

    def _fill(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """Take over from `layer` all but the values; gives back the integers of `weight`."""
        input_scale, zero_point = input_parameters(layer.input_range)
        self.scale.copy_(weight_scale(weight))
        self.input_scale.copy_(input_scale)
        self.input_zero_point.copy_(zero_point)
        if not bool(self.step.isfinite()):
            raise ValueError(
                f"Weights and inputs of an int8 layer must be finite. Got weights up to {float(weight.abs().max()):g} "
                f"and inputs in {layer.input_range.tolist()} in a layer of {self.in_features} x {self.out_features}. "
                "Train again from an intact checkpoint."
            )
        if self.int32_bias is not None:
            integers = round_bias(layer.bias, self.step)
            if not bool(integers.abs().max() <= INT32_LEVELS):  # nor NaN
                raise ValueError(
                    f"A bias must fit into int32 on the grid of the products, {float(self.step):g}. Got a bias of "
                    f"{float(layer.bias.abs().max()):g} in a layer of {self.in_features} x {self.out_features}. Its "
                    "weights or inputs are next to zero: train longer."
                )
            self.int32_bias.copy_(integers)
        return quantize_weight(weight, self.scale)

    def _copy_to(self, layer: Floats, weight: torch.Tensor) -> Floats:
        """Give a layer in floating point, of that `weight`, the numbers that the integers represent."""
        weight.copy_(self.int8_values * self.scale)
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer.train(self.training)

    @property
    def step(self) -> torch.Tensor:
        """What 1 means in a product of integers, `input_scale * scale`: float64 of shape `()`."""
        return product_step(self.input_scale, self.scale)

    @property
    def nnz(self) -> int:
        """Entries of the weight that are stored."""
        return self.int8_values.numel()

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias in float32, if there is one."""
        return None if self.int32_bias is None else (self.int32_bias * self.step).float()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of shape `(..., in_features)` to `(..., out_features)`, of its dtype."""
        if self.training:
            raise ValueError(
                "An int8 model is for inference. Got one in training mode: call `model.eval()`, or train the model "
                "that it was made from, prepared by `prepare_qat_`."
            )
        known = self._constants
        if known.packed is not None and known.packed.serves(input):
            output = known.packed.multiply(input)
            if output is not None:
                return output
        device = input.device.type
        integers = quantize_input(input, self.input_scale, known.zero_point).to(known.dtype)
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # bfloat16 would round the integers
                sums = self._multiply(integers, known.dtype)
        else:
            sums = self._multiply(integers, known.dtype)
        if known.bias is None:
            return sums.mul_(known.step).to(input.dtype)
        return torch.add(known.bias, sums, alpha=known.step, out=sums).to(input.dtype)  # in one pass

    def finish(
        self, input: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm, then: "Int8Layer | None" = None
    ) -> torch.Tensor | None:
        """
        `norm(self(input) + residual)` or, of two layers, `norm(then(gelu(self(input))) + residual)`, in one call;
        `None` where no kernel can.
        """
        first, second = self._constants.packed, None if then is None else then._constants.packed
        if first is None or not first.serves(input) or (then is not None and second is None):
            return None
        if type(norm) is not nn.LayerNorm:
            return None
        if second is not None and second.library is not first.library:
            return None
        shape = *input.shape[:-1], (second or first).out_features
        weight, bias = norm.weight, norm.bias
        kinds = {(tensor.dtype, tensor.device.type) for tensor in (residual, weight, bias) if tensor is not None}
        if bias is None or kinds != {(torch.float32, "cpu")} or residual.shape != shape or weight.shape != shape[-1:]:
            return None
        return first.multiply(input, second, Ending(residual, weight, bias, norm.eps))

    @property
    def exact_dtype(self) -> torch.dtype:
        """
        The dtype in which no sum of integers can be inexact, and which holds their step: float32, unless rows are long
        and heavy, or weights and inputs next to zero.
        """
        return self._constants.dtype

    @property
    def _constants(self) -> "_Constants":
        known, values = self._known, self.int8_values
        if known is not None and (torch.compiler.is_compiling() or known.is_of(values)):
            return known
        if values.is_meta:  # there is nothing to compute but shapes
            return _Constants(torch.float32, 0, 1.0, self.bias, None, values, 0)
        with torch.inference_mode(False), torch.no_grad(), values.device:
            zero_point = int(self.input_zero_point)
            largest = int(self._row_sums().max()) * max(zero_point, INPUT_LEVELS - zero_point)
            step = float(self.step)
            exact = largest <= EXACT_IN_FLOAT32 and SMALLEST_SCALE <= step <= torch.finfo(torch.float32).max
            bias = None if self.int32_bias is None else self.int32_bias * self.step
            dtype = torch.float32 if exact else torch.float64
            bias = None if bias is None else bias.to(dtype)
            packed = self._pack(zero_point, step, bias) if exact else None
            known = self._known = _Constants(dtype, zero_point, step, bias, packed, values, _version(values))
        return known

    def _pack(self, zero_point: int, step: float, bias: torch.Tensor | None) -> PackedLinear | None:
        """The weight for kernels that compute with integers, if there are some."""
        scale = self.input_scale
        return pack(*self._blocks(), self.shape, zero_point=zero_point, input_scale=scale, step=step, bias=bias)

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The values as blocks, and block row and block column of each."""
        raise NotImplementedError

    def _multiply(self, integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def _row_sums(self) -> torch.Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # A cast of the model must not round the scales: only their device may change.
        before = self.scale, self.input_scale
        super()._apply(fn, recurse)
        self._known = None
        if self.scale.dtype != torch.float32:
            self.scale, self.input_scale = (scale.to(self.scale.device) for scale in before)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its own weight: addresses are not copied.
        return {**self.__dict__, "_known": None}


class _Constants(NamedTuple):
    """What every forward pass needs, computed once for `values` as they are at `version`."""

    dtype: torch.dtype
    zero_point: int
    step: float
    bias: torch.Tensor | None
    packed: PackedLinear | None
    values: torch.Tensor
    version: int

    def is_of(self, values: torch.Tensor) -> bool:
        """Whether `values` are what they were."""
        return self.values is values and self.version == _version(values)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@final
class Int8Linear(Int8Layer):
    """A dense [`Int8Layer`], `int8_values` of shape `(out_features, in_features)`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        shape = out_features, in_features
        super().__init__(shape, shape, bias, device)

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: QatLinear) -> "Int8Linear":
        """The layer that `layer` has been trained to be."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, layer.input_range.device)
        made.int8_values.copy_(made._fill(layer, layer.weight))
        return made

    @property
    def weight(self) -> torch.Tensor:
        """The int8 values, for code that asks for shape, device or dtype."""
        return self.int8_values

    @torch.no_grad()
    def to_float(self) -> nn.Linear:
        """An ordinary layer with these weights, whose inputs are not rounded."""
        sides, device = (self.in_features, self.out_features), self.int8_values.device
        linear = nn.Linear(*sides, self.bias is not None, device)
        return self._copy_to(linear, linear.weight)

    def _multiply(self, integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return nn.functional.linear(integers, self.int8_values.to(dtype))

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        corner = torch.zeros(1, dtype=torch.int64)
        return self.int8_values[None], corner, corner

    def _row_sums(self) -> torch.Tensor:
        return self.int8_values.short().abs().sum(1)


@final
class Int8BlockSparseLinear(Int8Layer, SparseLayer):
    """
    A block-sparse [`Int8Layer`], `int8_values` of shape `(nnzb, rows, columns)` in ascending order of block ids.

    Args:
        code_bits, code_bytes (`int`): of the code of its index, see `encode_index`.

    Attributes:
        block_code (buffer of shape `(code_bytes,)`, `torch.uint8`): what is saved of the index. `block_index` is
            decoded from it when first asked for, and kept.
        label (`str`): what errors about the code call the layer.
    """

    label = "the layer"
    block_code: torch.Tensor
    _decoded: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int | tuple[int, int],
        nnzb: int,
        code_bits: int,
        code_bytes: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        shape, block_shape = (out_features, in_features), as_block_shape(block_size)
        grid = block_grid(shape, block_shape)
        super().__init__(shape, (nnzb, *block_shape), bias, device)
        self.block_shape, self.grid, self.code_bits = block_shape, grid, code_bits
        self.register_buffer("block_code", torch.empty(code_bytes, dtype=torch.uint8, device=device))
        self._decoded = None

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: QatBlockSparseLinear) -> "Int8BlockSparseLinear":
        """The layer that `layer` has been trained to be."""
        order = layer.layout.by_row.slots
        code, bits = encode_index(layer.block_index[order])
        sides = layer.in_features, layer.out_features, layer.block_shape
        bias, device = layer.bias is not None, layer.values.device
        made = cls(*sides, layer.nnzb, bits, code.numel(), bias, device)
        made.block_code.copy_(code)
        made.int8_values.copy_(made._fill(layer, layer.values)[order])
        return made

    @property
    def values(self) -> torch.Tensor:
        """The int8 values."""
        return self.int8_values

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder of the dense shape, for code that asks for shape, device or dtype; it takes no memory."""
        return self.scale.new_full((), torch.nan).expand(self.shape)

    @property
    def block_index(self) -> torch.Tensor:
        """
        The ids of the blocks, `torch.int32` of shape `(nnzb,)`, in ascending order.

        Raises:
            ValueError: if the code is damaged.
        """
        if self.block_code.is_meta:
            return torch.empty(self.nnzb, dtype=torch.int32, device="meta")
        # No buffer: the loader overwrites those that no checkpoint holds.
        if self._decoded is None or self._decoded.device != self.block_code.device:
            with torch.inference_mode(False):  # of an index that inference made no order would be kept
                self._decoded = decode_index(self.block_code, self.code_bits, self.nnzb, self.num_blocks, self.label)
        return self._decoded

    def problem(self, tokens: int = 1, *, backward: bool = False, dtype: torch.dtype | None = None) -> Problem:
        """See [`SparseLayer.problem`]: of the integers in floating point, where no kernel multiplies them as such."""
        return super().problem(tokens, backward=backward, dtype=dtype or torch.float32)

    def describe_backend(self) -> tuple[str, str]:
        """See [`SparseLayer.describe_backend`]; `"int8"` where integers are multiplied as such."""
        packed = self._constants.packed
        return super().describe_backend() if packed is None else ("int8", packed.name)

    def to_dense(self) -> torch.Tensor:
        """The dense weight that the integers represent, `torch.float32` of shape `(out_features, in_features)`."""
        return to_dense(self.int8_values * self.scale, self.block_index, self.shape)

    def to_sparse_bsr(self) -> torch.Tensor:
        """As of [`BlockSparseLinear`], in float32."""
        return self.to_float().to_sparse_bsr()

    @torch.no_grad()
    def to_float(self) -> BlockSparseLinear:
        """An ordinary sparse layer with these weights, whose inputs are not rounded."""
        sides, device = (self.in_features, self.out_features), self.int8_values.device
        layer = BlockSparseLinear(*sides, self.block_shape, bias=self.bias is not None, nnzb=self.nnzb, device=device)
        layer.block_index.copy_(self.block_index)
        return self._copy_to(layer, layer.values)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, code_bits={self.code_bits}"

    def _multiply(self, integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.multiply(integers, self.int8_values.to(dtype), None)

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.int8_values, self.layout.rows, self.layout.columns

    def _row_sums(self) -> torch.Tensor:
        sums = self.int8_values.short().abs().sum(2)  # [nnzb, rows]
        return sums.new_zeros(self.grid[0], self.block_shape[0]).index_add_(0, self.layout.rows, sums)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._decoded = None
