"""`DynSparseTrainer`: the transformers `Trainer` with topology updates, their metrics, and checkpoints saved whole."""

import copy
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from .arguments import DynSparseTrainingArguments
from .callback import EpochAware, EpochCallback, KernelCallback, ThroughputCallback, TopologyCallback, track_model_
from .checkpoint import STAGING_FOLDER, check_same_model, publish_checkpoint, remove_interrupted_save
from .distillation import Distillation
from .flops import flops_per_sequence
from .memory import keep_freed_memory
from .nn import sparse_layers
from .seeded_dropout import seed_dropout_


logger = logging.getLogger(__name__)


class DynSparseTrainer(Trainer):
    """
    [`~transformers.Trainer`] for models with `BlockSparseLinear` layers; the arguments are the same.

    Adds to every log entry `dynsparse/flops` and `dynsparse/tokens_per_second`, and the metrics of
    [`TopologyCallback`] under `dynsparse/`. A model without sparse layers trains as usual: the dense baseline.

    Args:
        teacher (`nn.Module`, *optional*): a model with the same head to learn from beside the labels, weighted by
            `args.distillation_weight`; training only, evaluation measures the task.

    Attributes:
        topology (`TopologyCallback` or `None`): the callback that updates the topology; `None` for a dense model.
        kernels (`KernelCallback`): settles the backends of the run.
        throughput (`ThroughputCallback`): tokens and seconds of the run.
    """

    args: DynSparseTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: DynSparseTrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = DynSparseTrainingArguments(output_dir="trainer_output") if args is None else args
        if args.teacher is not None and teacher is None:
            raise ValueError(f"`args.teacher` is {args.teacher!r}: load that model and give it as `teacher` too.")
        self.distillation = None
        if teacher is not None:
            self.distillation = Distillation(teacher, args.distillation_temperature, args.distillation_weight)
            self.distillation.check_student(model)
        self._staging_dir: str | None = None
        self.throughput = ThroughputCallback()
        callbacks = list(callbacks or ())
        self.topology = next((callback for callback in callbacks if isinstance(callback, TopologyCallback)), None)
        if self.topology is None and sparse_layers(model):
            self.topology = TopologyCallback(**args.topology_settings())
            callbacks.append(self.topology)
        self.kernels = KernelCallback(args.kernel_tuning, args.dense_workspace)
        callbacks.append(self.kernels)
        if args.keep_freed_memory:
            keep_freed_memory()
        if args.seeded_dropout and args.device.type == "cpu":
            seed_dropout_(model)
        # Throughput last, so that the time of a topology update counts.
        super().__init__(model, args, callbacks=[*callbacks, self.throughput], **kwargs)
        if teacher is not None:
            self._move_model_to_device(teacher, args.device)
        collator: Any = self.data_collator
        self._eval_collator = collator
        if isinstance(collator, EpochAware):
            # Evaluation must not see other masks as the epochs go by.
            self._eval_collator = copy.copy(collator)
            self.add_callback(EpochCallback(collator))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in transformers; a run that has done all its `max_steps` already is loaded and not trained further."""
        if not isinstance(resume_from_checkpoint, str) or self.args.max_steps <= 0:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        if state.global_step < self.args.max_steps:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        logger.info("%s holds all %d steps: nothing to train.", resume_from_checkpoint, state.global_step)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        self.throughput.restore(state)
        if self.topology is not None:
            self.topology.restore(state)
            model = self.accelerator.unwrap_model(self.model)
            self.topology.on_train_end(self.args, state, self.control, model=model)
        return TrainOutput(state.global_step, float("nan"), {})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers, with the masks of epoch 0 in every evaluation."""
        training_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; counts the tokens of all ranks, and settles the backends at the first."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        models = [model] if self.distillation is None else [model, self.distillation.teacher]
        self.kernels.settle(nn.ModuleList(models), tokens, autocast)
        self.throughput.tokens += tokens * self.args.world_size
        return super().training_step(model, inputs, *rest, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in transformers; while training with a teacher, its part is mixed in."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out of `inputs`
        task_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        distilled = self.distillation.loss(given, outputs, items)
        if items is not None and self.args.average_tokens_across_devices:
            distilled = distilled * self.accelerator.num_processes  # the items of all ranks, as in the task's loss
        weight = self.distillation.weight
        loss = (1.0 - weight) * task_loss + weight * distilled
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of this batch by the paper's count; 0 for a model or input that it does not cover."""
        model = self.accelerator.unwrap_model(self.model)
        if "input_ids" not in inputs or not isinstance(model, PreTrainedModel):
            return 0
        # [batch, sequence] or [batch, choices, sequence]
        ids = inputs["input_ids"]
        return ids.numel() // ids.shape[-1] * flops_per_sequence(model, ids.shape[-1])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the metrics of the run so far."""
        if "loss" in logs or "eval_loss" in logs:
            self.store_flos()
            logs["dynsparse/flops"] = self.state.total_flos
            logs["dynsparse/tokens_per_second"] = self.throughput.tokens_per_second
            distilled = self.distillation.take_mean() if self.distillation and "loss" in logs else None
            if distilled is not None:
                logs["dynsparse/distillation_loss"] = distilled
            if self.topology is not None:
                logs.update({f"dynsparse/{name}": value for name, value in self.topology.metrics.items()})
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A second call of `train` finds a model whose recording ended with the first.
        own = self.accelerator.unwrap_model(self.model)
        track_model_(own)
        if isinstance(own, PreTrainedModel):
            check_same_model(own, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # An upload runs in the background: not from a folder that is about to be renamed.
        if self._staging_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove_interrupted_save(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging_dir = os.path.join(run_dir, STAGING_FOLDER)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(run_dir, name)
                self.state.save_to_json(os.path.join(run_dir, STAGING_FOLDER, name, TRAINER_STATE_NAME))
            publish_checkpoint(run_dir, name)
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))
