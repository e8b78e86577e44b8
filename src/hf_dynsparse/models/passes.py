"""Fewer passes over memory in a whole model: dropout, residual and normalisation as one, and the loss of a head."""

from typing import Any

import torch
from torch import nn

from .._transformers import BertOutput, BertSelfOutput
from ..ops.passes import cross_entropy, residual_norm
from .dropout import SeededDropout


class FusedSelfOutput(BertSelfOutput):
    """What follows attention: product, and in one pass dropout, sum and normalisation."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Both of shape `(batch, tokens, hidden_size)`; the second went around the layer."""
        return _forward(self, super().forward, hidden_states, input_tensor)


class FusedOutput(BertOutput):
    """What ends a layer, in the same way."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """`hidden_states` of shape `(batch, tokens, intermediate_size)`, `input_tensor` of `hidden_size`."""
        return _forward(self, super().forward, hidden_states, input_tensor)


FUSED: dict[type[nn.Module], type[nn.Module]] = {BertSelfOutput: FusedSelfOutput, BertOutput: FusedOutput}
STOCK = {fused: stock for stock, fused in FUSED.items()}


def fuse_passes_(model: nn.Module, fused: bool = True) -> int:
    """
    Compute on a CPU, while training, what lies between the products of `model` in fewer passes over memory, in place:
    in a BERT dropout, residual and normalisation as one, and the loss of our own heads for masked language modelling
    without stored probabilities. The same to rounding, with the same draws of seeded dropout. Evaluations and what is
    saved stay as they are, bit for bit.

    PyTorch's dropout, with a probability above 0, and submodules with hooks stay as they are.

    Args:
        fused (`bool`): `False` undoes it.

    Returns:
        `int`: modules changed.
    """
    changed, classes = 0, FUSED if fused else STOCK
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]  # keeps its place, hooks and mode
            changed += 1
        elif hasattr(module, "row_losses") and (module.row_losses is not None) != fused:
            vars(module)["row_losses"] = cross_entropy if fused else None
            changed += 1
    return changed


def _forward(module: Any, stock: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    dropout, norm = module.dropout, module.LayerNorm
    p = dropout.p if dropout.training else 0.0
    if not module.training or p and type(dropout) is not SeededDropout or _has_hooks(dropout) or _has_hooks(norm):
        output: torch.Tensor = stock(hidden_states, input_tensor)
        return output
    return residual_norm(module.dense(hidden_states), input_tensor, norm.weight, norm.bias, norm.eps, p)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
