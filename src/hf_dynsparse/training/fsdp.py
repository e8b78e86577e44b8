"""FSDP2 as accelerate runs it: what it must be told about these models, and checkpoints in the form of one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, Trainer

from .._transformers import OPTIMIZER_NAME, SCHEDULER_NAME
from ..checkpoints.saved_run import weight_files
from ..nn.shards import load_whole_model_, load_whole_optimizer_, whole_optimizer_state


class ShardedTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose checkpoints under FSDP2 are those of a single process: any number of ranks, with
    FSDP2 or without, goes on from them. Without FSDP2 nothing changes.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def create_accelerator_and_postprocess(self) -> None:
        """
        As in transformers.

        Raises:
            ValueError: for settings of FSDP2 that cannot work.
        """
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            adapt_plugin_(self.accelerator.state.fsdp_plugin, self.model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.accelerator.is_fsdp2:
            return super()._prepare_for_training(*args, **kwargs)
        self.create_optimizer()  # with the parameters in the order that a single process has
        with one_name_for_output_bias(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None and isinstance(self.model, PreTrainedModel):
            # Gathered tensors share no memory, by which transformers knows the ones to write once.
            state_dict = {name: x for name, x in state_dict.items() if name not in self.model.all_tied_weights_keys}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.accelerator.is_fsdp2:
            load_weights_(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.accelerator.is_fsdp2:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        moments = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(moments, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.accelerator.is_fsdp2:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        moments, schedule = (
            torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_whole_optimizer_(self.optimizer, moments)
        self.lr_scheduler.load_state_dict(schedule)


def adapt_plugin_(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """
    Choose the modules to shard one by one where the user has not, and refuse settings that cannot work.

    Raises:
        ValueError: for sharded state dicts, or loading on one rank only.
    """
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            "Checkpoints of FSDP2 runs are those of a single process, for any number of ranks to go on from. Got "
            f"{plugin.state_dict_type.name}. Set `fsdp_state_dict_type: FULL_STATE_DICT`."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Each rank must build or load the model, for accelerate cannot send buffers, and block indices are such. "
            "Got `fsdp_cpu_ram_efficient_loading: true`. Set it to false."
        )
    if plugin.transformer_cls_names_to_wrap is None and isinstance(model, PreTrainedModel):
        # accelerate shards the embedding itself: a class that holds it would have it sharded twice.
        embedding = model.get_input_embeddings()
        holders = {type(module).__name__ for module in model.modules() if embedding in module.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(set(model._no_split_modules or ()) - holders)


@contextmanager
def one_name_for_output_bias(model: nn.Module) -> Iterator[None]:
    """
    Inside the `with` block the bias of the output layer has that name only. The heads of BERT and RoBERTa keep it
    under a second one, in another module, and a parameter may belong to one FSDP group only.
    """
    output: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    bias = getattr(output, "bias", None)
    others = [m for m in model.modules() if bias is not None and m is not output and m._parameters.get("bias") is bias]
    for module in others:
        del module.bias
    try:
        yield
    finally:
        for module in others:
            module.bias = output.bias


def load_weights_(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Take over the weights of a checkpoint of a whole model; each rank keeps its rows.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    files = weight_files(checkpoint)
    if not files:
        raise FileNotFoundError(f"A checkpoint must hold `model.safetensors`. Got {checkpoint}, which does not.")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if isinstance(model, PreTrainedModel):
        saved |= {tied: saved[name] for tied, name in model.all_tied_weights_keys.items() if name in saved}
    load_whole_model_(model, saved)
