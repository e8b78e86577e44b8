"""Operands of products, right and wrong in all ways at random, and what must become of them."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from helpers import blocks_of, dense_weight

from hf_dynsparse.ops import BACKENDS, block_sparse_linear, use_backend
from hf_dynsparse.ops.operators import linear, linear_backward


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
BLOCKS = ((1, 1), (1, 4), (4, 4), (16, 16), (2, 3), (8, 2))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Operands:
    """Of `linear` and `linear_backward`."""

    input: torch.Tensor
    values: torch.Tensor
    block_index: torch.Tensor
    bias: torch.Tensor | None
    grad: torch.Tensor
    out_features: int

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    def forward(self) -> tuple[object, ...]:
        return self.input, self.values, self.block_index, self.bias, self.out_features

    def fit(self, backward: bool, any_shape: bool = False) -> bool:
        """Whether the rules hold, each written once more."""
        of_weight = [self.input, self.values, *([self.grad] if backward else [self.bias])]
        alike = [tensor for tensor in of_weight if tensor is not None]
        if self.input.dtype not in FLOATS or len({tensor.dtype for tensor in alike}) > 1:
            return False
        if len({tensor.device for tensor in [*alike, self.block_index]}) > 1:
            return False
        if self.values.dim() != 3 or 0 in self.values.shape or self.input.dim() < 1 or not self.input.shape[-1]:
            return False
        if self.input.dim() != 2 and not any_shape:
            return False
        if backward and (self.grad.dim() != 2 or len(self.grad) != len(self.input)):
            return False
        out = self.grad.shape[1] if backward else self.out_features
        if out < 1 or (not backward and self.bias is not None and self.bias.shape != (out,)):
            return False
        nnzb, rows, columns = self.values.shape
        if out % rows or self.input.shape[-1] % columns:
            return False
        if self.block_index.dtype != torch.int32 or self.block_index.shape != (nnzb,):
            return False
        ids = [] if self.block_index.is_meta else self.block_index.tolist()
        blocks = (out // rows) * (self.input.shape[-1] // columns)
        return blocks < 2**31 and len(set(ids)) == len(ids) and all(0 <= block < blocks for block in ids)

    def is_served(self, backend: str) -> bool:
        """Whether the backend can do it at all."""
        return BACKENDS[backend].why_not(self.input.device, self.input.dtype, tuple(self.values.shape[1:])) is None


def draw(dice: random.Random) -> Operands:
    """Operands that fit together."""
    rows, columns = dice.choice(BLOCKS)
    grid = dice.randint(1, 4), dice.randint(1, 4)
    nnzb, tokens, dtype = dice.randint(1, grid[0] * grid[1]), dice.choice((0, 1, 2, 5, 17)), dice.choice(FLOATS)
    generator = torch.Generator().manual_seed(dice.getrandbits(30))

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    out, width = grid[0] * rows, grid[1] * columns
    index = torch.randperm(grid[0] * grid[1], generator=generator)[:nnzb].int()
    bias = made(out) if dice.random() < 0.5 else None
    return Operands(made(tokens, width), made(nnzb, rows, columns), index, bias, made(tokens, out), out)


def resize(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    shape = list(tensor.shape)
    if not shape or dice.random() < 0.2:
        return tensor[None] if dice.random() < 0.5 or not shape else tensor.sum(0).to(tensor.dtype)
    side = dice.randrange(len(shape))
    shape[side] = max(0, dice.choice((0, 1, shape[side] - 1, shape[side] + 1, 2 * shape[side], 70)))
    return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)


def spoil_ids(index: torch.Tensor, dice: random.Random) -> torch.Tensor:
    spoilt = index.clone().flatten()
    if spoilt.is_meta or not len(spoilt) or spoilt.dtype != torch.int32:
        return index
    spoilt[dice.randrange(len(spoilt))] = dice.choice((-1, 16, 17, 400, -(2**31), 2**31 - 1, int(spoilt[0])))
    return spoilt.view(index.shape)


def restride(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """The same numbers, laid out in another way."""
    if dice.random() < 0.4 and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if dice.random() < 0.5:
        return torch.cat([tensor[..., None], tensor[..., None]], -1)[..., 0]
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def change(operands: Operands, dice: random.Random) -> Operands:
    """One thing different, which may make the operands wrong, or not."""
    name, tensor = dice.choice(sorted(operands.tensors().items()))
    kind = dice.choice(("size", "size", "dtype", "device", "ids", "ids", "layout", "features", "bias", "index"))
    if kind == "ids":
        return replace(operands, block_index=spoil_ids(operands.block_index, dice))
    if kind == "index":
        return replace(operands, block_index=resize(operands.block_index, dice).to(operands.block_index.dtype))
    if kind == "bias":
        return replace(operands, bias=None)
    if kind == "features":
        out = operands.out_features
        return replace(operands, out_features=dice.choice((0, -out, out + 1, 2 * out, out // 2, 2**40)))
    if kind == "device" and dice.random() < 0.3:
        return replace(operands, **{each: tensor.to("meta") for each, tensor in operands.tensors().items()})
    changed = {
        "size": lambda: resize(tensor, dice),
        "dtype": lambda: tensor.to(dice.choice(FLOATS + OTHERS)),
        "device": lambda: tensor.to("meta"),
        "layout": lambda: restride(tensor, dice),
    }[kind]()
    return replace(operands, **{name: changed})


def expected(operands: Operands) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of input, values and bias, in float64 by dense products."""
    exact = {name: tensor.resolve_neg().double() for name, tensor in operands.tensors().items()}
    input, grad, index = exact["input"], exact["grad"], operands.block_index
    flat = input.reshape(-1, input.shape[-1])
    weight = dense_weight(exact["values"], index, (operands.out_features, input.shape[-1]))
    output = flat @ weight.T + (0 if operands.bias is None else exact["bias"])
    results = [output.view(*input.shape[:-1], operands.out_features)]
    if len(grad) == len(flat) and grad.shape[1:] == (operands.out_features,):
        results += [grad @ weight, blocks_of(grad.T @ flat, index, tuple(operands.values.shape[1:])), grad.sum(0)]
    return tuple(results)


