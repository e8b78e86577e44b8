"""`DynSparseTrainer`: the transformers `Trainer` with topology updates, their metrics, and checkpoints saved whole."""

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from .._transformers import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, SaveStrategy, TrainOutput, has_length
from ..checkpoints.resume import check_final_sizes, check_same_model, resize_to_checkpoint_
from ..checkpoints.run_lock import run_lock
from ..checkpoints.saving import (
    NEEDED_STATE,
    STAGING_FOLDER,
    WEIGHTS,
    check_training_state,
    check_weights,
    last_checkpoint,
    publish_checkpoint,
    remove_interrupted_save,
    rotate_checkpoints,
    warn_of_later_checkpoints,
    write_checksums,
)
from ..hub.trainer import HubTrainer
from ..models.dropout import seed_dropout_
from ..models.flops import flops_per_sequence
from ..models.losses import IGNORED, class_labels, zero_if_unlabelled
from ..models.readme import CARD, SHORT, is_ours
from ..nn.linear import trainable_layers
from ..nn.shards import whole
from ..optim.block_adam import BlockAdamW
from ..optim.groups import parameter_groups
from ..reports.facts import trainer_facts
from ..reports.model_card import write_model_card
from .arguments import DynSparseTrainingArguments
from .callbacks.epoch import EpochAware, EpochCallback
from .callbacks.kernels import KernelCallback
from .callbacks.slimming import EarlyBirdCallback
from .callbacks.throughput import Callback, ThroughputCallback, check_one_of_each, find_callback, pass_and_step
from .callbacks.topology import TopologyCallback
from .ddp import rebuild_reducer_
from .distillation import Distillation
from .fsdp import ShardedTrainer
from .memory import keep_freed_memory
from .rewinding import rewinding
from .save_attempt import SaveAttempt, are_finite
from .summary import describe_training


logger = logging.getLogger(__name__)

# Two of a kind would both act on the model, or be told apart by nobody.
ONE_OF_EACH = (TopologyCallback, EarlyBirdCallback, KernelCallback, ThroughputCallback, EpochCallback)


