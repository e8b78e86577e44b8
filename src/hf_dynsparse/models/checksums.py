"""Checksums in weight files: what `from_pretrained` loads is what was saved, or an error says which tensor is not."""

import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._transformers import HfQuantizer, remove_tied_weights_from_state_dict, str_to_torch_dtype


logger = logging.getLogger(__name__)

# Entry of the metadata of a safetensors file: `name:checksum` of every tensor of the checkpoint, over all its files.
# CRC-32 finds every accident but one in four thousand million, at several GB/s. It does not tell who wrote a file:
# whoever edits tensors on purpose can write their checksum too, and no hash without a key would change that.
CHECKSUMS = "crc32"

# What of a layer is never in floating point, by the last part of its name.
INTEGER_TENSORS = {
    "block_index": torch.int32,
    "block_code": torch.uint8,
    "int8_values": torch.int8,
    "int32_bias": torch.int32,
    "input_zero_point": torch.uint8,
}


def with_checksums(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    What `save_pretrained` writes of `state_dict`, and metadata with the checksums of just that; none if a part of the
    weights is elsewhere, on the disk or on other ranks.
    """
    unsaved = model._keys_to_ignore_on_save or ()
    written = once_each(model, {name: tensor for name, tensor in state_dict.items() if name not in unsaved})
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in written.values()):
        return written, {}
    return written, {CHECKSUMS: " ".join(f"{name}:{_checksum(tensor)}" for name, tensor in written.items())}


def once_each(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A state in which no two tensors share memory, and which loads. A tensor that the configuration ties to another is
    left out: loading ties it again. One that only happens to be shared, as the biases of a head are once its tokens
    have been resized, becomes a copy: nobody would know where to get it from.
    """
    state = {**state_dict, **{old: state_dict[new] for old, new in _outgrown_biases(model, state_dict)}}
    once = remove_tied_weights_from_state_dict(dict(state), model)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in state.keys() - once.keys() - tied.keys():
        once[name] = state[name].clone()
    return {name: once[name] for name in state if name in once}


def separate_(model: PreTrainedModel) -> None:
    """Make the parameters of a model what `once_each` would save of them, for transformers' own way to save it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    shared, seen = {*tied, *tied.values()}, set[int]()
    outgrown = dict(_outgrown_biases(model, parameters))
    for name, parameter in parameters.items():
        if name in outgrown or (id(parameter) in seen and name not in shared):
            owner, _, leaf = name.rpartition(".")
            new = parameters[outgrown.get(name, name)]
            setattr(model.get_submodule(owner), leaf, nn.Parameter(new.detach().clone(), new.requires_grad))
        seen.add(id(parameter))


def verify_weights(files: Iterable[str | Path]) -> None:
    """
    Check that the safetensors files of one checkpoint hold what was saved: each tensor, and all of them. A checkpoint
    with sparse layers but without checksums, which other tools write, passes with a line in the log if its dtypes are
    right.

    Raises:
        ValueError: naming tensor and file.
    """
    saved: dict[str, str] | None = None
    found, first = set[str](), ""
    for file in map(str, files):
        with open_weights(file) as weights:
            here = _read_checksums(weights.metadata() or {})
            if first and here != saved:
                raise ValueError(
                    f"All files of a checkpoint must come from one save. Got {file} and {first}, which list different "
                    f"checksums. {_FIX}"
                )
            saved, first = here, first or file
            for name in list(weights.keys()):
                found.add(name)
                code = weights.get_slice(name).get_dtype()
                check_dtype(name, str_to_torch_dtype.get(code, code), file)
                if here is not None:
                    _verify(name, weights.get_tensor(name), here, file)
    if saved is None:
        if any(name.endswith((".block_index", ".int8_values")) for name in found):
            logger.warning("%s carries no checksums: names, shapes and layouts are all that can be checked.", first)
    elif lost := saved.keys() - found:
        raise ValueError(
            f"A checkpoint must hold every tensor that was saved. Got {first} without `{min(lost)}`, which it lists. "
            f"{_FIX}"
        )


def check_dtype(name: str, dtype: torch.dtype | str, place: str) -> None:
    """
    Check the dtype of a tensor in a checkpoint, which the loader would cast without a word.

    Raises:
        ValueError: naming tensor and place, if an index is not int32, a weight not in floating point, or a tensor of
            an int8 layer not what it must be.
    """
    leaf = name.rpartition(".")[2]
    if leaf in INTEGER_TENSORS:
        right, wanted = dtype == INTEGER_TENSORS[leaf], str(INTEGER_TENSORS[leaf])
    elif name.endswith((".values", ".weight", ".bias")):
        right, wanted = isinstance(dtype, torch.dtype) and dtype.is_floating_point, "floating point"
    else:
        return
    if not right:
        raise ValueError(f"`{name}` must be of dtype {wanted}. Got {dtype} in {place}. {_FIX}")


@contextmanager
def open_weights(file: str | Path) -> Iterator[Any]:
    """
    `safe_open` of a file; nothing is read but its header.

    Raises:
        ValueError: naming the file, if it cannot be read, then or within the context.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"A checkpoint must consist of whole safetensors files. Got {file}, which cannot be read: {error}. Copy "
            "or download it again."
        ) from error


