"""
A block index in few bytes: the gaps between ascending block ids, in symbols of 1, 2, 4 or 8 bits.

A symbol below the largest, `m = 2**bits - 1`, says how many positions are skipped before the next active block; `m`
skips `m` positions and says no more. With 1 bit this is a bitmap (0 for an active block), with more a run-length code
(arXiv:1510.00149, section 3.1). At density `d` a block takes about `bits * (1 + q**m / (1 - q**m))` bits, `q = 1 - d`.
"""

import torch


CODE_BITS = (1, 2, 4, 8)


def encode_index(block_index: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The shortest code of a block index.

    Args:
        block_index (`torch.Tensor` of shape `(nnzb,)`): different ids in ascending order.

    Returns:
        `tuple[torch.Tensor, int]`: the code, `torch.uint8` of shape `(bytes,)`, and the bits of a symbol.
    """
    ids = block_index.long()
    gaps = torch.diff(ids, prepend=ids.new_full((1,), -1)) - 1
    sizes = {bits: -(-int((gaps // (2**bits - 1) + 1).sum()) * bits // 8) for bits in CODE_BITS}
    bits = min(sizes, key=lambda candidate: sizes[candidate])
    return _pack(_symbols(gaps, 2**bits - 1), bits), bits


def decode_index(code: torch.Tensor, bits: int, nnzb: int, num_blocks: int, name: str = "the layer") -> torch.Tensor:
    """
    The block index that `encode_index` was given, `torch.int32` of shape `(nnzb,)`.

    Raises:
        ValueError: naming the layer, if the code does not hold `nnzb` ids below `num_blocks`.
    """
    longest = 2**bits - 1
    symbols = _unpack(code, bits)
    ends = symbols != longest
    ids = torch.where(ends, symbols + 1, longest).cumsum(0)[ends] - 1
    if ids.numel() != nnzb or (nnzb and int(ids[-1]) >= num_blocks):
        found = f"{ids.numel()} ids up to {int(ids[-1])}" if ids.numel() else "none"
        raise ValueError(
            f"`block_code` of {name} must hold {nnzb} block ids below {num_blocks}. Got {found}. The checkpoint is "
            "damaged: load an intact one."
        )
    return ids.int()


def _symbols(gaps: torch.Tensor, longest: int) -> torch.Tensor:
    ends = (gaps // longest + 1).cumsum(0) - 1
    symbols = gaps.new_full((int(ends[-1]) + 1,), longest)
    symbols[ends] = gaps % longest
    return symbols


def _pack(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """The first symbol of a byte in its lowest bits; a last byte is filled with symbols that end nothing."""
    per_byte = 8 // bits
    missing = -len(symbols) % per_byte
    rows = torch.cat([symbols, symbols.new_full((missing,), 2**bits - 1)]).view(-1, per_byte)
    return (rows << _shifts(bits, symbols)).sum(1).to(torch.uint8)


def _unpack(code: torch.Tensor, bits: int) -> torch.Tensor:
    return ((code.long()[:, None] >> _shifts(bits, code)) & (2**bits - 1)).flatten()


def _shifts(bits: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 8, bits, device=like.device)
