"""Which implementation serves a product: an ordered table, a pure choice with reasons, and an override."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import native, reference, tiled


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """
    One implementation of the two products.

    Args:
        name (`str`): how `use_backend` calls it.
        summary (`str`): one line for logs.
        why_not (`Callable`): `(device, dtype, block_shape) -> str | None`: why it cannot serve, or `None` if it can.
        dds, sdd (`Callable`): the products, with the signatures of `hf_dynsparse.ops.reference`.
        break_even (`Callable`): `block_shape -> density` above which a dense product is faster.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device, torch.dtype, tuple[int, int]], str | None]
    dds: Callable[..., torch.Tensor]
    sdd: Callable[..., torch.Tensor]
    break_even: Callable[[tuple[int, int]], float] = lambda block_shape: 1.0


# In order of preference.
BACKENDS: tuple[Backend, ...] = (
    Backend("native", "compiled kernels of the processor", native.why_not, native.dds, native.sdd, native.break_even),
    Backend("tiled", "dense tiles of block rows, plain PyTorch", tiled.why_not, tiled.dds, tiled.sdd),
    Backend("reference", "whole dense weight, for tests", reference.why_not, reference.dds, reference.sdd),
)

# Of the process, not of a context: autograd runs backward passes on threads of its own.
_override: str | None = None
_logged: set[tuple[str, str, torch.dtype, tuple[int, int]]] = set()


def choose_backend(
    device: torch.device, dtype: torch.dtype, block_shape: tuple[int, int], density: float = 0.0
) -> Backend:
    """
    The first backend that can serve and is not slower than a dense product at this density, or the one named by
    `use_backend`. What was chosen and why is logged once.

    Raises:
        ValueError: if none can; the message gives each backend's reason.
    """
    reasons: dict[str, str] = {}
    for backend in BACKENDS:
        if _override not in (None, backend.name):
            continue
        reason = backend.why_not(device, dtype, block_shape)
        limit = backend.break_even(block_shape)
        if reason is None and _override is None and density > limit:
            reason = f"slower than dense above density {limit}"
        if reason is None:
            _log_choice(backend, device, dtype, block_shape, reasons)
            return backend
        reasons[backend.name] = reason
    raise ValueError(
        f"No backend serves {block_shape[0]} x {block_shape[1]} blocks of {dtype} on {device}: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Serve every product of the process inside the `with` block by one backend, for tests and debugging.

    Raises:
        ValueError: if no backend has that name.
    """
    if name not in [backend.name for backend in BACKENDS]:
        raise ValueError(
            f"`use_backend` takes one of {', '.join(backend.name for backend in BACKENDS)}. Got {name!r}."
        )
    global _override
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def _log_choice(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    block_shape: tuple[int, int],
    reasons: dict[str, str],
) -> None:
    key = (backend.name, device.type, dtype, block_shape)
    if key not in _logged:
        _logged.add(key)
        passed = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
        logger.info(
            "%s x %s blocks of %s on %s: backend %r (%s)%s",
            *block_shape,
            dtype,
            device.type,
            backend.name,
            backend.summary,
            passed,
        )
