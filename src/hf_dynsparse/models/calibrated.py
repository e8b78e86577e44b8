"""Calibrated pruning of models of transformers: which weights of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from ..calibration import Batch, Calibration, prune_by_calibration_


def calibrate_(
    model: nn.Module,
    nnzb: Mapping[str, int],
    block_shapes: Mapping[str, tuple[int, int]] | tuple[int, int],
    calibration: Calibration | Iterable[Batch] | None,
) -> dict[str, int]:
    """
    Prune dense layers of `model` by what passes through them, if there is a `calibration`; see
    [`~hf_dynsparse.calibration.prune_by_calibration_`].

    Args:
        nnzb (`Mapping[str, int]`): the layers by name, and how many blocks each is to keep.
        block_shapes (`tuple[int, int]`, or a `Mapping` of them): `(rows, columns)` of a block, of all or by name.

    Returns:
        `dict[str, int]`: how many blocks each layer keeps; without a `calibration` as `nnzb` says.

    Raises:
        ValueError: for an encoder with a decoder, or a calibration that is refused.
    """
    if calibration is None or not nnzb:
        return dict(nnzb)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"`calibration` is for models of one stack. Got {type(model).__name__}, an encoder with a decoder. Leave "
            "it out: each layer then keeps its largest blocks."
        )
    how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    shapes = block_shapes if isinstance(block_shapes, Mapping) else dict.fromkeys(nnzb, block_shapes)
    return prune_by_calibration_(model, {name: _weight(model, name) for name in nnzb}, nnzb, shapes, how)


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    """A view of the weight of a dense layer, `(out_features, in_features)`."""
    layer: Any = model.get_submodule(name)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
