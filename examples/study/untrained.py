"""Weights that are there but do not train: is being zero what inactive weights miss? (arXiv:2108.06277, figure 1)."""

import torch
from torch import nn
from torch.nn.functional import linear

from hf_dynsparse.nn.linear import BlockSparseLinear, sparse_layers


@torch.no_grad()
def add_untrained_rest_(model: nn.Module, std: float, seed: int = 0) -> None:
    """
    Give the inactive positions of every sparse layer random values that never change, as if they had been initialised
    and then frozen. A probe: they are dense, cost time, are not counted in FLOPs, and are not saved with the model.

    Args:
        std (`float`): standard deviation, cut at two of them.
        seed (`int`): of the draw, which a resumed run repeats.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse_layers(model).values():
        rest = nn.init.trunc_normal_(torch.empty(layer.shape), std=std, a=-2 * std, b=2 * std, generator=generator)
        rows, columns = layer.block_shape
        active = layer.layout.to_mask().cpu().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        layer.register_buffer("untrained_rest", rest.masked_fill(active, 0.0).to(layer.values), persistent=False)
        layer.register_forward_hook(_add_rest)


def _add_rest(layer: BlockSparseLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output + linear(inputs[0], layer.get_buffer("untrained_rest").to(inputs[0].dtype))
