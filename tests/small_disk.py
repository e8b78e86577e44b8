"""A disk that ends at a byte of one's choice: real errors of the system, wherever a save writes."""

import builtins
import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils


@contextmanager
def small_disk(limit: Callable[[Path], int]) -> Iterator[None]:
    """
    Within the `with` block a file that is begun gets no more than `limit(path)` bytes. The limit is the process's, and
    for one file, so it is set anew whenever one is begun, be it by Python, torch or safetensors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(function: Callable[..., Any], position: int) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:
            if len(args) > position and isinstance(args[position], str | Path):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit(Path(args[position])), hard))
            return function(*args, **kwargs)

        return begin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", watch(open, 0))
        patch.setattr(io, "open", watch(io.open, 0))
        patch.setattr(torch, "save", watch(torch.save, 1))
        patch.setattr(modeling_utils, "safe_save_file", watch(modeling_utils.safe_save_file, 1))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
