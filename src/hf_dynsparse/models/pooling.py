"""From the hidden states of a sentence to its embedding."""

from collections.abc import Callable

import torch


def mean(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean over tokens that are not padding."""
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def first(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The state of the first token."""
    return states[:, 0]


def largest(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The largest value of each hidden unit over tokens that are not padding."""
    return states.masked_fill(~real, torch.finfo(states.dtype).min).amax(1)


# (states, whether a token is none of padding, of shape (batch, sequence, 1)) -> embeddings.
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": mean,
    "cls": first,
    "max": largest,
}


def pool(states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    The embeddings of sentences.

    Args:
        states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of the last layer.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`): 0 for padding.
        pooling (`str`): a key of `POOLINGS`.

    Returns:
        `torch.Tensor` of shape `(batch, hidden_size)`, in float32.
    """
    return POOLINGS[pooling](states.float(), (attention_mask != 0)[..., None])
