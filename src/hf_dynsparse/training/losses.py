"""The losses of a run: of the task, of a teacher beside it, and none that is not finite."""

import math
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from ..checkpoints.saved_run import last_checkpoint
from ..models.losses import IGNORED, class_labels, zero_if_unlabelled
from ..nn.shards import whole
from .distillation import Distillation
from .masked_positions import MaskedPositions


class LossTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose losses count labels only, which learns from a teacher beside them, and stops before
    a loss or gradient that is not finite does harm.
    """

    accelerator: Any
    current_gradient_accumulation_steps: int
    distillation: Distillation | None = None
    masked_positions: MaskedPositions | None = None
    _losses_only = False  # of this evaluation nothing else is asked for
    _losses: list[torch.Tensor]  # of the micro-batches of this step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers."""
        loss = super().training_step(model, inputs, *rest, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The gradients of all ranks and micro-batches have come together, and the optimiser has not used them yet.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss, norm = sum(self._losses), whole(grad_norm)
        self._losses.clear()
        # In fp16 the scaler looks for infinite gradients, and leaves such a step out.
        watched = [loss] if self.accelerator.scaler is not None else [loss, norm]
        if not are_finite(watched, self.accelerator):
            last = last_checkpoint(self._get_output_dir(None))
            raise FloatingPointError(
                f"Loss and gradients must be finite. Got loss {float(loss):g} and gradient norm {float(norm):g} "
                f"in step {self.state.global_step + 1}. Weights and topology are as after the step before; the last "
                f"checkpoint is {last or 'not saved yet'}. Lower `learning_rate` or `max_grad_norm`, or look for a "
                "fault in the data."
            )
        return grad_norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        As in transformers, but 0 for a batch without a label that counts; while training with a teacher, its part is
        mixed in.
        """
        if not model.training:
            labels, places = class_labels(inputs), self.masked_positions if self._losses_only else None
            with nullcontext() if labels is None or places is None else places.only(labels):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        answers = None
        if self.distillation is not None:
            answers = self.distillation.answers(inputs)
            inputs = self.distillation.completed(inputs, answers) | self.distillation.asked
        given = dict(inputs)  # label smoothing takes the labels out of `inputs`
        student = self.accelerator.unwrap_model(model)
        labels = class_labels(given)
        with ExitStack() as stack:
            if self.distillation is not None:
                stack.enter_context(self.distillation.asking(student))
            every_token = self.distillation is not None and self.distillation.positions == "all"
            if self.masked_positions is not None and labels is not None and not every_token:
                stack.enter_context(self.masked_positions.only(labels))
            if self.distillation is not None and not self.distillation.beside_labels:
                outputs = model(**inputs)
                loss = outputs[0].new_zeros(())
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Of stock heads and label smoothing the mean over no label is NaN.
        if labels is not None:
            loss = zero_if_unlabelled(loss, labels)
        if self.distillation is not None:
            loss = self._taught(self.distillation, loss, given, outputs, answers, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _taught(
        self,
        distillation: Distillation,
        loss: torch.Tensor,
        inputs: dict[str, Any],
        outputs: Any,
        answers: Any,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The loss of the task, with that of the teacher mixed in."""
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        distilled = distillation.loss(inputs, outputs, answers, items)
        if items is not None and self.args.average_tokens_across_devices:
            distilled = distilled * self.accelerator.num_processes  # the items of all ranks, as in the task's loss
        loss = (1.0 - distillation.weight) * loss + distillation.weight * distilled
        # Means over the sequences of this micro-batch. Where losses are divided by items, nobody divides them later.
        whole = items is not None or self.compute_loss_func is not None
        parts = self.current_gradient_accumulation_steps if whole else 1
        for weight, part in distillation.on_top(inputs, outputs, answers):
            loss = loss + weight / parts * part
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a batch without a label that counts has loss NaN, which the mean of a set leaves out."""
        labels = class_labels(inputs)
        loss, logits, answers = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and labels is not None:
            loss = loss.where((labels != IGNORED).any().to(loss.device), math.nan)
        return loss, logits, answers


def are_finite(numbers: Iterable[torch.Tensor | float], accelerator: Accelerator) -> bool:
    """Whether all `numbers` are finite, on all ranks. Every rank must call it."""
    bad = [~torch.as_tensor(number, device=accelerator.device).isfinite() for number in numbers]
    return not bool(accelerator.reduce(torch.stack(bad).float().sum(), "sum"))
