"""Knowledge distillation: a student learns the logits of a teacher beside its labels."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..models.losses import IGNORED, LABELS, at_least_one


# What heads call their logits: classification, regression and masked language modelling; pre-training; spans.
TOKEN_OR_SEQUENCE = ("logits", "prediction_logits", "seq_relationship_logits")
SPAN = ("start_logits", "end_logits")
# Where the logits of tokens are compared.
DISTILLATION_POSITIONS = ("labelled", "all")


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """
    How far each row of the student's logits is from the teacher's: `temperature² * KL(teacher || student)` of the
    softened distributions (arXiv:1503.02531, section 2; the factor keeps gradients of one size), or the squared
    difference for a single logit (regression).

    Args:
        student, teacher (`torch.Tensor` of shape `(rows, classes)`): logits.
        temperature (`float`): divides the logits before the softmax.

    Returns:
        `torch.Tensor` of shape `(rows,)`.
    """
    if student.shape[-1] == 1:
        return (student - teacher).float().square().squeeze(-1)
    student_log, teacher_log = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1) * temperature**2


class Distillation:
    """
    A teacher, and what its logits add to the loss: `(1 - weight) * task loss + weight * distillation loss`
    (arXiv:2111.05754, section 3.1).

    Token-level logits (masked language modelling) are compared where there is a label, or at all real tokens; span
    logits at real tokens, all others for each sequence.

    Args:
        teacher (`nn.Module`): a model with the student's head; put into evaluation mode and frozen.
        temperature (`float`): see [`distillation_loss`].
        weight (`float`): share of the distillation loss, in [0, 1].
        positions (`str`): where the logits of tokens are compared, `"labelled"` or, as in Prune Once for All, `"all"`.

    Raises:
        ValueError: for a weight or temperature out of range, or unknown positions.
    """

    def __init__(
        self, teacher: nn.Module, temperature: float = 2.0, weight: float = 0.5, positions: str = "labelled"
    ) -> None:
        check_distillation(temperature, weight, positions, "")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.weight, self.positions = temperature, weight, positions
        self._accepted = set(inspect.signature(teacher.forward).parameters) - set(LABELS)
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def check_student(self, student: nn.Module) -> None:
        """
        Refuse a student whose logits mean something else than the teacher's.

        Raises:
            ValueError: if the vocabularies or the labels differ in number.
        """
        for name in ("vocab_size", "num_labels"):
            ours, theirs = (getattr(model.config, name, None) for model in (student, self.teacher))
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"Teacher and student must have the same `{name}`. Got {theirs} and {ours}. "
                    "Take a teacher with the student's tokenizer, trained for the same task."
                )

    @contextmanager
    def asking(self, student: Any) -> Iterator[None]:
        """While it predicts, a student gives logits wherever they are compared, not at masked positions only."""
        if self.positions == "labelled" or not getattr(student.config, "sparse_prediction", False):
            yield
            return
        student.config.sparse_prediction = False
        try:
            yield
        finally:
            student.config.sparse_prediction = True

    def loss(
        self, inputs: dict[str, torch.Tensor], outputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        The distillation loss of one batch: the mean over its rows, summed over the kinds of logits (mean of start and
        end for spans).

        Args:
            inputs (`dict[str, torch.Tensor]`): what the student was given.
            outputs (`ModelOutput`): what it gave back.
            num_items_in_batch (`int`, *optional*): divides the sum over the rows instead of their number, as the
                student's own loss does.
        """
        with torch.no_grad():
            answers = self.teacher(**{name: x for name, x in inputs.items() if name in self._accepted})
        parts = []
        for name in TOKEN_OR_SEQUENCE:
            if name in outputs:
                of_tokens = self.positions == "all" and answers[name].dim() == 3
                compared = real_rows if of_tokens else labelled_rows
                rows = distillation_loss(*compared(outputs[name], answers[name], inputs), self.temperature)
                if num_items_in_batch is None:
                    parts.append(rows.sum() / at_least_one(len(rows)))
                elif of_tokens:  # items are labels, of which most tokens have none
                    share = (inputs["labels"] != IGNORED).sum() / at_least_one(num_items_in_batch)
                    parts.append(rows.mean() * share)
                else:
                    parts.append(rows.sum() / at_least_one(num_items_in_batch))
        padding = inputs["attention_mask"] == 0 if "attention_mask" in inputs else None
        for name in SPAN:
            if name in outputs:
                student, teacher = (only_tokens(logits[name], padding) for logits in (outputs, answers))
                parts.append(distillation_loss(student, teacher, self.temperature).mean() / len(SPAN))
        loss = torch.stack(parts).sum()
        self._sum, self._count = self._sum + loss.detach(), self._count + 1
        return loss

    def take_mean(self) -> float | None:
        """Mean of the losses since the last call; `None` if there were none."""
        mean = float(self._sum) / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean


def check_distillation(temperature: float, weight: float, positions: str, prefix: str) -> None:
    """
    Args:
        prefix (`str`): what the names of these arguments begin with, where they were given.

    Raises:
        ValueError: for a weight outside [0, 1], a temperature that is not positive, or unknown positions.
    """
    if positions not in DISTILLATION_POSITIONS:
        raise ValueError(f"`{prefix}positions` must be one of {', '.join(DISTILLATION_POSITIONS)}. Got {positions!r}.")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"`{prefix}weight` must lie in [0, 1]. Got {weight}. Choose 0.5 for equal parts.")
    if not temperature > 0.0:
        raise ValueError(f"`{prefix}temperature` must be positive. Got {temperature}. Choose 2.")


def labelled_rows(
    student: torch.Tensor, teacher: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits `(rows, classes)` of both at labelled positions. A student that predicts masked positions only gives those
    rows already.
    """
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == teacher.dim() - 1 > 1:
        labelled = labels != IGNORED
        student = student if student.dim() < teacher.dim() else student[labelled]
        teacher = teacher[labelled]
    return student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])


def real_rows(
    student: torch.Tensor, teacher: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(rows, classes)` of both at all tokens that are not padding, from `(batch, sequence, classes)`."""
    if "attention_mask" not in inputs:
        return student.flatten(0, 1), teacher.flatten(0, 1)
    real = inputs["attention_mask"] != 0
    return student[real], teacher[real]


def only_tokens(logits: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Logits `(batch, sequence)` that give padding no probability."""
    return logits if padding is None else logits.masked_fill(padding, torch.finfo(logits.dtype).min)
