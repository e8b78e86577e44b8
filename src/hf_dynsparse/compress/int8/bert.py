"""
The parts of a BERT layer that int8 kernels compute in one call each, wherever nobody looks between the steps: the
numbers stay in the cache of the CPU, and what the next product reads is rounded for it as soon as it is computed.
"""

from typing import Any

import torch
from torch import nn

from ..._transformers import BertLayer, BertSelfOutput, GELUActivation
from .layers import Int8Layer


class Int8BertSelfOutput(BertSelfOutput):
    """A `BertSelfOutput`: product, residual and norm in one call."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """As in `BertSelfOutput`."""
        if isinstance(self.dense, Int8Layer) and _is_unseen(self.dense, self.LayerNorm, self.dropout):
            output = self.dense.finish(hidden_states, input_tensor, self.LayerNorm)
            if output is not None:
                return output
        return super().forward(hidden_states, input_tensor)


class Int8BertLayer(BertLayer):
    """A `BertLayer`: two products with GELU between them, residual and norm in one call."""

    def feed_forward_chunk(self, attention_output: torch.Tensor) -> torch.Tensor:
        """As in `BertLayer`."""
        intermediate, end = self.intermediate, self.output
        up: Any
        up, activation, down = intermediate.dense, intermediate.intermediate_act_fn, end.dense
        is_known = isinstance(up, Int8Layer) and isinstance(down, Int8Layer) and type(activation) is GELUActivation
        if is_known and _is_unseen(intermediate, up, activation, end, down, end.LayerNorm, end.dropout):
            output = up.finish(attention_output, attention_output, end.LayerNorm, down)
            if output is not None:
                return output
        return super().feed_forward_chunk(attention_output)


FUSED: dict[type[nn.Module], type[nn.Module]] = {BertLayer: Int8BertLayer, BertSelfOutput: Int8BertSelfOutput}


def fuse_(model: nn.Module, fused: bool) -> None:
    """Let the parts of a BERT in `model` be those of this file, or again what they were."""
    kinds = FUSED if fused else {after: before for before, after in FUSED.items()}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))


def _is_unseen(*steps: nn.Module) -> bool:
    """Whether no hook wants to see what these compute, and none is in training mode."""
    return not any(step.training or step._forward_hooks or step._forward_pre_hooks for step in steps)