class DynSparseTrainer(HubTrainer, ShardedTrainer):
    """
    [`~transformers.Trainer`] for models with `BlockSparseLinear` layers; the arguments are the same.

    Adds to every log entry `dynsparse/flops` and `dynsparse/tokens_per_second`, and the metrics of
    [`TopologyCallback`] under `dynsparse/`. A model without sparse layers trains as usual: the dense baseline.

    Args:
        teacher (`nn.Module`, *optional*): a model with the same head to learn from beside the labels, weighted by
            `args.distillation_weight`; training only, evaluation measures the task.

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
        teacher: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = DynSparseTrainingArguments(output_dir="trainer_output") if args is None else args
        if args.teacher is not None and teacher is None:
            raise ValueError(f"`args.teacher` is {args.teacher!r}: load that model and give it as `teacher` too.")
        self.distillation = None
        if teacher is not None:
            how = args.distillation_temperature, args.distillation_weight, args.distillation_positions
            self.distillation = Distillation(teacher, *how)
            self.distillation.check_student(model)
        if not trainable_layers(model) and (args.final_sparsity is not None or args.learning_rate_rewinding):
            raise ValueError(
                "`final_sparsity` and `learning_rate_rewinding` are for sparse layers that are pruned. Got a model "
                "without any. Load it by `load_pretrained(..., all_blocks=True)`, or leave them out."
            )
        self._staging_dir: str | None = None
        self._save_attempt = SaveAttempt()
        self._losses: list[torch.Tensor] = []  # of the micro-batches of this step
        given = [_made(callback, args) for callback in callbacks or ()]
        # Throughput last, so that the time of a topology update counts.
        for kind in (*([TopologyCallback] if trainable_layers(model) else []), KernelCallback, ThroughputCallback):
            if find_callback(given, kind) is None:
                given.append(_made(kind, args))
        check_one_of_each(given, ONE_OF_EACH)
        self._connect(given)
        if args.keep_freed_memory:
            keep_freed_memory()
        if args.seeded_dropout and args.device.type == "cpu":
            seed_dropout_(model)
        super().__init__(model, args, callbacks=given, **kwargs)
        if teacher is not None:
            self._move_model_to_device(teacher, args.device)
        if find_callback(self.callback_handler.callbacks, EpochCallback) is None:
            collator: Any = self.data_collator
            self.add_callback(EpochCallback(collator if isinstance(collator, EpochAware) else None))

    @property
    def topology(self) -> TopologyCallback | None:
        """The callback that updates the topology."""
        return find_callback(self.callback_handler.callbacks, TopologyCallback)

    @property
    def early_bird(self) -> EarlyBirdCallback | None:
        """The callback that searches for a ticket."""
        return find_callback(self.callback_handler.callbacks, EarlyBirdCallback)

    @property
    def kernels(self) -> KernelCallback:
        """The callback that settles the backends."""
        return self._needed(KernelCallback)

    @property
    def throughput(self) -> ThroughputCallback:
        """The callback that counts tokens and seconds."""
        return self._needed(ThroughputCallback)

    def _needed(self, kind: type[Callback]) -> Callback:
        callback = find_callback(self.callback_handler.callbacks, kind)
        if callback is None:
            raise ValueError(
                f"`DynSparseTrainer` works with its `{kind.__name__}`. Got none: it was removed. Leave it, or add one."
            )
        return callback

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        As in transformers.

        Raises:
            ValueError: for a second one of a kind that must be alone.
        """
        made = _made(callback, self.args)
        callbacks = [*self.callback_handler.callbacks, made]
        check_one_of_each(callbacks, ONE_OF_EACH)
        super().add_callback(made)
        self._connect(callbacks)

    def _connect(self, callbacks: Sequence[TrainerCallback]) -> None:
        topology = find_callback(callbacks, TopologyCallback)
        if topology is not None:
            topology.on_resize = self._after_resize

    def _load_callback_state(self) -> None:
        # Those that are made anew come last: what one does for another goes by the order of the first.
        order = [type(callback) for callback in self.callback_handler.callbacks]
        super()._load_callback_state()
        self.callback_handler.callbacks.sort(key=lambda callback: order.index(type(callback)))
        self._connect(self.callback_handler.callbacks)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        where = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or has_length(self.train_dataset):
            return where
        # All steps would be looked for in the first pass, and not found if the run had made more than one.
        saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        epoch, steps = pass_and_step(saved)
        return epoch, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in transformers; a run that has done all its `max_steps` already is loaded and not trained further.

        Raises:
            ValueError: if the checkpoint to go on from is damaged, naming the file.
            FloatingPointError: if a loss or gradient is not finite, before the optimiser sees it.
            OSError: if the output folder cannot be written to, or another run has it, or the last save of the run
                fails; saves before that may fail, and are made up for by the next.
        """
        try:
            with self._own_output_dir(trial):
                return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.topology is not None:
                self.topology.end(self.accelerator.unwrap_model(self.model))

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if resume_from_checkpoint is True:  # and stays so if there is none, for transformers to say
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir)) or True
        state = TrainerState()
        if isinstance(resume_from_checkpoint, str):
            check_training_state(resume_from_checkpoint, self._needed_state)
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        if self.args.should_save:
            warn_of_later_checkpoints(self._get_output_dir(trial), state.global_step)
        if not isinstance(resume_from_checkpoint, str) or not 0 < self.args.max_steps <= state.global_step:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        logger.info("%s holds all %d steps: nothing to train.", resume_from_checkpoint, state.global_step)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        self.throughput.restore(state)
        if self.topology is not None:
            self.topology.restore(state, self.args.max_steps)
            model = self.accelerator.unwrap_model(self.model)
            self.topology.on_train_end(self.args, state, self.control, model=model)
        return TrainOutput(state.global_step, float("nan"), {})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; with ages of blocks or a rate of their own for dense parameters if the arguments ask."""
        args, trained = self.args, cast(PreTrainedModel, self.model if model is None else model)
        if self.optimizer is None and (args.block_age_adam or args.dense_learning_rate is not None):
            decayed = self.get_decay_parameter_names(trained)
            groups = parameter_groups(trained, args.weight_decay, args.dense_learning_rate, decayed)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            if args.block_age_adam:
                optimizer_class, options = BlockAdamW, {**options, "new_block_warmup": args.new_block_warmup}
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in transformers; with rewinds of the learning rate if the arguments ask."""
        if self.lr_scheduler is None and self.args.learning_rate_rewinding:
            warmup = self.args.get_warmup_steps(num_training_steps)
            multiplier = rewinding(self.args.topology_settings(), num_training_steps, warmup)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, multiplier)
            self._created_lr_scheduler = True
            logger.info("The learning rate is taken back at each topology update, until the pruning window ends.")
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        training_collator: Any = self.data_collator
        if not kwargs.get("is_training") and isinstance(training_collator, EpochAware):
            # Evaluation must not see other masks as the epochs go by.
            collator: Any = copy.deepcopy(training_collator)
            collator.set_epoch(0)
            self.data_collator = collator
        try:
            dataloader: Any = super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training_collator
        if self.args.dataloader_persistent_workers:
            # Starting workers draws a seed, and a resumed run starts them once more: not from the model's generator.
            dataloader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return dataloader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; counts the tokens of all ranks, and plans the kernels at the first."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        models = [model] if self.distillation is None else [model, self.distillation.teacher]
        self.kernels.plan(models, tokens, autocast)
        self.throughput.tokens += tokens * self.args.world_size
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
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out of `inputs`
        student = self.accelerator.unwrap_model(model)
        with nullcontext() if self.distillation is None else self.distillation.asking(student):
            task_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Of stock heads and label smoothing the mean over no label is NaN.
        if (labels := class_labels(given)) is not None:
            task_loss = zero_if_unlabelled(task_loss, labels)
        if self.distillation is None:
            return (task_loss, outputs) if return_outputs else task_loss
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        distilled = self.distillation.loss(given, outputs, items)
        if items is not None and self.args.average_tokens_across_devices:
            distilled = distilled * self.accelerator.num_processes  # the items of all ranks, as in the task's loss
        weight = self.distillation.weight
        loss = (1.0 - weight) * task_loss + weight * distilled
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a batch without a label that counts has loss NaN, which the mean of a set leaves out."""
        labels = class_labels(inputs)
        loss, logits, answers = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and labels is not None:
            loss = loss.where((labels != IGNORED).any().to(loss.device), math.nan)
        return loss, logits, answers

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
            logs["dynsparse/tokens_per_second"] = self.throughput.tokens_per_second
            distilled = self.distillation.take_mean() if self.distillation and "loss" in logs else None
            if distilled is not None:
                logs["dynsparse/distillation_loss"] = distilled
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A second call of `train` finds a model whose recording ended with the first.
        own = self.accelerator.unwrap_model(self.model)
        check_weights(resume_from_checkpoint)
        if self.topology is not None:
            self.topology.track_(own)
            if self.topology.resizes:
                given = self.topology.given_sizes(own)
                check_final_sizes(own, given, resume_from_checkpoint, type(self.topology).__name__)
                resize_to_checkpoint_(own, resume_from_checkpoint, optimizer=self.optimizer)
        if isinstance(own, PreTrainedModel):
            check_same_model(own, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A denser model on the way would win, and is not what the run is to give.
        if self.topology is not None and not self.topology.has_final_density:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        best, own = str(self.state.best_model_checkpoint), self.accelerator.unwrap_model(self.model)
        check_weights(best)
        if self.topology is not None and self.topology.resizes:
            resize_to_checkpoint_(own, best, optimizer=self.optimizer)
            self.topology.note_sizes(own)
        super()._load_best_model()

    def _after_resize(self) -> None:
        self.kernels.plan_again(self.accelerator.unwrap_model(self.model))
        if isinstance(self.model_wrapped, DistributedDataParallel):
            rebuild_reducer_(self.model_wrapped, self.accelerator.ddp_handler)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # An upload runs in the background: not from a folder that is about to be renamed.
        if self._staging_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers."""
        if self._staging_dir is None:
            with run_lock(output_dir or str(self.args.output_dir)) if self.args.should_save else nullcontext():
                super().save_model(output_dir, _internal_call)
        else:
            with self._save_attempt.noting():
                super().save_model(output_dir, _internal_call)

    @contextmanager
    def _own_output_dir(self, trial: Any) -> Iterator[None]:
        """Where this run saves, no other does meanwhile. All ranks go on, or none."""
        with ExitStack() as held:
            refusal = None
            try:
                if self.args.save_strategy != SaveStrategy.NO and self.args.should_save:
                    held.enter_context(run_lock(self._get_output_dir(trial)))
            except OSError as error:
                refusal = str(error)
            refusal = next(filter(None, gather_object([refusal])), None)
            if refusal is not None:
                raise OSError(refusal)
            if self.args.push_to_hub and self.is_world_process_zero():
                self._remove_pending_pushes()
            yield

    @property
    def _needed_state(self) -> tuple[str, ...]:
        # DeepSpeed, and FSDP before its second version, keep moments in files of their own.
        whole = not self.is_deepspeed_enabled and (self.accelerator.is_fsdp2 or not self.is_fsdp_enabled)
        return NEEDED_STATE if whole else (TRAINER_STATE_NAME,)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        self._save_attempt = attempt = SaveAttempt()
        attempt.do(remove_interrupted_save, run_dir, here=self.args.should_save)
        self._staging_dir = os.path.join(run_dir, STAGING_FOLDER)
        try:
            attempt.do(super()._save_checkpoint, model, trial)
        finally:
            self._staging_dir = None
        attempt.do(self._publish, run_dir, name, here=self.args.should_save)
        if attempt.problem is None:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(run_dir, name)  # all ranks load it at the end
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.path.join(run_dir, name))
            return
        self.state.best_model_checkpoint = best
        is_last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        attempt.give_up(run_dir, name, clean=self.args.should_save, is_last=is_last)

    def _publish(self, run_dir: str, name: str) -> None:
        staged = os.path.join(run_dir, STAGING_FOLDER, name)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(run_dir, name)
            self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        write_checksums(staged)
        state = (TRAINER_STATE_NAME,) if self.args.save_only_model else self._needed_state
        publish_checkpoint(run_dir, name, state if self.is_deepspeed_enabled else (WEIGHTS, *state))
        keep = [os.path.join(run_dir, name), *filter(None, [self.state.best_model_checkpoint])]
        rotate_checkpoints(run_dir, self.args.save_total_limit, keep)


def _made(callback: TrainerCallback | type[TrainerCallback], args: DynSparseTrainingArguments) -> TrainerCallback:
    """A callback given as a class is made by the arguments of the run."""
    if not isinstance(callback, type):
        return callback
    if issubclass(callback, TopologyCallback):
        return callback(args.topology_settings(), group_lasso=args.group_lasso)
    if issubclass(callback, KernelCallback):
        return callback(args.kernel_tuning, args.dense_workspace)
    return callback()
