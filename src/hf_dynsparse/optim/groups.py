"""Parameter groups of a sparse model, and the learning rate that its density asks for."""

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from ..nn.linear import trainable_layers


def sparse_learning_rate(dense_learning_rate: float, sparsity: float) -> float:
    """
    Scale the learning rate tuned for a dense model: `lr * exp(1.969 s² + 0.2905 s)` (arXiv:2108.06277, appendix on the
    learning rate). The factor is 6.40 at s = 0.9.
    """
    return dense_learning_rate * math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    dense_learning_rate: float | None = None,
    decayed: Collection[str] | None = None,
    matrices: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """
    The trained parameters of `model` for an optimiser: `values` of sparse layers, marked `"per_block": True`, and the
    dense rest, each with and without weight decay; no group is empty.

    Args:
        dense_learning_rate (`float`, *optional*): learning rate of the dense rest: embeddings, norms, biases, head. By
            default that of the optimiser.
        decayed (`Collection[str]`, *optional*): names of the parameters with weight decay. By default all of two or
            more dimensions: no biases, no norms.
        matrices (`Collection[nn.Parameter]`, *optional*): dense weights that are not of the rest: those of the dense
            twin in the place of sparse layers.
    """
    if decayed is None:
        decayed = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    values = {layer.values for layer in trainable_layers(model).values()}
    kinds = {**dict.fromkeys(matrices, "matrices"), **dict.fromkeys(values, "values")}
    groups = []
    for kind in ("values", "matrices", "rest"):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and (kinds.get(parameter, "rest"), name in decayed) == (kind, decays)
            ]
            group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
            group["per_block"] = kind == "values"
            if dense_learning_rate is not None and kind == "rest":
                group["lr"] = dense_learning_rate
            groups += [group] if parameters else []
    return groups
