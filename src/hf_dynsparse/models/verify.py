"""
Whether a checkpoint and the model that it is loaded into fit: the same rules and errors for every kind of model.

A loader describes what the checkpoint holds in a `Report`, before the weights arrive (from headers) or after, and
`verify` judges it. Checksums and dtypes are compared file by file in `checksums.py`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..nn.linear import sparse_layers
from .checksums import open_weights, warn_of_nonfinite
from .heads import in_head


GIVEN = "the given `state_dict`"  # in the place of a file


class Held(NamedTuple):
    """A tensor of a checkpoint: its name and shape there, and where it is."""

    key: str
    shape: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class Report:
    """
    What a checkpoint holds, for `verify`.

    Args:
        source (`str`): file or folder, or `GIVEN`.
        held (`Mapping[str, Held]`): its tensors by the names that they have in the model.
        shapes (`Mapping[str, tuple[int, ...]]`): those that the configuration asks for. A tensor not named may have
            any.
        required (`Iterable[str]`): what must be there in a head too.
        unplaced (`Iterable[tuple[str, str]]`): sparse or int8 layers and tensors that the model has no place for, and
            where they are.
        saved_here (`bool`): whether this package wrote it: others leave out a pooler, or name another class.
        new_heads (`bool`): whether a head may have other shapes and start afresh (`ignore_mismatched_sizes`).
    """

    source: str
    held: Mapping[str, Held]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    required: Iterable[str] = ()
    unplaced: Iterable[tuple[str, str]] = ()
    saved_here: bool = True
    new_heads: bool = False


def verify(model: PreTrainedModel, report: Report) -> None:
    """
    Check that a checkpoint fits: tensors have the shapes of the configuration, nothing of the model is random but a
    head that starts afresh, and no sparse layer is left out.

    Raises:
        ValueError: naming the first tensor that does not fit, and its file.
    """
    # Indices last: the shape of `values` says more about what is wrong.
    for name in sorted(report.held, key=lambda name: name.endswith(".block_index")):
        wanted, item = report.shapes.get(name), report.held[name]
        if wanted is not None and item.shape != wanted and not (report.new_heads and in_head(model, name)):
            raise ValueError(
                f"`{item.key}` must have shape {wanted} by the configuration. Got {item.shape} in {item.place}. "
                f"{_fix_of_shape(model, report, name)}"
            )
    missing = _missing(model, report)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        compare = "`num_hidden_layers`, `sparsity` and `nnzb`"
        if report.required:
            compare = "`num_hidden_layers`, and remove `quantization_config` if the weights are dense"
        raise ValueError(
            f"A checkpoint must hold every tensor of the {'model' if _has_saved_head(model, report) else _BODY}. Got "
            f"{report.source} without `{missing[0]}`{more}. It is incomplete: load an intact one. Or config.json does "
            f"not describe it: compare {compare}."
        )
    for layer, place in report.unplaced:
        raise ValueError(
            f"A model must have a place for every sparse layer of a checkpoint. Got `{layer}` in {place}. Load it "
            "with the `num_hidden_layers` that it was saved with: leave that out, and mend config.json if it was "
            "changed."
        )


def verify_values(model: nn.Module, source: str) -> None:
    """
    Check what only the weights tell, after they have arrived: the ids of blocks; a line in the log for NaN.

    Raises:
        ValueError: naming the first layer with an id that is out of range or there twice.
    """
    for name, layer in sparse_layers(model).items():
        if not layer.block_index.is_meta:  # as under a `device_map` with "disk"
            layer.layout.validate(f"`{name}` in {source}")
    warn_of_nonfinite(model, source)


def held_after_loading(model: PreTrainedModel, source: str, files: Iterable[str | Path]) -> dict[str, Held]:
    """What transformers has just loaded from `files`, by its own marks; what stays on the disk is on meta."""
    held = {
        name: Held(name, tuple(tensor.shape), source)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta
    }
    # Those in the files all the same have another shape: that goes through on request, and only a head may have one.
    for file in map(str, files):
        if file.endswith(".safetensors"):
            with open_weights(file) as weights:
                names = [name for name in weights.keys() if in_head(model, name)]  # noqa: SIM118  (not a dict)
            held |= {name: Held(name, (), file) for name in names if name not in held}
    return held


def layers_without_place(model: PreTrainedModel, layers: Iterable[str]) -> list[str]:
    """Those of the sparse `layers` of a checkpoint that `model` has no place for, but those of another head."""
    prefix = f"{model.base_model_prefix}."
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    unplaced = []
    for layer in layers:
        parts = layer.removeprefix(prefix).split(".")
        paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        absent = [path.rpartition(".")[2] for path in paths if path not in modules]
        # A list of layers that is too short; or any module, if the model has the head that was saved.
        if absent and (_is_saved_class(model) or absent[0].isdecimal()):
            unplaced.append(layer)
    return unplaced


_BODY = "model outside its head"


def _missing(model: PreTrainedModel, report: Report) -> list[str]:
    kept, twins = set(report.held), defaultdict[str, set[str]](set)
    for target, tied_to in model.all_tied_weights_keys.items():
        twins[tied_to] |= {target, tied_to}
    for names in twins.values():  # a tied tensor is there if its twin is
        kept |= names if kept & names else set()
    whole, required = _has_saved_head(model, report), set(report.required)
    optional = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ()) or "$^"
    unsaved = model._keys_to_ignore_on_save or ()
    return [
        name
        for name in model.state_dict()
        if name not in kept and name not in unsaved and not re.search(optional, name)
        if whole or name in required or not in_head(model, name)
    ]


def _has_saved_head(model: PreTrainedModel, report: Report) -> bool:
    # Of a `state_dict` in memory nobody knows which class it is of.
    return report.saved_here and report.source != GIVEN and _is_saved_class(model)


def _is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def _fix_of_shape(model: PreTrainedModel, report: Report, name: str) -> str:
    if report.required:
        return "Load it with the config.json that it was saved with; if it is damaged, load an intact one."
    if in_head(model, name):
        return "Change `num_labels`, or pass `ignore_mismatched_sizes=True` to start this head afresh."
    if report.held[name].key.endswith((".values", ".block_index")):
        return (
            "Load it with the `sparsity`, `block_size`, `distribution` and `nnzb` that it was saved with: leave them "
            "out, and mend config.json if it was changed."
        )
    return "Give the configuration the dimensions of the checkpoint."