def warn_of_nonfinite(model: nn.Module, source: str) -> None:
    """Log the first weight of a loaded model that holds NaN or infinity: it is what was saved, but of no use."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            logger.warning("`%s` in %s holds NaN or infinity, and so will what the model puts out.", name, source)
            return


class ChecksumWriter(HfQuantizer):
    """
    Quantises nothing: `save_pretrained` takes metadata for its files from `model.hf_quantizer` only. Files are so
    written once, and whatever they are called, split into or pushed to, with their checksums.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): what is to be saved.
    """

    is_trainable = True

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.state_dict = state_dict

    def is_serializable(self) -> bool:
        """It does not stand in the way."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """See `with_checksums`."""
        return with_checksums(model, self.state_dict)


def order_metadata(folder: str | Path) -> None:
    """
    Bring the metadata of the weight files in `folder` into one order: safetensors writes them in a random one, and
    equal models shall give equal files.
    """
    for file in Path(folder).glob("*.safetensors"):
        with file.open("r+b") as content:
            # Eight bytes that hold the length of the header, and the header: JSON padded with blanks.
            saved = content.read(int.from_bytes(content.read(8), "little"))
            header = json.loads(saved)
            if CHECKSUMS in header.get("__metadata__", {}):
                header["__metadata__"] = dict(sorted(header["__metadata__"].items(), reverse=True))  # "format" first
                ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(saved))
                if ordered != saved and len(ordered) == len(saved):
                    content.seek(8)
                    content.write(ordered)


_FIX = "It is damaged, or was changed afterwards: load an intact one."


def _outgrown_biases(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """
    Biases of a head without use, each with the one that is used: where the configuration does not tie them, resizing
    the tokens of a RoBERTa leaves one of them behind, in a size that no model would load.
    """
    for new, old in (model._tied_weights_keys or {}).items():
        if old.endswith("bias") and {new, old} <= tensors.keys() and tensors[new].shape != tensors[old].shape:
            yield old, new


def _verify(name: str, tensor: torch.Tensor, saved: Mapping[str, str], file: str) -> None:
    expected, got = saved.get(name), _checksum(tensor)
    if expected is None:
        raise ValueError(f"A checkpoint must hold what was saved and no more. Got `{name}` in {file}. {_FIX}")
    if got != expected:
        raise ValueError(f"`{name}` must be as it was saved, with checksum {expected}. Got {got} in {file}. {_FIX}")


def _checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{zlib.crc32(data, zlib.crc32(f'{tensor.dtype} {list(tensor.shape)}'.encode())):08x}"


def _read_checksums(metadata: Mapping[str, str]) -> dict[str, str] | None:
    if CHECKSUMS not in metadata:
        return None
    pairs = [pair.rpartition(":") for pair in metadata[CHECKSUMS].split()]
    return {name: checksum for name, _, checksum in pairs}
