"""Loading a DynSparse BERT: a dense checkpoint becomes sparse on its way in, and none is loaded by half."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._transformers import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from ..blocks.sizes import block_grid
from ..nn.linear import BlockSparseLinear, sparse_layers
from .checksums import check_dtype, open_weights, verify_weights
from .heads import in_head
from .verify import GIVEN, Held, Report, verify, verify_values


logger = logging.getLogger(__name__)


class KeepLargestBlocks(ConversionOps):
    """A dense weight to `values` and `block_index` of the layer that takes it, by `BlockSparseLinear.from_dense`."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        ((weight,),) = input_dict.values()
        name = kwargs["full_layer_name"].rpartition(".")[0]
        layer = kwargs["model"].get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        kept = BlockSparseLinear.from_dense(linear, layer.block_shape, nnzb=layer.nnzb)
        return {f"{name}.values": kept.values.detach(), f"{name}.block_index": kept.block_index}


def dense_conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """
    What turns the dense weights of a checkpoint into those of the sparse layers of `model`. It names these layers one
    by one: the others stay dense, and take their weights as they are.
    """
    layers = sparse_layers(model.base_model)
    if not layers:
        return []
    names = "|".join(map(re.escape, layers))
    return [WeightConverter(rf"({names})\.weight", [r"\1.values", r"\1.block_index"], [KeepLargestBlocks()])]


def count_nonzero_blocks(
    weights: Mapping[str, torch.Tensor], block_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """
    Active blocks `nnzb` of each dense weight of shape `(out_features, in_features)` that is worth being sparse: one
    with 1 % zeros or more, and with a zero block. At least one, if all are zero.

    Raises:
        ValueError: if the block does not divide a weight.
    """
    nnzb = {}
    for name, weight in weights.items():
        rows, columns = block_shapes[name]
        grid = block_grid((weight.shape[0], weight.shape[1]), (rows, columns), f"`{name}`")
        nonzero = weight != 0
        active = int(nonzero.reshape(grid[0], rows, grid[1], columns).any(3).any(1).sum())
        zeros = weight.numel() - int(nonzero.sum())
        if 100 * zeros >= weight.numel() and active < grid[0] * grid[1]:
            nnzb[name] = max(1, active)
    return nnzb


def load_whole(
    load: Callable[..., Any],
    model: Any,
    state_dict: Mapping[str, torch.Tensor] | None,
    files: list[str] | None,
    load_config: Any,
) -> Any:
    """
    Fill `model`, which stands on meta, by transformers' own `load`: dense weights made sparse, and only if the
    checkpoint has all that is needed and holds what was saved. Before that is known nothing is allocated.

    Raises:
        ValueError: naming tensor and file.
    """
    source = _describe(files) if state_dict is None and files else GIVEN
    load_config = replace(load_config, weight_mapping=[*load_config.weight_mapping, *dense_conversions(model)])
    report, converted = _report(model, _tensors_of(state_dict, files), source, load_config)
    verify(model, report)
    if state_dict is None:
        verify_weights(files or ())
    for name, tensor in (state_dict or {}).items():
        check_dtype(name, tensor.dtype, source)
    loaded = load(model, state_dict, files, load_config)
    verify_values(model, source)
    # Else saving would undo what loading did: dense weights, and old names that no resumed run would find.
    model._weight_conversions = []
    if converted:
        logger.info(
            "%s is dense: %d layers keep %s (block size %s, sparsity %g).",
            *(source, converted, "their blocks of largest L1 norm" if model.config.sparsity else "all their blocks"),
            *(model.config.block_size, model.config.sparsity),
        )
    return loaded


def refuse_pickles(name_or_path: Any, **kwargs: Any) -> dict[str, Any]:
    """
    The arguments `kwargs` of `from_pretrained`, such that it reads safetensors files and nothing else.

    Raises:
        ValueError: if they ask for pickles, or a folder holds nothing else.
    """
    path = Path(str(name_or_path), kwargs.get("subfolder", ""))
    if path.is_file():
        pickles = [path] if path.suffix != ".safetensors" else []
    else:
        pickles = [] if any(path.glob("*.safetensors")) else sorted(path.glob("pytorch_model*.bin"))
    if pickles or kwargs.get("use_safetensors") is False:
        raise ValueError(
            f"Weights must be in safetensors files: unpickling can run whatever a file says. Got "
            f"{pickles[0] if pickles else '`use_safetensors=False`'}. If you trust a dense checkpoint, load it with "
            "the stock class of transformers and save it anew."
        )
    return {**kwargs, "use_safetensors": True}


def check_readable(folder: Any) -> None:
    """
    Open every safetensors file of a folder.

    Raises:
        ValueError: naming the first that is none.
    """
    for file in sorted(Path(str(folder)).glob("*.safetensors")):
        with open_weights(file):
            pass


def _tensors_of(state_dict: Mapping[str, torch.Tensor] | None, files: list[str] | None) -> list[Held]:
    if state_dict is not None:
        return [Held(key, tuple(tensor.shape), GIVEN) for key, tensor in state_dict.items()]
    held = []
    for file in map(str, files or ()):
        with open_weights(file) as weights:
            held += [Held(key, tuple(weights.get_slice(key).get_shape()), file) for key in list(weights.keys())]
    return held


def _describe(files: list[str]) -> str:
    """The file of a checkpoint; of several, the index that lists them."""
    if len(files) == 1:
        return str(files[0])
    folder = Path(files[0]).parent
    return str(next(iter(sorted(folder.glob("*.index*.json"))), folder))


def _report(model: PreTrainedModel, tensors: list[Held], source: str, load_config: Any) -> tuple[Report, int]:
    """What a checkpoint holds of `model`, and the number of its layers that are dense there and sparse here."""
    expected = model.state_dict()
    renamings = [transform for transform in load_config.weight_mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in load_config.weight_mapping if isinstance(transform, WeightConverter)]
    layers, shapes = sparse_layers(model), {name: tuple(tensor.shape) for name, tensor in expected.items()}
    held, unplaced, converted = dict[str, Held](), list[tuple[str, str]](), 0
    for item in tensors:
        # The loader's own rules: old names, dense weights, with or without the prefix of the base model.
        name, pattern = rename_source_key(item.key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected:
            unplaced += [(item.key, item.place)] if item.key.endswith(".values") else []
            continue
        held[name] = item
        if pattern is not None:  # one dense weight becomes `values` and `block_index`
            layer = name.rpartition(".")[0]
            shapes[name] = layers[layer].shape
            index = f"{layer}.block_index"
            held[index] = item._replace(shape=shapes[index])
            converted += 1
    if all(in_head(model, name) for name in held):
        few = ", ".join(f"`{item.key}`" for item in tensors[:3]) or "nothing"
        raise ValueError(
            f"A checkpoint must be of the model that is loaded. Got {source} with none of {type(model).__name__}: it "
            f"holds {few}. Load a BERT or a DynSparse BERT."
        )
    new_heads = load_config.ignore_mismatched_sizes
    return Report(source, held, shapes, unplaced=unplaced, new_heads=new_heads), converted
