"""A sentence encoder learns the embeddings of another one, without labels."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from ..data.glue import glue_metrics
from ..models.pooling import pool
from .distillation import Distillation
from .trainer import DynSparseTrainer


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    How far embeddings are from the teacher's: `1 - cos(s, t) + |s - t|² / |t|²`. The first part is what similarities
    see, and half the square error of embeddings of length 1; the second minds the lengths too.

    Args:
        student, teacher (`torch.Tensor` of shape `(rows, width)`).

    Returns:
        `torch.Tensor` of shape `(rows,)`.
    """
    error = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1) + error


class SentenceDistillation(Distillation):
    """
    A teacher whose sentence embeddings are learned, with `layers` its hidden states, and with `relations` those in its
    attention. There is no other loss.

    Args:
        teacher (`nn.Module`): an encoder without a head.
        pooling (`str`): a key of `POOLINGS`.
        layers, layers_weight, relations (and what else begins so), dtype: see [`Distillation`].
    """

    beside_labels = False

    def __init__(
        self,
        teacher: nn.Module,
        pooling: str = "mean",
        layers: str | None = None,
        layers_weight: float = 1.0,
        **how: Any,
    ) -> None:
        super().__init__(teacher, weight=1.0, layers=layers, layers_weight=layers_weight, **how)
        self.pooling = pooling

    def check_student(self, student: Any) -> None:
        """
        Raises:
            ValueError: if vocabularies or widths differ, or layers to be compared do not correspond.
        """
        super().check_student(student)
        teacher: Any = self.teacher
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        if ours != theirs:
            raise ValueError(
                f"Embeddings of teacher and student must have one width. Got {theirs} and {ours}. Take another "
                "teacher."
            )

    def loss(self, inputs: dict[str, torch.Tensor], outputs: Any, answers: Any, *items: Any) -> torch.Tensor:
        """The mean of [`embedding_loss`] over the sentences of a batch."""
        both = (self.embeddings(each, inputs) for each in (outputs, answers))
        return self._kept("distillation_loss", embedding_loss(*both).mean())

    def embeddings(self, outputs: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of shape `(batch, width)`, from what a model gave for its inputs."""
        return pool(outputs["last_hidden_state"], inputs["attention_mask"], self.pooling)


class SentenceTrainer(DynSparseTrainer):
    """
    [`DynSparseTrainer`] of a sentence encoder. An evaluation compares embeddings of `eval_dataset` with the teacher's.

    Args:
        teacher (`SentenceDistillation`): what is learned.
        pairs (`tuple[Dataset, Dataset, list[float]]`, *optional*): rows of both sentences of pairs, and how similar
            they are. Evaluations then give Spearman's correlation of that with the cosines, too.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        teacher: SentenceDistillation,
        pairs: tuple[Dataset, Dataset, list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.sentences, self.pairs = teacher, pairs

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """
        Log and return `eval_loss`, the mean of [`embedding_loss`]; `eval_teacher_cosine`, the mean cosine of an
        embedding and the teacher's; and `eval_spearman_cosine`, if there are pairs. Every rank computes them.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        ours, theirs = self.embed(self.model, rows), self.embed(self.sentences.teacher, rows)
        scores = {
            "loss": float(embedding_loss(ours, theirs).mean()),
            "teacher_cosine": float(F.cosine_similarity(ours, theirs).mean()),
        }
        if self.pairs is not None:
            first, second = (self.embed(self.model, sentences) for sentences in self.pairs[:2])
            cosines = F.cosine_similarity(first, second).tolist()
            scores["spearman_cosine"] = glue_metrics("stsb", cosines, self.pairs[2])["spearmanr"]
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def embed(self, model: nn.Module, rows: Dataset) -> torch.Tensor:
        """The embeddings of rows of token ids by one of the models, in evaluation mode: `(rows, width)` on the CPU."""
        encoder: Any = self.accelerator.unwrap_model(model)
        was_training, size, collate = encoder.training, self.args.per_device_eval_batch_size, self.data_collator
        listed = list(rows)
        order = sorted(range(len(listed)), key=lambda row: -len(listed[row]["input_ids"]))
        encoder.eval()
        try:
            parts = []
            for start in range(0, len(order), size):
                batch = collate([listed[row] for row in order[start : start + size]])
                batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                parts.append(self.sentences.embeddings(encoder(**batch), batch).cpu())
        finally:
            encoder.train(was_training)
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)
