"""
Quantisation-aware training: layers that compute with rounded weights and inputs, and learn as if they did not
(arXiv:2111.05754, section 3; arXiv:1910.06188, section 3.1).
"""

import logging
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import distributed, nn
from torch.distributed import ReduceOp
from transformers import PreTrainedModel

from ...models.stock.layers import SparseLinear
from ...nn.linear import BlockSparseLinear
from .affine import (
    INT32_LEVELS,
    fake_quantize_input,
    fake_quantize_weight,
    input_parameters,
    product_step,
    round_bias,
    weight_scale,
)


logger = logging.getLogger(__name__)

# Share of a new batch in the range of the inputs.
AVERAGING_CONSTANT = 0.01


class QuantizationAware(nn.Module):
    """
    What quantisation-aware linear layers share. Their parameters stay in floating point, under their names.

    Attributes:
        input_range (buffer of shape `(2,)`, `torch.float32`): moving averages of the smallest and the largest input of
            a batch, over all ranks; infinite before the first batch of the training.
    """

    in_features: int
    out_features: int
    input_range: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of shape `(..., in_features)` to `(..., out_features)`."""
        input_scale, zero_point = input_parameters(self._range_for(input))
        scale = weight_scale(self._weight)
        bias: Any = self.bias
        if bias is not None and not self.training:
            step = product_step(input_scale, scale)
            integers = round_bias(bias, step).clamp(-INT32_LEVELS, INT32_LEVELS)
            bias = (integers * step).to(bias.dtype)
        rounded = fake_quantize_input(input, input_scale, zero_point)
        return self._multiply(rounded, fake_quantize_weight(self._weight, scale), bias)

    @property
    def is_ready(self) -> bool:
        """Whether a batch has been seen in training."""
        return bool(self.input_range.isfinite().all())

    @torch.no_grad()
    def _range_for(self, input: torch.Tensor) -> torch.Tensor:
        """The range to round `input` by; in training after it has been taken into account."""
        here = torch.stack(torch.aminmax(input.detach())).float()
        fresh = self.input_range[0] > self.input_range[1]
        if self.training:
            if distributed.is_available() and distributed.is_initialized():
                here = _widest(here)
            self.input_range.copy_(torch.where(fresh, here, self.input_range.lerp(here, AVERAGING_CONSTANT)))
        return torch.where(fresh, here, self.input_range)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # A cast of the model must not round the range: only its device may change.
        before = self.input_range
        super()._apply(fn, recurse)
        if self.input_range.dtype != torch.float32:
            self.input_range = before.to(self.input_range.device)
        return self

    @property
    def _weight(self) -> torch.Tensor:
        raise NotImplementedError

    def _multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class QatLinear(QuantizationAware, nn.Linear):
    """A quantisation-aware `nn.Linear`."""

    @property
    def _weight(self) -> torch.Tensor:
        return self.weight

    def _multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(input, weight, bias)


class QatBlockSparseLinear(QuantizationAware, BlockSparseLinear):
    """A quantisation-aware [`BlockSparseLinear`]."""

    @property
    def _weight(self) -> torch.Tensor:
        return self.values

    def _multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.multiply(input, weight, bias)


class QatSparseLinear(QatBlockSparseLinear, SparseLinear):
    """A quantisation-aware [`SparseLinear`], of a stock transformers model."""


class QatEmbedding(nn.Embedding):
    """An embedding with rounded vectors."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids of any shape to `(..., embedding_dim)`."""
        return fake_quantize_weight(super().forward(input), weight_scale(self.weight))


QAT_TYPES: dict[type[nn.Module], type[QuantizationAware]] = {
    nn.Linear: QatLinear,
    BlockSparseLinear: QatBlockSparseLinear,
    SparseLinear: QatSparseLinear,
}


def prepare_qat_(model: nn.Module, embeddings: bool = False) -> nn.Module:
    """
    Make every linear layer of `model`, sparse or dense, quantisation-aware, in place: parameters, their names and the
    topology stay what they are. Train it then, from a fine-tuned model, at a small learning rate (1e-5), and call
    [`to_int8_`].

    Weights are rounded to int8 and inputs to uint8 from the first step; in evaluation biases to int32 too, and the
    outputs are those of the int8 model, but for rounding of floating-point sums. Layers whose weight is that of an
    embedding, as in masked language models, stay as they are. Before the first batch of the training, inputs are
    rounded by their own range.

    Args:
        model (`nn.Module`): changed in place and returned. Its checkpoints load as models in floating point.
        embeddings (`bool`): round the word embeddings too.

    Raises:
        ValueError: if there is no layer to prepare, or the embeddings are tied to an output layer.

    Example:
        ```python
        >>> model = prepare_qat_(AutoModelForSequenceClassification.from_pretrained("runs/sst2-locked"))
        >>> DynSparseTrainer(model, args, teacher=teacher, train_dataset=sst2).train()
        >>> to_int8_(model).save_pretrained("runs/sst2-int8")
        ```
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = {name: module for name, module in model.named_modules() if type(module) in QAT_TYPES}
    left = [name for name, linear in linears.items() if type(linear) is nn.Linear and id(linear.weight) in tied]
    chosen = [linear for name, linear in linears.items() if name not in left]
    if not chosen:
        raise ValueError(
            f"`prepare_qat_` must find at least one linear layer in floating point. Got none in "
            f"{type(model).__name__}: it is prepared, or quantised, already, or has no such layer."
        )
    if embeddings:
        if left or not can_round_embeddings(model):
            words = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
            raise ValueError(
                "Word embeddings can be int8 only if no output layer shares them. Got "
                f"{', '.join(left) or type(words).__name__} in {type(model).__name__}. Leave `embeddings` out."
            )
        round_embeddings_(model, True)
    if left:
        logger.info("%s stays in floating point: its weight is that of an embedding.", ", ".join(left))
    for linear in chosen:
        # The very module, as PyTorch's lazy modules do it: whoever holds it, or hooked onto it, notices nothing.
        linear.__class__ = QAT_TYPES[type(linear)]
        unseen = torch.tensor([math.inf, -math.inf], dtype=torch.float32, device=next(linear.parameters()).device)
        linear.register_buffer("input_range", unseen)
    return model


def can_round_embeddings(model: nn.Module) -> bool:
    """Whether `model` has word embeddings of a plain kind that no output layer shares."""
    words: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(words) is not nn.Embedding:
        return False
    return not any(isinstance(module, nn.Linear) and module.weight is words.weight for module in model.modules())


def round_embeddings_(model: Any, rounded: bool) -> None:
    """Let a model that trains with rounded layers round its word embeddings too, or not."""
    words = model.get_input_embeddings()
    if type(words) in (nn.Embedding, QatEmbedding):
        words.__class__ = QatEmbedding if rounded else nn.Embedding


def _widest(here: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest number of all ranks."""
    ends = here * here.new_tensor([-1.0, 1.0])
    distributed.all_reduce(ends, ReduceOp.MAX)
    return ends * here.new_tensor([-1.0, 1.0])
