"""The data loaders of a run: masks of evaluation that stay, and workers that take no random number from the model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from .callbacks.epoch import EpochAware
from .curriculum import Curriculum


class DataTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose batches are the same in a resumed run and in each evaluation, and follow schedules
    of their length and masks.
    """

    data_collator: Any
    state: Any
    curriculum: Curriculum
    _evaluated: Any = None  # the data set of the last evaluation

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers; the masks are those of the highest rate of the run."""
        with self._collating(self.curriculum.collator(self.data_collator)):
            return self._with_own_generator(super().get_train_dataloader())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As in transformers; each batch as the schedules want it in this step, before its labels are counted."""
        if self.curriculum != Curriculum():
            progress = self.state.global_step / self.state.max_steps
            epoch_iterator = (self.curriculum(batch, progress) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers; the masks are those of epoch 0, and the rows those of the data set that is given."""
        wanted = self.eval_dataset if eval_dataset is None else eval_dataset
        if wanted is not self._evaluated and not isinstance(wanted, str):
            # Persistent workers are kept by a name that says nothing of the data set.
            vars(self).pop("_eval_dataloaders", None)
        self._evaluated = wanted
        with self._evaluation_masks():
            return self._with_own_generator(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in transformers; the masks are those of epoch 0."""
        with self._evaluation_masks():
            return self._with_own_generator(super().get_test_dataloader(test_dataset))

    @contextmanager
    def _evaluation_masks(self) -> Iterator[None]:
        """Evaluation must not see other masks as the epochs go by: inside, a copy of the collator stays at epoch 0."""
        collator = self.data_collator
        if isinstance(collator, EpochAware):
            collator = copy.deepcopy(collator)
            collator.set_epoch(0)
        with self._collating(collator):
            yield

    @contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        """Inside, `collator` makes the batches of new data loaders."""
        own, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = own

    def _with_own_generator(self, dataloader: Any) -> DataLoader:
        if self.args.dataloader_persistent_workers:
            # Starting workers draws a seed, and a resumed run starts them once more: not from the model's generator.
            dataloader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return dataloader
