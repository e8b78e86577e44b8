"""The slow, obvious truth about int8 layers: integers throughout, a dense weight, one product after the other."""

import torch

from .layers import Int8BlockSparseLinear, Int8Linear


def integer_reference(layer: Int8Linear | Int8BlockSparseLinear, input: torch.Tensor) -> torch.Tensor:
    """
    What `layer` must put out: sums of products in int64 (int32 would do: see `EXACT_IN_FLOAT32`), the int32 bias added
    to them, and only then one multiplication by the scales.

    Args:
        input (`torch.Tensor` of shape `(..., in_features)`).

    Returns:
        `torch.Tensor` of shape `(..., out_features)`, of the dtype of `input`.
    """
    scale, zero_point = layer.input_scale, layer.input_zero_point.long()
    integers = ((input.float() * (1 / scale)).round().long() + zero_point).clamp(0, 255)
    products = (integers - zero_point).unsqueeze(-2) * dense_integers(layer)  # [..., out_features, in_features]
    sums = products.sum(-1)
    if layer.int32_bias is not None:
        sums = sums + layer.int32_bias.long()
    return (sums.double() * (scale.double() * layer.scale.double())).to(input.dtype)


def dense_integers(layer: Int8Linear | Int8BlockSparseLinear) -> torch.Tensor:
    """The weight as int64 of shape `(out_features, in_features)`, block by block."""
    if isinstance(layer, Int8Linear):
        return layer.int8_values.long()
    rows, columns = layer.block_shape
    dense = torch.zeros(layer.shape, dtype=torch.int64, device=layer.int8_values.device)
    for block, place in zip(layer.int8_values.long(), layer.block_index.tolist(), strict=True):
        row, column = divmod(place, layer.grid[1])
        dense[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = block
    return dense
