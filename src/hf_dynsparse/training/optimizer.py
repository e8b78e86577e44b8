"""The optimiser and the schedule of a run: as in transformers, with what sparse layers may ask for."""

import logging
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, SchedulerType, Trainer, get_scheduler

from ..models.heads import body_linears
from ..nn.linear import trainable_layers
from ..optim.block_adam import BlockAdamW
from ..optim.groups import parameter_groups
from .rewinding import rewinding


logger = logging.getLogger(__name__)

DECAY = 0.2  # share of a run in which the rate falls, after it was constant


class OptimizerTrainer(Trainer):
    """[`~transformers.Trainer`] with Adam per block, a rate for dense parameters, and rewinds of the learning rate."""

    args: Any
    optimizer: Any
    lr_scheduler: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; with ages of blocks or a rate of their own for dense parameters if the arguments ask."""
        args, trained = self.args, cast(PreTrainedModel, self.model if model is None else model)
        if self.optimizer is None and (args.block_age_adam or args.dense_learning_rate is not None):
            decayed = self.get_decay_parameter_names(trained)
            # Of a dense model, the matrices in whose place a sparse one would have its layers.
            twins = [] if trainable_layers(trained) else [linear.weight for linear in body_linears(trained).values()]
            groups = parameter_groups(trained, args.weight_decay, args.dense_learning_rate, decayed, twins)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            if args.block_age_adam:
                optimizer_class, options = BlockAdamW, {**options, "new_block_warmup": args.new_block_warmup}
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """
        As in transformers; with rewinds of the learning rate if the arguments ask. The decay of `warmup_stable_decay`
        takes the last fifth of the run if `lr_scheduler_kwargs` do not give `num_decay_steps`.
        """
        options = self.args.lr_scheduler_kwargs or {}
        constant = self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
        if self.lr_scheduler is None and constant and "num_decay_steps" not in options:
            warmup = self.args.get_warmup_steps(num_training_steps)
            decay = min(max(1, round(DECAY * num_training_steps)), num_training_steps - warmup)
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer or self.optimizer,
                num_warmup_steps=warmup,
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs={**options, "num_decay_steps": decay},
            )
            self._created_lr_scheduler = True
        if self.lr_scheduler is None and self.args.learning_rate_rewinding:
            warmup = self.args.get_warmup_steps(num_training_steps)
            multiplier = rewinding(self.args.topology_settings(), num_training_steps, warmup)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, multiplier)
            self._created_lr_scheduler = True
            logger.info("The learning rate is taken back at each topology update, until the pruning window ends.")
        return super().create_scheduler(num_training_steps, optimizer)
