"""Block-sparse training is dense training with a mask: the same weights, moments and topology throughout."""

import math

import pytest
import torch
from helpers import TRAINING_ATOL, dense_weight, generator, sides
from torch import nn

from hf_dynsparse import BlockSparseLinear, TopologyUpdater


STEPS, UPDATES, RATIO = 30, 3, 0.5
LEARNING_RATE, BETAS, EPSILON, DECAY = 2e-3, (0.9, 0.999), 1e-6, 0.01


class MaskedDense:
    """A dense linear layer whose weight is masked; AdamW written out, one step at a time."""

    def __init__(self, layer: BlockSparseLinear) -> None:
        self.block_shape, self.grid = layer.block_shape, layer.grid
        self.active = set(layer.block_index.tolist())
        self.weight = dense_weight(layer.values, layer.block_index, layer.shape)
        self.bias = layer.bias.detach().clone()
        self.moments = {id(p): [torch.zeros_like(p), torch.zeros_like(p)] for p in (self.weight, self.bias)}
        self.mask = self.draw_mask()
        self.steps = 0

    def area(self, place: int) -> tuple[slice, slice]:
        (rows, columns), (row, column) = self.block_shape, divmod(place, self.grid[1])
        return slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)

    def draw_mask(self) -> torch.Tensor:
        mask = torch.zeros(self.weight.shape, dtype=torch.bool)
        for place in self.active:
            mask[self.area(place)] = True
        return mask

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.leaves = [self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()]
        return input @ (self.leaves[0] * self.mask).T + self.leaves[1]

    def step(self) -> None:
        """Loshchilov and Hutter, on the masked gradient."""
        self.steps += 1
        for parameter, leaf in zip((self.weight, self.bias), self.leaves, strict=True):
            first, second = self.moments[id(parameter)]
            first.copy_(BETAS[0] * first + (1 - BETAS[0]) * leaf.grad)
            second.copy_(BETAS[1] * second + (1 - BETAS[1]) * leaf.grad**2)
            unbiased = second / (1 - BETAS[1] ** self.steps)
            parameter -= LEARNING_RATE * DECAY * parameter
            parameter -= LEARNING_RATE * first / (1 - BETAS[0] ** self.steps) / (unbiased.sqrt() + EPSILON)
        self.weight *= self.mask

    def pruned(self, update: int) -> set[int]:
        """The blocks that this layer gives up: lowest L1 norm, ties to the lower position."""
        ratio = RATIO / 2 * (1 + math.cos(math.pi * update / UPDATES))
        norms = sorted((self.weight[self.area(place)].abs().sum().item(), place) for place in self.active)
        return {place for _, place in norms[: math.floor(ratio * len(norms) + 0.5)]}

    def replace(self, pruned: set[int], regrown: set[int]) -> None:
        assert not regrown & self.active
        assert len(regrown) == len(pruned) > 0
        self.active = self.active - pruned | regrown
        self.mask = self.draw_mask()
        for place in pruned | regrown:
            for tensor in (self.weight, *self.moments[id(self.weight)]):
                tensor[self.area(place)] = 0


@pytest.mark.parametrize("dtype", TRAINING_ATOL, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16, (1, 4)], ids=str)
def test_sparse_training_is_masked_dense_training(block_size: int | tuple[int, int], dtype: torch.dtype) -> None:
    model = nn.Sequential(
        BlockSparseLinear(48, 64, block_size, 0.5, dtype=dtype),
        nn.Tanh(),
        BlockSparseLinear(64, 32, block_size, 0.5, dtype=dtype),
    )
    for seed, layer in enumerate((model[0], model[2])):
        layer.reset_parameters(std=0.2, generator=generator(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    updater = TopologyUpdater(model, optimizer, STEPS, num_topology_updates=UPDATES, pruning_ratio=RATIO)
    pairs = [(layer, MaskedDense(layer)) for layer in (model[0], model[2])]
    first, second = pairs[0][1], pairs[1][1]
    assert all(layer.block_shape == sides(block_size) for layer, _ in pairs)
    done, losses = 0, []

    for step in range(1, STEPS + 1):
        input = torch.randn(8, 48, generator=generator(step), dtype=torch.float64).to(dtype)
        target = torch.sin(3 * input[:, :32])
        loss = (model(input) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

        expected = (second.forward(torch.tanh(first.forward(input))) - target).square().mean()
        expected.backward()
        first.step()
        second.step()
        torch.testing.assert_close(loss, expected, rtol=0, atol=TRAINING_ATOL[dtype])

        before = [layer.block_index.clone() for layer, _ in pairs]
        if updater.step(step) is not None:
            for (layer, reference), old in zip(pairs, before, strict=True):
                layer.layout.validate()
                was, now = old.tolist(), layer.block_index.tolist()
                pruned, regrown = reference.pruned(done), set(now) - set(was)
                assert set(was) - set(now) == pruned
                assert all((place in pruned) == (place != new) for place, new in zip(was, now, strict=True))
                reference.replace(pruned, regrown)
            done += 1

        for layer, reference in pairs:
            weight = layer.to_dense().detach()
            torch.testing.assert_close(weight, reference.weight, rtol=0, atol=TRAINING_ATOL[dtype])
            torch.testing.assert_close(layer.bias.detach(), reference.bias, rtol=0, atol=TRAINING_ATOL[dtype])

    assert done == UPDATES
    assert losses[-1] < losses[0]
    for layer, reference in pairs:
        for name, moment in zip(("exp_avg", "exp_avg_sq"), reference.moments[id(reference.weight)], strict=True):
            ours = dense_weight(optimizer.state[layer.values][name], layer.block_index, layer.shape)
            torch.testing.assert_close(ours, moment, rtol=0, atol=TRAINING_ATOL[dtype])
