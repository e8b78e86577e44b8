"""After many topology updates slots are in no order at all: every backend must still find each block."""

import pytest
import torch
from helpers import blocks_of, dense_weight, generator, make_layer, serving

from hf_dynsparse import prune_regrow_, use_backend


@pytest.mark.parametrize(
    ("backend", "block_size"),
    [(name, size) for size in (1, 4, 16, 32, (1, 4)) for name in serving(size, torch.float32)],
    ids=str,
)
def test_many_random_updates(backend: str, block_size: int | tuple[int, int]) -> None:
    layer, draw = make_layer((6, 7), block_size, 13), generator(1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    input = torch.randn(70, layer.in_features, generator=draw)
    first = layer.block_index.clone()
    for update in range(40):
        with use_backend(backend):
            output = layer(input)
            output.square().sum().backward()
        if update % 8 == 7:
            weight = dense_weight(layer.values, layer.block_index, layer.shape)
            expected = torch.nn.functional.linear(input, weight, layer.bias)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
            gradient = blocks_of(2 * output.detach().T @ input, layer.block_index, layer.block_shape)
            torch.testing.assert_close(layer.values.grad, gradient, rtol=1e-4, atol=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        prune_regrow_(layer, optimizer, pruning_ratio=0.5, regrow_rule="random", generator=draw)
    assert not torch.equal(layer.block_index, first)
    assert not torch.equal(layer.block_index, layer.block_index.sort().values)
