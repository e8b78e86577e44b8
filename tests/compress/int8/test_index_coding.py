"""The compact code of a block index: worked examples, round trips, damage."""

import pytest
import torch

from hf_dynsparse.blocks.draw import random_block_index
from hf_dynsparse.compress.int8 import index_coding
from hf_dynsparse.compress.int8.index_coding import CODE_BITS, decode_index, encode_index


def encode_with(bits, ids, monkeypatch):
    monkeypatch.setattr(index_coding, "CODE_BITS", (bits,))
    return encode_index(torch.tensor(ids, dtype=torch.int32))[0]


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        # Gaps 0, 2, 6. A bitmap whose zeros are active: 0 110 1111 110.
        (1, [0b11110110, 0b11111011]),
        # 0 2 | 3 3 0, and a 3 thrice to fill the byte, from the lowest bits on.
        (2, [0b11111000, 0b11111100]),
        (4, [0x20, 0xF6]),
        (8, [0, 2, 6]),
    ],
)
def test_codes_by_hand(bits, code, monkeypatch):
    assert encode_with(bits, [0, 3, 10], monkeypatch).tolist() == code


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("density", [0.001, 0.03, 0.1, 0.5, 0.97, 1.0])
def test_round_trips(bits, density, monkeypatch):
    for seed, num_blocks in enumerate((1, 7, 64, 5000)):
        nnzb = max(1, round(density * num_blocks))
        ids = random_block_index(num_blocks, nnzb, torch.Generator().manual_seed(seed))
        code = encode_with(bits, ids.tolist(), monkeypatch)
        decoded = decode_index(code, bits, nnzb, num_blocks)
        assert decoded.dtype == torch.int32
        assert torch.equal(decoded, ids)


@pytest.mark.parametrize(
    ("density", "bits", "bytes_per_block"),
    [(0.5, 1, 0.25), (0.25, 2, 0.4324), (0.1, 4, 0.6296), (0.02, 8, 1.0058)],
)
def test_the_shortest_code_is_taken_and_as_short_as_the_formula_says(density, bits, bytes_per_block):
    ids = random_block_index(100_000, int(density * 100_000), torch.Generator().manual_seed(0))
    code, chosen = encode_index(ids)
    skipped = (1 - density) ** (2**bits - 1)
    assert chosen == bits
    assert bits / 8 * (1 + skipped / (1 - skipped)) == pytest.approx(bytes_per_block, abs=1e-4)
    assert code.numel() / ids.numel() == pytest.approx(bytes_per_block, rel=0.01)


@pytest.mark.parametrize(
    ("code", "nnzb", "num_blocks", "found"),
    [
        ([0x20, 0xF6], 2, 11, "3 ids up to 10"),
        ([0x20, 0xF6], 4, 11, "3 ids up to 10"),
        ([0x20, 0xF6], 3, 10, "3 ids up to 10"),
        ([0xFF], 1, 99, "none"),
        ([], 1, 99, "none"),
    ],
)
def test_damage_is_seen(code, nnzb, num_blocks, found):
    with pytest.raises(ValueError, match=f"`block_code` of `x` must hold {nnzb} block ids .* Got {found}"):
        decode_index(torch.tensor(code, dtype=torch.uint8), 4, nnzb, num_blocks, "`x`")
