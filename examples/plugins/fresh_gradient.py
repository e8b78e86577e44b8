"""
A regrow rule of your own: RigL's largest dense gradient, but positions that were never active come first.

    python examples/run_mlm_dynsparse.py --plugin examples/plugins/fresh_gradient.py --regrow_rule fresh_gradient ...
"""

import torch

from hf_dynsparse import register_regrow_rule


def fresh_gradient(blocks) -> torch.Tensor:
    """Of all positions of a layer, of shape `(count,)`: the highest are regrown."""
    size = blocks.gradient.float().abs().sum((1, 2))  # [count, rows, columns] to [count]
    return size - blocks.ever_active * (size.max() + 1.0)


register_regrow_rule("fresh_gradient", fresh_gradient, needs=["gradient", "ever_active"])
