"""What a saved model holds, from the headers and block indices of its files alone: no weight is read."""

import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import torch
from fsspec import AbstractFileSystem  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from huggingface_hub import HfFileSystem, is_offline_mode, snapshot_download
from transformers import PreTrainedModel

from .._transformers import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from ..blocks.layout import BlockLayout
from ..checkpoints.loading import empty_model, pinned, shard_names, split_revision
from ..compress.int8.index_coding import decode_index
from ..compress.int8.layers import Int8BlockSparseLinear
from ..compress.int8.quantizer import int8_modules
from ..files import check_object
from ..models.bert.configuration_dynsparse_bert import count_units
from ..nn.linear import TRAINING_BUFFER, sparse_layers
from .layers import WEIGHT_LEAVES, LayerFacts, SparseTotals
from .tables import plain_table


# The longest header that the format allows.
MAX_HEADER_BYTES = 100_000_000
# What is fetched of a remote file at a time: headers and block indices are mostly smaller.
FETCHED_BYTES = 2**20


class Place(NamedTuple):
    """Where a tensor stands in a file, in bytes."""

    dtype: str
    shape: list[int]
    begin: int
    bytes: int


@dataclass(frozen=True)
class SavedLayer(LayerFacts):
    """
    A sparse layer of a saved model.

    Args:
        layout (`BlockLayout`): its topology.
        coverage (`float`, *optional*): DOF coverage so far, if the file is of a run that has not ended.
        dtype (`str`): of its values, as safetensors calls it, such as `"F32"` or `"I8"`.
        code_bits (`int`, *optional*): of the symbols that its block index is coded in, if it is int8.
    """

    layout: BlockLayout
    coverage: float | None
    dtype: str
    code_bits: int | None = None


@dataclass(frozen=True)
class CheckpointReport(SparseTotals):
    """
    A saved model, as [`inspect_checkpoint`] finds it; `print` shows it as a table.

    Args:
        source (`str`): folder, file or repository.
        architecture (`str`): the class that was saved.
        layers (`tuple[SavedLayer, ...]`): its sparse layers; none if it is dense.
        files (`dict[str, int]`): bytes of each file of weights.
        dense_bytes (`int`): what the tensors of the same model would take if it were dense.
        int8 (`dict[str, int]`): bytes of its dense int8 matrices, embeddings included, by name.
        units (`dict[str, list[int]]`): attention heads and intermediate neurons by layer; empty if all have as many.
    """

    source: str
    architecture: str
    layers: tuple[SavedLayer, ...]
    files: dict[str, int]
    dense_bytes: int
    units: dict[str, list[int]] = field(default_factory=dict)
    int8: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files of weights."""
        return sum(self.files.values())

    @property
    def is_int8(self) -> bool:
        """Whether it holds int8 matrices, sparse or dense."""
        return bool(self.int8) or any(layer.code_bits for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: all but the block indices."""
        names = ("name", "shape", "block_shape", "nnzb", "density", "bytes", "dense_bytes")
        layers = [
            {name: getattr(layer, name) for name in (*names, "coverage", "dtype", "code_bits")}
            | {"shape": list(layer.shape), "block_shape": list(layer.block_shape)}
            for layer in self.layers
        ]
        totals = {"sparsity": self.sparsity, "nnz": self.nnz, "positions": self.positions}
        sizes = {"bytes": self.bytes, "dense_bytes": self.dense_bytes, "files": self.files}
        about = {"source": self.source, "architecture": self.architecture, "units": self.units, "int8": self.int8}
        return {**about, **totals, **sizes, "layers": layers}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.architecture}, " + ("sparse" if self.layers else "dense: no sparse layers")]
        lines += [f"{unit} by layer: {', '.join(map(str, counts))}" for unit, counts in self.units.items()]
        if self.layers:
            lines += ["", self._table(), ""]
            lines.append(
                f"{len(self.layers)} sparse layers, {self.nnz:,} of {self.positions:,} entries active, "
                f"sparsity {self.sparsity:.4f}"
            )
        if self.int8:
            lines.append(f"{len(self.int8)} dense int8 matrices, {sum(self.int8.values()):,} bytes")
        lines += [f"{name}: {size:,} bytes" for name, size in self.files.items()]
        if self.layers or self.int8:
            dense = "dense model" + " in float32" * self.is_int8
            lines.append(f"{self.bytes / self.dense_bytes:.1%} of the {self.dense_bytes:,} bytes of the {dense}")
        return "\n".join(lines)

    def _table(self) -> str:
        tracked = any(layer.coverage is not None for layer in self.layers)
        extra = [*["coverage"] * tracked, *["dtype", "code bits"] * self.is_int8]
        rows = [["layer", "shape", "block", "nnzb", "density", "bytes", "of dense", *extra]]
        for layer in self.layers:
            sizes = f"{layer.bytes:,}", f"{layer.bytes / layer.dense_bytes:.3f}"
            coverage = ["" if layer.coverage is None else f"{layer.coverage:.4f}"] * tracked
            kind = [layer.dtype, str(layer.code_bits or "")] * self.is_int8
            rows.append([*layer.cells(), *sizes, *coverage, *kind])
        return plain_table(rows)


