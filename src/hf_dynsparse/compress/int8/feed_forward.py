"""
The feed-forward half of a BERT layer in one call: the numbers between its two int8 products stay in the cache of the
CPU, rounded for the second as soon as they are computed.
"""

import torch
from torch import nn

from ..._transformers import BertLayer, GELUActivation
from .layers import Int8Layer


class Int8BertLayer(BertLayer):
    """A `BertLayer` whose two products are one call wherever nobody looks between them."""

    def feed_forward_chunk(self, attention_output: torch.Tensor) -> torch.Tensor:
        """As in `BertLayer`."""
        product = self._multiply(attention_output)
        if product is None:
            return super().feed_forward_chunk(attention_output)
        return self.output.LayerNorm(product.add_(attention_output))

    def _multiply(self, input: torch.Tensor) -> torch.Tensor | None:
        intermediate, output = self.intermediate, self.output
        up, activation, down = intermediate.dense, intermediate.intermediate_act_fn, output.dense
        if not (isinstance(up, Int8Layer) and isinstance(down, Int8Layer) and type(activation) is GELUActivation):
            return None
        parts: tuple[nn.Module, ...] = (intermediate, up, activation, output, down, output.dropout)
        if any(part.training or part._forward_hooks or part._forward_pre_hooks for part in parts):
            return None
        return up.feed(down, input)


def fuse_feed_forward_(model: nn.Module, fused: bool) -> None:
    """Let the layers of a BERT in `model` be such layers, or again what they were."""
    before, after = (BertLayer, Int8BertLayer) if fused else (Int8BertLayer, BertLayer)
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after
