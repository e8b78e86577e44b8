"""
Dropout on a CPU without its cost: the mask is a hash of a seed and of each entry's place.

PyTorch draws every entry of a mask from one serial generator, which takes as long as a sparse product. Here only the
seed comes from that generator, so saving and restoring its state repeats a run, and no mask is kept for the backward
pass.
"""

import torch

from . import native
from .transforms import is_transformed, refuse_tangents


@torch.library.custom_op("hf_dynsparse::dropout", mutates_args=())
def seeded_dropout(input: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """
    `input` with entries zeroed with probability `p` and the others divided by `1 - p`.

    Args:
        input (`torch.Tensor`, float32 or bfloat16, on the CPU).
        seed (`torch.Tensor` of shape `()`, `torch.int64`): the same seed zeroes the same places.
        p (`float`): in (0, 1).
    """
    refuse_tangents("`torch.nn.Dropout`")
    _check(input, seed, p)
    return native.dropout(input, int(seed), p)


def _check(input: torch.Tensor, seed: torch.Tensor, p: float) -> None:
    if input.dtype not in native.DTYPES or input.device.type not in ("cpu", "meta") or input.layout != torch.strided:
        raise ValueError(
            "Seeded dropout takes float32 or bfloat16 on the CPU. Got "
            f"{input.dtype} on {input.device} ({input.layout}). Use `torch.nn.functional.dropout`."
        )
    if seed.dtype != torch.int64 or seed.dim() or seed.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"`seed` must be one int64 on the CPU, of shape (). Got {seed.dtype} of shape {tuple(seed.shape)} "
            f"on {seed.device}. Draw it with `torch.randint(..., ())`."
        )
    if not 0.0 < p < 1.0:
        raise ValueError(f"`p` must lie in (0, 1). Got {p}. Use `torch.nn.functional.dropout`, which takes 0 and 1.")


@seeded_dropout.register_fake
def _(input, seed, p):  # type: ignore[no-untyped-def]
    refuse_tangents("`torch.nn.Dropout`")
    _check(input, seed, p)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (seed,) = ctx.saved_tensors
    return seeded_dropout(grad.contiguous(), seed, ctx.p), None, None


seeded_dropout.register_autograd(_backward, setup_context=_setup_context)


def dropout(input: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """`torch.nn.functional.dropout`, by a seeded mask where the kernels of the CPU can: other draws."""
    possible = input.device.type == "cpu" and input.dtype in native.DTYPES and has_kernels()
    # What `torch.func` and forward mode need to know of dropout, PyTorch knows of its own.
    transformed = not torch.compiler.is_compiling() and is_transformed()
    if not training or not 0.0 < p < 1.0 or not possible or transformed:
        return torch.nn.functional.dropout(input, p, training)
    return seeded_dropout(input, draw_seed(), p)


def draw_seed() -> torch.Tensor:
    """A seed for `seeded_dropout`, of shape `()`, from the generator of PyTorch."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether the kernels of the CPU can run here."""
    return native.why_not(torch.device("cpu"), torch.float32, (1, 1)) is None