def inspect_checkpoint(source: str | Path) -> CheckpointReport:
    """
    Say what a saved model holds: its sparse layers, their topologies and sizes. Headers and block indices are read, of
    a repository too, and nothing else.

    Args:
        source (`str` or `Path`): a folder, whole or in shards, of a finished model or a checkpoint of a run; one
            safetensors file, with its config.json beside; or a repository of the Hub as `"user/name"` or
            `"user/name@revision"`.

    Raises:
        FileNotFoundError: if there is no such model, or it has no safetensors files.
        ValueError: if a file is cut off or damaged, or a block index is out of range or repeated.

    Example:
        ```python
        >>> report = inspect_checkpoint("runs/medium-s90-b16")
        >>> report.layers[0].layout.to_mask()  # which blocks are active
        ```
    """
    given, source = str(source), pinned(source) if not Path(source).is_file() else source
    filesystem, folder, files = _locate(source)
    config_of = folder if isinstance(filesystem, LocalFileSystem) else source
    model = empty_model(config_of)
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    saved: dict[str, bytes] = {}
    for name in files or _weight_files(filesystem, folder):
        path = f"{folder}/{name}"
        sizes[name] = filesystem.size(path)
        with filesystem.open(path, "rb", block_size=FETCHED_BYTES) as file:
            held = read_header(file, sizes[name], path)
            saved |= _read_indices(file, held)
        places |= held
    described = sparse_layers(model)
    _check_described(model, places, given)
    layers = tuple(
        _saved_int8_layer(name, layer, places, saved, given)
        if isinstance(layer, Int8BlockSparseLinear)
        else _saved_layer(name, layer.shape, places, saved, given)
        for name, layer in described.items()
        if not files or any(f"{name}.{leaf}" in places for leaf in WEIGHT_LEAVES)
    )
    matrices = {key.rpartition(".")[0]: place.bytes for key, place in places.items() if key.endswith(".int8_values")}
    int8 = {name: size for name, size in matrices.items() if name not in described}
    lost = int8_modules(model).keys() - described.keys() - int8.keys()
    if lost and not files:
        raise ValueError(
            f"A saved model must hold what config.json describes. Got {given} without `{min(lost)}.int8_values`. Load "
            "an intact checkpoint."
        )
    rest = sum(place.bytes for place in places.values()) - sum(layer.bytes for layer in layers) - sum(int8.values())
    dense_bytes = rest + sum(layer.dense_bytes for layer in layers) + 4 * sum(int8.values())
    architecture, units = type(model).__name__, count_units(model.config)
    return CheckpointReport(given, architecture, layers, sizes, dense_bytes, units, int8)


def _locate(source: str | Path) -> tuple[AbstractFileSystem, str, list[str]]:
    """A file system, the folder of the model there, and the file if one was named."""
    path = Path(source)
    if path.is_file():
        return LocalFileSystem(), str(path.parent), [path.name]
    if path.is_dir():
        return LocalFileSystem(), str(path), []
    name, revision = split_revision(source)
    if is_offline_mode():
        return LocalFileSystem(), snapshot_download(name, revision=revision), []
    return HfFileSystem(), f"{name}@{quote(revision, safe='')}", []


def _weight_files(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    if filesystem.isfile(f"{folder}/{SAFE_WEIGHTS_NAME}"):
        return [SAFE_WEIGHTS_NAME]
    index = f"{folder}/{SAFE_WEIGHTS_INDEX_NAME}"
    if filesystem.isfile(index):
        return shard_names(filesystem.cat_file(index), index)
    raise FileNotFoundError(
        f"A saved model must hold {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}. Got neither in {folder}. Load it "
        "with transformers and save it again."
    )


def read_header(file: BinaryIO, size: int, path: str) -> dict[str, Place]:
    """
    Where the tensors of a safetensors file stand, by name. Its first 8 bytes say how long the JSON is that follows.
    The parser of `huggingface_hub` says neither where the data begin nor whether a file is cut off.

    Args:
        file (`BinaryIO`): the file, at its start.
        size (`int`): its bytes.
        path (`str`): what to call it in an error.

    Raises:
        ValueError: if it is no safetensors file, or cut off.
    """
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        places = {key: _place(entry, 8 + length) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"A file of weights must be a safetensors file. Got {path}, which is none.") from error
    if max((place.begin + place.bytes for place in places.values()), default=0) > size:
        raise ValueError(f"A file of weights must be whole. Got {path}, which is cut off. Copy or download it again.")
    return places


def _place(entry: dict[str, Any], start: int) -> Place:
    kinds = {"dtype": str, "shape": list[int], "data_offsets": list[int]}
    dtype, shape, (begin, end) = (check_object(entry, "a header", kinds)[name] for name in kinds)
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"`data_offsets` must be in order. Got {entry}.")
    return Place(dtype, shape, start + begin, end - begin)


