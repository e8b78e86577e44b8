"""Statistics of a dense model in a file: the model is pruned by them again without text, to any sparsity."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import written_aside
from .statistics import Statistics


FORMAT = "hf_dynsparse statistics of a dense model"


@contextmanager
def writing_statistics(
    file: str | Path, groups: Sequence[Sequence[str]], weights: Mapping[str, torch.Tensor], sequences: int
) -> Iterator[Callable[[Statistics], None]]:
    """
    Gives what writes the statistics of one group after the other, in the order of `groups`: no more than one is held.
    The file is there when the block ends, and only then: safetensors, with positions (`count`), and sums of `y y'`
    (`gram`) and of `y` (`total`) in float64 by the first layer of each group.

    Args:
        groups (`Sequence[Sequence[str]]`): layers by name; those of a group read the same input.
        weights (`Mapping[str, torch.Tensor]`): of the layers, `(out_features, in_features)`, dense still.
        sequences (`int`): that passed through the model.

    Raises:
        FileExistsError: if there is such a file.
    """
    layers = {name: fingerprint(weights[name]) for group in groups for name in group}
    about = {"format": FORMAT, "sequences": str(sequences), "groups": json.dumps(groups), "layers": json.dumps(layers)}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for first, *_ in groups:
        width = weights[first].shape[1]
        for part, shape in {"count": [], "gram": [width, width], "total": [width]}.items():
            begin, end = end, end + 8 * prod(shape)
            place = {"dtype": "I64" if part == "count" else "F64", "shape": shape, "data_offsets": [begin, end]}
            header[f"{first}.{part}"] = place
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with written_aside(file) as path, path.open("wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)

        def write(statistics: Statistics) -> None:
            for tensor in (torch.tensor(statistics.count), statistics.gram, statistics.total):
                out.write(tensor.cpu().numpy().tobytes())

        yield write


class KeptStatistics:
    """
    Statistics from a file, of one group after the other: as they are of the dense model, of the pruned one too.

    Args:
        file (`str` or `Path`): that [`writing_statistics`] has written.
        weights (`Mapping[str, torch.Tensor]`): of the layers to be pruned, dense still.

    Raises:
        ValueError: if the file is another, or of another model.
    """

    def __init__(self, file: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.file, self.weights = file, weights
        try:
            with safe_open(file, "pt") as tensors:
                about = tensors.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"`statistics` must be a safetensors file. Got {file}: {error}.") from error
        if about.get("format") != FORMAT:
            raise ValueError(f"`statistics` must be a file that `save_statistics` has written. Got {file}.")
        self.groups, layers = json.loads(about["groups"]), json.loads(about["layers"])
        for name, weight in weights.items():
            if layers.get(name) != fingerprint(weight):
                raise ValueError(
                    f"`statistics` are of one dense model, and its weights. Got {file}, which has "
                    f"{'others' if name in layers else 'none'} of `{name}`. Keep those of this model by "
                    "`save_statistics`."
                )

    def __iter__(self) -> Iterator[tuple[Statistics, list[str]]]:
        with safe_open(self.file, "pt") as tensors:
            for group in self.groups:
                names = [name for name in group if name in self.weights]
                if names:
                    device = self.weights[names[0]].device
                    count, gram, total = (
                        tensors.get_tensor(f"{group[0]}.{part}") for part in ("count", "gram", "total")
                    )
                    yield Statistics.of_dense(int(count), gram.to(device), total.to(device)), names


def fingerprint(weight: torch.Tensor) -> list[int]:
    """Shape, and CRC-32 of the entries."""
    return [*weight.shape, zlib.crc32(weight.detach().float().cpu().contiguous().numpy().tobytes())]