def by_layer(operands: Operands) -> list[torch.Tensor]:
    with torch.no_grad():
        return [block_sparse_linear(*operands.forward())]


def by_gradient(operands: Operands) -> list[torch.Tensor]:
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in operands.tensors().items()
        if name in ("input", "values", "bias")
    }
    operands = replace(operands, **leaves)
    output = block_sparse_linear(*operands.forward())
    grad = torch.ones_like(output)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad)]


def by_operator(operands: Operands) -> list[torch.Tensor]:
    return [linear(*operands.forward())]


def by_backward_operator(operands: Operands) -> list[torch.Tensor]:
    return linear_backward(operands.grad, operands.input, operands.values, operands.block_index, True, True, True)


FORMS: dict[str, Callable[[Operands], list[torch.Tensor]]] = {
    "layer": by_layer,
    "gradient": by_gradient,
    "operator": by_operator,
    "backward": by_backward_operator,
}


def must_be_right_or_refused(form: str, backends: Iterable[str | None], seeds: Iterable[int]) -> Counter[str]:
    """Run a form of the product on operands drawn by each seed, and count what became of them."""
    backends, outcomes = list(backends), Counter[str]()
    for seed in seeds:
        dice = random.Random(seed)
        operands = draw(dice)
        for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
            operands = change(operands, dice)
        backend = dice.choice(backends)
        outcome = run(form, operands, backend)
        outcomes[outcome] += 1
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in operands.tensors().items()}
        assert outcome in ("right", "refused"), (outcome, seed, form, backend, operands.out_features, described)
    return outcomes


def run(
    form: str,
    operands: Operands,
    backend: str | None,
    product: Callable[[Operands], list[torch.Tensor]] | None = None,
) -> str:
    """What became of `operands`: "right", "refused", or what is wrong. `product` stands for that of `form`."""
    if form == "backward":
        operands = replace(operands, out_features=operands.grad.shape[1] if operands.grad.dim() == 2 else 0)
    fit = operands.fit(form == "backward", any_shape=form in ("layer", "gradient"))
    try:
        with use_backend(backend) if backend else nullcontext():
            results = (product or FORMS[form])(operands)
    except ValueError as error:
        if "Got" not in str(error) and "No backend serves" not in str(error):
            return f"an error without what was received: {error}"
        able = backend is None or not fit or operands.is_served(backend)
        return "refused" if not fit or not able else f"refused in vain: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not fit:
        return "taken, though wrong"
    if operands.input.is_meta:
        return "right" if all(result.is_meta for result in results) else "not on meta"
    if form == "gradient":
        operands = replace(operands, grad=torch.ones(results[0].shape).view(-1, operands.out_features))
    exact = expected(operands if form != "backward" else replace(operands, bias=None))
    wanted = exact[1:] if form == "backward" else exact
    for ours, truth in zip(results, wanted, strict=False):
        error = (ours.double() - truth.view(ours.shape)).norm()
        if not error <= TOLERANCE[operands.input.dtype] * (1 + truth.norm()):
            return f"off by {float(error)}"
    return "right"
