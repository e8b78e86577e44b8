"""`Problem`: what the speed of a product depends on."""

from dataclasses import dataclass

import torch

from .reference import Shape


@dataclass(frozen=True)
class Problem:
    """
    What the speed of a backend depends on.

    Args:
        device (`torch.device`): its type, without a number.
        dtype (`torch.dtype`): of input and values.
        block_shape (`tuple[int, int]`): rows and columns of a block.
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        nnzb (`int`): active blocks.
        tokens (`int`): rows of the input, rounded up to a power of two.
        backward (`bool`): all gradients, or the output.
        threads (`int`): of the CPU; 0 on other devices.
    """

    device: torch.device
    dtype: torch.dtype
    block_shape: Shape
    shape: Shape
    nnzb: int
    tokens: int
    backward: bool
    threads: int

    @classmethod
    def make(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        block_shape: Shape,
        shape: Shape,
        nnzb: int,
        tokens: int,
        backward: bool,
    ) -> "Problem":
        """A problem with the tokens rounded and the threads that PyTorch uses now."""
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        rounded = 1 << max(0, tokens - 1).bit_length()
        return cls(torch.device(device.type), dtype, block_shape, shape, nnzb, rounded, backward, threads)

    @property
    def density(self) -> float:
        """Share of active positions."""
        return self.nnzb * self.block_shape[0] * self.block_shape[1] / (self.shape[0] * self.shape[1])

    def __str__(self) -> str:
        (out_features, in_features), (rows, columns) = self.shape, self.block_shape
        dtype, where = str(self.dtype).removeprefix("torch."), f"{self.threads} threads" if self.threads else "device"
        return (
            f"{'backward' if self.backward else 'forward'} {out_features}x{in_features} nnzb={self.nnzb} of "
            f"{rows}x{columns} {dtype} tokens={self.tokens} {self.device.type} {where}"
        )
