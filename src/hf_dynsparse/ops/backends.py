"""The implementations of the products: a table, each with what it can serve."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..blocks.layout import BlockLayout
from . import gather, native, reference, tiled, triton, workspace
from .reference import Shape


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Backend:
    """
    One implementation of the products.

    Args:
        name (`str`): how `use_backend` calls it.
        summary (`str`): one line for logs.
        why_not (`Callable`): `(device, dtype, block_shape) -> str | None`: why it cannot serve, or `None` if it can.
        dds, sdd (`Callable`): dense = dense x sparse and sparse = dense x dense; see `hf_dynsparse.ops.reference`.
            They trust the sizes that they are given: operands are compared at the operator (`ops/checks.py`).
        break_even (`Callable`): `(device, block_shape) -> density` above which a dense product is taken for faster
            while nothing has been timed.
        device (`str`): type of the device it was made for, or `"any"`.
        fused_backward (`Callable`, *optional*): what `backward` calls instead of the two products.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device, torch.dtype, Shape], str | None]
    dds: Callable[..., torch.Tensor]
    sdd: Callable[..., torch.Tensor]
    break_even: Callable[[torch.device, Shape], float] = lambda device, block_shape: 1.0
    fused_backward: Callable[..., Gradients] | None = None
    device: str = "any"

    def backward(
        self,
        grad: torch.Tensor,
        input: torch.Tensor,
        values: torch.Tensor,
        layout: BlockLayout,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """
        The gradients of a layer.

        Args:
            grad (`torch.Tensor` of shape `(tokens, out_features)`): gradient of the output.
            input (`torch.Tensor` of shape `(tokens, in_features)`): what the layer was given.
            values (`torch.Tensor` of shape `(nnzb, rows, columns)`), layout: the weight.
            wanted (`tuple[bool, bool, bool]`): whether those of input, values and bias are wanted.

        Returns:
            Gradients of input, values and bias; `None` where not wanted.
        """
        if self.fused_backward is not None:
            return self.fused_backward(grad, input, values, layout, wanted)
        return (
            self.dds(grad, values, layout, None, True) if wanted[0] else None,
            self.sdd(grad, input, layout) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


# By name, in order of preference while nothing has been timed.
BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """
    Add an implementation of the products, also from outside the package: it is timed beside the others from the next
    product of a new kind on. While nothing is timed, those of the package go first.

    Raises:
        ValueError: if the name is taken.
    """
    if (taken := BACKENDS.get(backend.name)) is not None:
        raise ValueError(
            f"A backend must have a name of its own. Got {backend.name!r}, which is taken by: {taken.summary}. Choose "
            "another."
        )
    BACKENDS[backend.name] = backend


for _backend in (
    Backend(
        "native",
        "compiled kernels of the CPU",
        native.why_not,
        native.dds,
        native.sdd,
        native.break_even,
        native.backward,
        device="cpu",
    ),
    Backend(
        "triton",
        "compiled kernels of the GPU",
        triton.why_not,
        triton.dds,
        triton.sdd,
        triton.break_even,
        device="cuda",
    ),
    Backend("gather", "gathered blocks, plain PyTorch", gather.why_not, gather.dds, gather.sdd, gather.break_even),
    Backend("workspace", "a transient dense weight", workspace.why_not, workspace.dds, workspace.sdd),
    Backend("tiled", "dense tiles, never a whole dense weight", tiled.why_not, tiled.dds, tiled.sdd),
    Backend("reference", "the slow truth of the tests", reference.why_not, reference.dds, reference.sdd),
):
    register_backend(_backend)
