"""What PyTorch may want of a product beside its output and gradients, and who asks."""

import torch
from torch.autograd import forward_ad


_RECORDING = torch._C._TorchDispatchModeKey.PROXY


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing but output and gradients is asked for: no transform is at work, and no tracer."""
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or type(tensor) is not torch.Tensor  # a subclass, such as a fake tensor of a tracer
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(_RECORDING) is not None
    )


def is_transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, and wants tangents or products of a batch of operands."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(instead: str) -> None:
    """
    To be called by a custom operator: in forward mode it would lose the tangents without a word.

    Raises:
        NotImplementedError: in forward mode, unless a `torch.autograd.Function` around the operator sees to them.
    """
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        raise NotImplementedError(
            f"Forward-mode differentiation must call {instead}, in eager mode. Got a call of the operator itself, "
            "which PyTorch gives no tangents. Leave `torch.compile` out."
        )
