"""Knowledge distillation: a student learns the logits, and the hidden states, of a teacher beside its labels."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..data.transfer import is_unlabelled
from ..models.losses import IGNORED, LABELS, at_least_one
from .hidden_states import check_layers, check_same_layers, hidden_states_loss
from .relations import Relations, check_relations


# What heads call their logits: classification, regression and masked language modelling; pre-training; spans.
TOKEN_OR_SEQUENCE = ("logits", "prediction_logits", "seq_relationship_logits")
SPAN = ("start_logits", "end_logits")
# Where the logits of tokens are compared.
DISTILLATION_POSITIONS = ("labelled", "all")
# What the products of a teacher are computed in.
TEACHER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    (arXiv:2111.05754, section 3.1). With `layers` comes `layers_weight` times the loss of hidden states on top (as in
    arXiv:1909.10351, section 3.1): see [`~training.hidden_states.hidden_state_loss`]. With `relations` comes
    `relations_weight` times the loss of relations in attention (as in arXiv:2012.15828, section 3): see
    [`~training.relations.relation_loss`].

    Token-level logits (masked language modelling) are compared where there is a label, or at all real tokens; span
    logits at real tokens, all others for each sequence.

    Args:
        teacher (`nn.Module`): a model with the student's head; put into evaluation mode and frozen.
        temperature (`float`): see [`distillation_loss`].
        weight (`float`): share of the distillation loss, in [0, 1].
        positions (`str`): where the logits of tokens are compared, `"labelled"` or, as in Prune Once for All, `"all"`.
        layers (`str`, *optional*): whose hidden states are compared: `"all"`, or a list such as `"2,4,6"`; 0 are the
            embeddings.
        layers_weight (`float`): factor of their loss.
        relations (`str`, *optional*): the layer whose queries, keys and values are compared by their relations:
            `"last"`, a number from 1 on, or those of student and teacher, such as `"6:11"`.
        relations_weight (`float`): factor of their loss.
        relation_heads (`int`, *optional*): into which they are split. Default: attention heads of the teacher.
        dtype (`str`): what products of the teacher are computed in, a key of `TEACHER_DTYPES`; its weights stay.

    Raises:
        ValueError: for a weight or temperature out of range, or unknown positions.
    """

    beside_labels = True  # whether the student's own loss counts too

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float = 2.0,
        weight: float = 0.5,
        positions: str = "labelled",
        layers: str | None = None,
        layers_weight: float = 1.0,
        relations: str | None = None,
        relations_weight: float = 1.0,
        relation_heads: int | None = None,
        dtype: str = "float32",
    ) -> None:
        check_distillation(temperature, weight, positions, "")
        check_layers(layers, layers_weight, "")
        check_relations(relations, relations_weight, relation_heads, "")
        if dtype not in TEACHER_DTYPES:
            raise ValueError(f"`dtype` of a teacher must be one of {', '.join(TEACHER_DTYPES)}. Got {dtype!r}.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.dtype = TEACHER_DTYPES[dtype]
        self.temperature, self.weight, self.positions = temperature, weight, positions
        self.layers, self.layers_weight = layers, layers_weight
        self.relations, self.relations_weight, self.relation_heads = relations, relations_weight, relation_heads
        self._relations: Relations | None = None
        self._accepted = set(inspect.signature(teacher.forward).parameters) - set(LABELS)
        self._sums = dict[str, tuple[torch.Tensor | float, int]]()  # by name: of the losses, and how many

    def check_student(self, student: nn.Module) -> None:
        """
        Refuse a student whose logits mean something else than the teacher's, and listen to what `relations` name.

        Raises:
            ValueError: if the vocabularies or the labels differ in number, or layers to be compared do not correspond.
        """
        for name in ("vocab_size", "num_labels"):
            ours, theirs = (getattr(model.config, name, None) for model in (student, self.teacher))
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"Teacher and student must have the same `{name}`. Got {theirs} and {ours}. "
                    "Take a teacher with the student's tokenizer, trained for the same task."
                )
        if self.layers is not None:
            check_same_layers(student, self.teacher, self.layers)
        if self.relations is not None:
            self._relations = Relations(student, self.teacher, self.relations, self.relation_heads)

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments by which a model gives what is compared beside its logits."""
        return {} if self.layers is None else {"output_hidden_states": True}

    @torch.no_grad()
    def answers(self, inputs: dict[str, torch.Tensor]) -> Any:
        """What the teacher gives for what the student was given."""
        given = {name: x for name, x in inputs.items() if name in self._accepted}
        if self.dtype == torch.float32:
            return self.teacher(**given, **self.asked)
        with torch.autocast(next(iter(given.values())).device.type, self.dtype):
            return self.teacher(**given, **self.asked)

    def completed(self, inputs: dict[str, Any], answers: Any) -> dict[str, Any]:
        """
        What the student is given: rows of sequences without a label get the class of the teacher's largest logit, or
        its number (see [`~data.transfer.with_transfer_set`]).
        """
        labels = inputs.get("labels")
        if labels is None or labels.dim() != 1 or "logits" not in answers:
            return inputs
        logits = answers["logits"]
        answered = logits.squeeze(-1) if labels.is_floating_point() else logits.argmax(-1)
        return {**inputs, "labels": torch.where(is_unlabelled(labels), answered.to(labels.dtype), labels)}

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
        self,
        inputs: dict[str, torch.Tensor],
        outputs: Any,
        answers: Any,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """
        The distillation loss of one batch: the mean over its rows, summed over the kinds of logits (mean of start and
        end for spans).

        Args:
            inputs (`dict[str, torch.Tensor]`): what the student was given.
            outputs (`ModelOutput`): what it gave back.
            answers (`ModelOutput`): of the teacher, see [`answers`].
            num_items_in_batch (`int`, *optional*): divides the sum over the rows instead of their number, as the
                student's own loss does.
        """
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
        return self._kept("distillation_loss", torch.stack(parts).sum())

    def on_top(
        self, inputs: dict[str, torch.Tensor], outputs: Any, answers: Any
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """What hidden states and relations of one batch add: factors, and means over its sequences."""
        mask = inputs.get("attention_mask")
        if self.layers is not None:
            loss = hidden_states_loss(outputs["hidden_states"], answers["hidden_states"], self.layers, mask)
            yield self.layers_weight, self._kept("distillation_layers_loss", loss)
        if self._relations is not None:
            yield self.relations_weight, self._kept("distillation_relations_loss", self._relations.loss(mask))

    def _kept(self, name: str, loss: torch.Tensor) -> torch.Tensor:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + loss.detach(), count + 1
        return loss

    def take_means(self) -> dict[str, float]:
        """The mean of each kind of loss since the last call."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means


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