def _read_indices(file: BinaryIO, places: dict[str, Place]) -> dict[str, bytes]:
    """Block indices and what a run records about exploration, in the order of the file: neighbours come together."""
    saved = {}
    for key, place in sorted(places.items(), key=lambda item: item[1].begin):
        if key.endswith((".block_index", ".block_code", ".ever_active")):
            file.seek(place.begin)
            saved[key] = file.read(place.bytes)
    return saved


def _check_described(model: PreTrainedModel, places: dict[str, Place], source: str) -> None:
    """Whether every layer with values or an index in the files is sparse or int8 by config.json too."""
    known = {*sparse_layers(model), *int8_modules(model)}
    of_model = model.state_dict().keys()
    for key in places:
        owner, _, leaf = key.rpartition(".")
        if leaf in WEIGHT_LEAVES and owner not in known and key not in of_model:
            raise ValueError(
                f"config.json must describe the weights. Got {source} with `{owner}`, which a "
                f"{type(model).__name__} of that configuration does not have as such. Load an intact checkpoint."
            )


def _saved_layer(
    name: str, shape: tuple[int, int], places: dict[str, Place], saved: dict[str, bytes], source: str
) -> SavedLayer:
    recorded = [key for key in places if key.startswith(f"{name}.") and re.search(TRAINING_BUFFER, key)]
    keys = [key for key in (f"{name}.values", f"{name}.block_index", *recorded) if key in places]
    here = {key.removeprefix(f"{name}."): places[key] for key in keys}
    values, index = here.get("values"), here.get("block_index")
    if (
        values is None
        or index is None
        or (index.dtype, index.shape, index.bytes) != ("I32", values.shape[:1], 4 * prod(values.shape[:1]))
        or len(values.shape) != 3
        or 0 in values.shape
    ):
        found = {leaf: (place.dtype, place.shape) for leaf, place in here.items()}
        raise ValueError(
            f"`{name}` must have `values` of shape [nnzb, rows, columns] and `block_index` of dtype I32 and shape "
            f"[nnzb]. Got {found} in {source}. Name the whole checkpoint, or load an intact one."
        )
    ids = torch.frombuffer(bytearray(saved[f"{name}.block_index"]), dtype=torch.int32)
    layout = BlockLayout(ids, shape, (values.shape[1], values.shape[2]))
    layout.validate(f"`{name}` in {source}")
    explored = saved.get(f"{name}.ever_active")
    coverage = None if explored is None else int.from_bytes(explored, "little").bit_count() / layout.num_blocks
    sizes = sum(place.bytes for place in here.values()), prod(shape) * values.bytes // prod(values.shape)
    return SavedLayer(name, shape, layout.block_shape, layout.nnzb, *sizes, layout, coverage, values.dtype)


def _saved_int8_layer(
    name: str, layer: Int8BlockSparseLinear, places: dict[str, Place], saved: dict[str, bytes], source: str
) -> SavedLayer:
    values, code = places.get(f"{name}.int8_values"), places.get(f"{name}.block_code")
    described = [layer.nnzb, *layer.block_shape]
    if values is None or code is None or (values.dtype, values.shape, code.dtype) != ("I8", described, "U8"):
        raise ValueError(
            f"`{name}` must have `int8_values` of dtype I8 and the shape that config.json gives, {described}, and "
            f"`block_code` of dtype U8. Got {values} and {code} in {source}. Load an intact checkpoint."
        )
    bytes_of_code = torch.frombuffer(bytearray(saved[f"{name}.block_code"]), dtype=torch.uint8)
    ids = decode_index(bytes_of_code, layer.code_bits, layer.nnzb, layer.num_blocks, f"`{name}` in {source}")
    about = name, layer.shape, layer.block_shape, layer.nnzb, values.bytes + code.bytes, 4 * prod(layer.shape)
    return SavedLayer(*about, BlockLayout(ids, layer.shape, layer.block_shape), None, "I8", layer.code_bits)
