"""`DynSparseTrainer`: the transformers `Trainer` with topology updates, their metrics, and checkpoints saved whole."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..models.dropout import seed_dropout_
from ..models.flops import flops_per_sequence
from ..models.readme import CARD, SHORT, is_ours
from ..nn.linear import trainable_layers
from ..reports.facts import trainer_facts
from ..reports.model_card import write_model_card
from .arguments import DynSparseTrainingArguments
from .callbacks.console import show_lines_
from .callbacks.epoch import EpochAware, EpochCallback
from .callbacks.throughput import find_callback
from .context_gain import ContextGainTrainer
from .curriculum import Curriculum
from .dataloaders import DataTrainer
from .distillation import Distillation
from .fsdp import ShardedTrainer
from .losses import LossTrainer
from .masked_positions import MaskedPositions, predicts_masked
from .memory import keep_freed_memory
from .optimizer import OptimizerTrainer
from .resuming import ResumingTrainer
from .summary import describe_training


logger = logging.getLogger(__name__)


class DynSparseTrainer(
    ResumingTrainer, ContextGainTrainer, LossTrainer, OptimizerTrainer, DataTrainer, ShardedTrainer
):
    """
    [`~transformers.Trainer`] for models with `BlockSparseLinear` layers; the arguments are the same.

    Adds to every log entry `dynsparse/flops`, `dynsparse/tokens` and `dynsparse/tokens_per_second`, and the metrics of
    [`TopologyCallback`] under `dynsparse/`. A model without sparse layers trains as usual: the dense baseline.

    Args:
        teacher (`nn.Module` or `Distillation`, *optional*): a model with the same head to learn from beside the
            labels, weighted by `args.distillation_weight`; training only, evaluation measures the task. A
            [`Distillation`] says itself what is learned.
        piece_counts (tensor or array of shape `(vocab_size,)`, *optional*): how often each piece of the vocabulary
            occurs in the training text: see [`~hf_dynsparse.data.count_pieces`]. Evaluations of a masked language
            model then give `eval_context_gain`: nats by which it beats these frequencies where `[MASK]` is shown.

    Attributes:
        topology (`TopologyCallback` or `None`): the callback that updates the topology; `None` for a dense model.
        early_bird (`EarlyBirdCallback` or `None`): the callback that searches for a ticket, if one was given.
        kernels (`KernelCallback`): chooses the backends of the run.
        throughput (`ThroughputCallback`): tokens and seconds of the run.

    Raises:
        ValueError: for two callbacks of a kind that must be alone, and arguments that do not fit the model.
    """

    args: DynSparseTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: DynSparseTrainingArguments | None = None,
        *,
        teacher: nn.Module | Distillation | None = None,
        piece_counts: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = DynSparseTrainingArguments(output_dir="trainer_output") if args is None else args
        if args.teacher is not None and teacher is None:
            raise ValueError(f"`args.teacher` is {args.teacher!r}: load that model and give it as `teacher` too.")
        for name in ("distillation_layers", "distillation_relations"):
            if getattr(args, name) is not None and teacher is None:
                raise ValueError(
                    f"`{name}` are learned from a `teacher`. Got {getattr(args, name)!r} and none. Give one, or leave "
                    "them out."
                )
        if teacher is not None:
            how = args.distillation_temperature, args.distillation_weight, args.distillation_positions
            layers = args.distillation_layers, args.distillation_layers_weight
            taught = teacher
            if not isinstance(taught, Distillation):
                taught = Distillation(taught, *how, *layers, **args.relations, dtype=args.teacher_dtype)
            taught.check_student(model)
            self.distillation = taught
        if not trainable_layers(model) and (args.final_sparsity is not None or args.learning_rate_rewinding):
            raise ValueError(
                "`final_sparsity` and `learning_rate_rewinding` are for sparse layers that are pruned. Got a model "
                "without any. Load it by `load_pretrained(..., all_blocks=True)`, or leave them out."
            )
        self._losses = []
        self.curriculum = Curriculum.of(args)
        given = self._with_own_callbacks(model, args, callbacks)
        if args.keep_freed_memory:
            keep_freed_memory()
        if args.seeded_dropout and args.device.type == "cpu":
            seed_dropout_(model)
        super().__init__(model, args, callbacks=given, **kwargs)
        show_lines_(self.callback_handler.callbacks)
        self.curriculum.collator(self.data_collator)  # refuses one that cannot follow
        if piece_counts is not None:
            self._compare_with(piece_counts)
        if self.compute_loss_func is None and not args.label_smoothing_factor and predicts_masked(model):
            self.masked_positions = MaskedPositions(model)
            self.compute_loss_func = self.masked_positions.loss
        if self.distillation is not None:
            self._move_model_to_device(self.distillation.teacher, args.device)
        if find_callback(self.callback_handler.callbacks, EpochCallback) is None:
            collator: Any = self.data_collator
            self.add_callback(EpochCallback(collator if isinstance(collator, EpochAware) else None))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; counts the tokens of all ranks, and plans the kernels at the first."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        models = [model] if self.distillation is None else [model, self.distillation.teacher]
        self.kernels.plan(models, tokens, autocast)
        self.throughput.tokens += tokens * self.args.world_size
        return super().training_step(model, inputs, *rest, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        Training FLOPs of this batch by the paper's count, and of the dense gradient where an update will use it;
        0 for a model or input that is not covered.
        """
        model = self.accelerator.unwrap_model(self.model)
        if "input_ids" not in inputs or not isinstance(model, PreTrainedModel):
            return 0
        # [batch, sequence] or [batch, choices, sequence]
        ids = inputs["input_ids"]
        observed = 2 * ids.numel() * self.topology.observed_positions if self.topology is not None else 0
        return ids.numel() // ids.shape[-1] * flops_per_sequence(model, ids.shape[-1]) + observed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the metrics of the run so far."""
        if "loss" in logs or "eval_loss" in logs:
            self.store_flos()
            logs["dynsparse/flops"] = self.state.total_flos
            logs["dynsparse/tokens"] = self.throughput.tokens
            logs["dynsparse/tokens_per_second"] = self.throughput.tokens_per_second
            taught = self.distillation.take_means() if self.distillation and "loss" in logs else {}
            logs.update({f"dynsparse/{name}": loss for name, loss in taught.items()})
            if self.topology is not None:
                logs.update(self.topology.logged)
            if self.early_bird is not None:
                logs.update(self.early_bird.logged)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Write README.md, and trainer_state.json, into the output folder: [`write_model_card`] with what this run knows.
        A README.md that this package did not write stays.
        Arguments as in transformers; an adapter gets transformers' own card.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            super().create_model_card(*args, **kwargs)
            return
        self.save_state()
        folder = str(self.args.output_dir)
        if not is_ours(folder, SHORT, CARD):
            logger.warning(
                "README.md in %s is not of this package and stays. `hf-dynsparse card` replaces it.", folder
            )
            return
        facts = describe_training(self) | trainer_facts(*args, **kwargs)
        write_model_card(folder, model=model, **facts)
