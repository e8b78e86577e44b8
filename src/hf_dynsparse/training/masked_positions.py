"""Stock heads for masked language modelling see masked positions only while they train, and their losses add up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from ..models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ..models.losses import IGNORED, token_loss


class MaskedPositions:
    """
    Lets the base model of a stock encoder give its head the masked positions of a batch only: logits of all positions
    are most of the cost at a large vocabulary. [`DynSparseBertForMaskedLM`] does so itself.

    Its loss is the mean over the masked positions of all micro-batches and ranks, so that splitting a batch changes
    nothing. Most stock heads take the mean of each micro-batch.

    Args:
        model (`PreTrainedModel`): one of those that [`predicts_masked`] knows. It gets a hook, which does nothing
            outside of [`only`].
    """

    def __init__(self, model: Any) -> None:
        self._labels: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        model.base_model.register_forward_hook(self._gather)

    @contextmanager
    def only(self, labels: torch.Tensor) -> Iterator[None]:
        """While the model is called, its logits are those where `labels` (batch, sequence) count, in reading order."""
        # Outside of the model, which may be compiled: their number depends on the data.
        self._labels, self._places = labels, (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)
        try:
            yield
        finally:
            self._labels = self._places = None

    def _gather(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self._labels is None or output[0].shape[:-1] != self._labels.shape:
            return None
        # [batch, sequence, hidden] to [masked, hidden]
        output.last_hidden_state = output[0].flatten(0, 1)[self._places]
        return output

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """See [`token_loss`]; `labels` are those of all positions."""
        logits = outputs["logits"]
        if logits.dim() == 2:  # [masked, vocabulary]
            labels = labels[labels != IGNORED]
        return token_loss(logits, labels, num_items_in_batch)


def predicts_masked(model: nn.Module) -> bool:
    """Whether a model is a stock encoder with a head for masked language modelling."""
    if not isinstance(model, PreTrainedModel) or isinstance(model, DynSparseBertPreTrainedModel):
        return False
    known: Any = AutoModelForMaskedLM._model_mapping.get(type(model.config), None)
    return known is type(model) and not model.config.is_encoder_decoder and bool(model.config.return_dict)
