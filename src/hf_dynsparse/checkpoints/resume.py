"""Which checkpoint a run goes on from, and whether the model at hand is the one it holds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerState

from .._transformers import TRAINER_STATE_NAME
from ..models.checksums import open_weights
from ..models.density import sizes_of
from ..nn.linear import TRAINING_BUFFER, trainable_layers
from ..topology.resize import set_size_
from .saving import last_checkpoint, weight_files


def find_run_to_resume(output_dir: str | Path, resume_from_checkpoint: str | None) -> str | None:
    """
    The checkpoint folder that a script must go on from, `None` for a new run.

    Args:
        output_dir (`str` or `Path`): where the run is written.
        resume_from_checkpoint (`str`, *optional*): a checkpoint folder, or `"last"`: the newest in `output_dir`.

    Raises:
        FileNotFoundError: if the checkpoint is none.
        ValueError: if a new run would be written over another.
    """
    last = last_checkpoint(output_dir)
    if resume_from_checkpoint == "last":
        return last
    if resume_from_checkpoint is not None:
        if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"`--resume_from_checkpoint` must name a checkpoint folder or `last`. Got {resume_from_checkpoint}."
            )
        return resume_from_checkpoint
    if last is not None or (Path(output_dir) / "summary.json").exists():
        raise ValueError(
            f"`--output_dir` must not hold another run. Got {output_dir}, which does. Give a new folder, or "
            "--resume_from_checkpoint last to go on with that run."
        )
    return None


def check_same_model(model: PreTrainedModel, checkpoint: str | Path, resized: bool = False) -> None:
    """
    Refuse to go on with another model than that of `checkpoint`: the Trainer would take the weights whose names agree,
    and leave the others as they are.

    Args:
        resized (`bool`): whether sparse layers may have another number of active blocks.

    Raises:
        ValueError: naming the first tensor that the checkpoint lacks, or has in another shape, or a file that cannot
            be read.
    """
    saved: dict[str, list[int]] = {}
    for file in weight_files(checkpoint):
        with open_weights(file) as weights:
            saved |= {name: weights.get_slice(name).get_shape() for name in list(weights.keys())}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    by_block = {f"{name}.{part}" for name in trainable_layers(model) for part in ("values", "block_index")}
    for name, tensor in model.state_dict().items():
        # A run that does not record something may be followed by one that does.
        if not saved or name in tied or re.search(TRAINING_BUFFER, name):
            continue
        first = int(resized and name in by_block)
        if name not in saved or saved[name][first:] != list(tensor.shape[first:]):
            theirs = tuple(saved[name]) if name in saved else "none"
            raise ValueError(
                f"A resumed run must have the model of its checkpoint. Got `{name}` of shape {tuple(tensor.shape)}, "
                f"but {checkpoint} has {theirs}. Start from the same model, with the same sparsity, block size and "
                "fine-tuning mode, or write to a new folder."
            )


def resize_to_checkpoint_(model: nn.Module, checkpoint: str | Path, *, optimizer: Optimizer | None) -> None:
    """
    Give the sparse layers of `model`, and their moments in `optimizer`, the sizes that they have in a checkpoint,
    which is loaded next.
    """
    layers = trainable_layers(model)
    for name, nnzb in _saved_sizes(model, checkpoint).items():
        set_size_(layers[name], nnzb, optimizer=optimizer)


def check_final_sizes(model: nn.Module, given: Mapping[str, int], checkpoint: str | Path, callback: str) -> None:
    """
    Args:
        given (`Mapping[str, int]`): the sizes of `model` before an interrupted run changed them.

    Raises:
        ValueError: if `model` had neither the sizes that the run of `checkpoint` was started with, which are those of
            its end or, with `final_sparsity`, of its beginning; nor has those of the checkpoint.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    saved: Any = state.stateful_callbacks.get(callback, {})
    final = saved.get("attributes", {}).get("final")
    if final is None or given == final["sizes"] or sizes_of(model) == _saved_sizes(model, checkpoint):
        return
    name = next(name for name in given if given[name] != final["sizes"].get(name))
    raise ValueError(
        f"A resumed run must have the model of its checkpoint. Got `{name}` with {given[name]} active blocks, but the "
        f"run of {checkpoint} was given one with {final['sizes'].get(name, 'none')}. Start from the same model, with "
        "the same sparsity, block size and distribution, or write to a new folder."
    )


def _saved_sizes(model: nn.Module, checkpoint: str | Path) -> dict[str, int]:
    sizes = {}
    for file in weight_files(checkpoint):
        with open_weights(file) as weights:
            for name in {f"{name}.values" for name in trainable_layers(model)} & set(weights.keys()):
                sizes[name.removesuffix(".values")] = weights.get_slice(name).get_shape()[0]
    return sizes
