"""Whether a checkpoint has all that a model needs, whatever its architecture: nothing but another head is random."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .body import in_head
from .checksums import open_weights


GIVEN = "the given `state_dict`"  # in the place of a file


def check_complete(model: PreTrainedModel, held: Iterable[str], source: str, saved_here: bool = True) -> None:
    """
    Check that nothing of a loaded model is random but a head that starts afresh: what stands outside of it must come
    from the checkpoint, and so must the head if it is the one that was saved.

    Args:
        held (`Iterable[str]`): the tensors that the checkpoint has, by their names in `model`.
        source (`str`): file or folder.
        saved_here (`bool`): whether this package wrote it: others leave out a pooler, or name another class.

    Raises:
        ValueError: naming the first tensor that is missing.
    """
    kept, twins = set(held), defaultdict[str, set[str]](set)
    for target, tied_to in model.all_tied_weights_keys.items():
        twins[tied_to] |= {target, tied_to}
    for names in twins.values():  # a tied tensor is there if its twin is
        kept |= names if kept & names else set()
    # Of a `state_dict` in memory nobody knows which class it is of.
    saved_head = saved_here and source != GIVEN and _is_saved_class(model)
    optional = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ()) or "$^"
    unsaved = model._keys_to_ignore_on_save or ()
    missing = [
        name
        for name in model.state_dict()
        if name not in kept and name not in unsaved and not re.search(optional, name)
        if saved_head or not in_head(model, name)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"A checkpoint must hold every tensor of the {'model' if saved_head else 'model outside its head'}. Got "
            f"{source} without `{missing[0]}`{more}. It is incomplete: load an intact one. Or config.json does not "
            "describe it: compare `num_hidden_layers`, `sparsity` and `nnzb`."
        )


def check_places(model: PreTrainedModel, layers: Iterable[str], source: str) -> None:
    """
    Check that none of the sparse layers of a checkpoint is left out, but those of another head.

    Raises:
        ValueError: naming the first for which a list of layers in `model` is too short, or that is not there at all if
            `model` has the head that was saved.
    """
    prefix = f"{model.base_model_prefix}."
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    for layer in layers:
        parts = layer.removeprefix(prefix).split(".")
        paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        absent = [path.rpartition(".")[2] for path in paths if path not in modules]
        if absent and (_is_saved_class(model) or absent[0].isdecimal()):
            raise no_place_for(layer, source)


def no_place_for(layer: str, source: str) -> ValueError:
    """The error about a sparse layer of a checkpoint that the model to load has no place for."""
    return ValueError(
        f"A model must have a place for every sparse layer of a checkpoint. Got `{layer}` in {source}. Load it with "
        "the `num_hidden_layers` that it was saved with: leave that out, and mend config.json if it was changed."
    )


def check_loaded(model: PreTrainedModel, source: str, files: Iterable[str | Path], saved_here: bool = True) -> None:
    """
    As `check_complete`, of a model that transformers has just loaded from `files`.

    Raises:
        ValueError: naming the first tensor that is missing.
    """
    loaded = {name for name, tensor in model.state_dict(keep_vars=True).items() if is_loaded(tensor)}
    if not loaded and source == GIVEN:  # `state_dict={}` asks for a fresh model
        return
    # Those in the files all the same have another shape: that goes through on request, and only a head may have one.
    others = {name for name in tensor_names(files) if in_head(model, name)}
    check_complete(model, loaded | others, source, saved_here)


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether the checkpoint held it: the loader marks what it has loaded, and leaves on meta what stays on disk."""
    return getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta


def tensor_names(files: Iterable[str | Path]) -> set[str]:
    """Names of the tensors in safetensors files; others are not looked into."""
    names = set[str]()
    for file in map(str, files):
        if file.endswith(".safetensors"):
            with open_weights(file) as weights:
                names.update(weights.keys())
    return names


def _is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())
