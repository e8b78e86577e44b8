"""All derivatives of a product, and what records it, against the dense layer that PyTorch differentiates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import generator, make_layer
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from hf_dynsparse import BlockSparseLinear, use_backend
from hf_dynsparse.ops import block_sparse_linear, to_dense
from hf_dynsparse.ops.operators import linear


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input, values, bias
Product = Callable[..., torch.Tensor]

LAYER = make_layer((2, 3), 4, 3, dtype=torch.float64)
INDEX = LAYER.block_index
INPUT, VALUES, BIAS = (
    torch.randn(5, 12, generator=generator(), dtype=torch.float64),
    LAYER.values.detach(),
    LAYER.bias.detach(),
)
OPERANDS = INPUT, VALUES, BIAS


def sparse(input: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return block_sparse_linear(input, values, INDEX, bias, 8)


def operator(input: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return linear(input, values, INDEX, bias, 8)


def dense(input: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(input, to_dense(values, INDEX, (8, 12)), bias)


def loss_of(product: Product) -> Product:
    return lambda *operands: product(*operands).sin().sum()


def leaves() -> Operands:
    return tuple(operand.clone().requires_grad_() for operand in OPERANDS)


def pair(operand: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.stack([operand, operand.cos()], dim)


def dual(product: Product) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(
            product(*(forward_ad.make_dual(operand, operand.cos()) for operand in OPERANDS))
        ).tangent


def penalty(product: Product) -> list[torch.Tensor]:
    """Of the gradient of the input, as it keeps a discriminator smooth."""
    operands = leaves()
    (of_input,) = torch.autograd.grad(loss_of(product)(*operands), operands[0], create_graph=True)
    return list(torch.autograd.grad(of_input.square().sum(), operands))


def twice(product: Product) -> list[torch.Tensor]:
    operands = leaves()
    first = torch.autograd.grad(loss_of(product)(*operands), operands, create_graph=True)
    return list(torch.autograd.grad(sum(gradient.pow(3).sum() for gradient in first), operands))


def several_at_once(product: Product) -> list[torch.Tensor]:
    operands = leaves()
    output = product(*operands)
    return list(torch.autograd.grad(output, operands, pair(torch.ones_like(output)), is_grads_batched=True))


def third_order(product: Product) -> torch.Tensor:
    def once(input: torch.Tensor) -> torch.Tensor:
        return grad(lambda input: product(input, VALUES, BIAS).pow(4).sum())(input).square().sum()

    return grad(lambda input: grad(once)(input).sum())(INPUT)


TRANSFORMS: dict[str, Callable[[Product], Any]] = {
    "grad": lambda product: grad(loss_of(product), (0, 1, 2))(*OPERANDS),
    "vjp": lambda product: vjp(product, *OPERANDS)[1](torch.ones(5, 8, dtype=torch.float64)),
    "jvp": lambda product: jvp(product, OPERANDS, tuple(operand.cos() for operand in OPERANDS)),
    "jvp of the bias": lambda product: jvp(lambda bias: product(INPUT, VALUES, bias), (BIAS,), (BIAS,)),
    "vmap of inputs": lambda product: vmap(product, (1, None, None))(pair(INPUT, 1), VALUES, BIAS),
    "vmap of values": lambda product: vmap(product, (None, 0, None))(INPUT, pair(VALUES), BIAS),
    "vmap of all": lambda product: vmap(product)(pair(INPUT), pair(VALUES), pair(BIAS)),
    "vmap without gradients": lambda product: torch.no_grad()(vmap(product))(pair(INPUT), pair(VALUES), pair(BIAS)),
    "gradients of samples": lambda product: vmap(grad(loss_of(product), (1, 2)), (0, None, None))(
        INPUT[:, None], VALUES, BIAS
    ),
    "jacrev": lambda product: jacrev(product, (0, 1, 2))(*OPERANDS),
    "jacfwd": lambda product: jacfwd(product, (0, 1, 2))(*OPERANDS),
    "forward over reverse": lambda product: hessian(loss_of(product), (0, 1))(*OPERANDS),
    "reverse over reverse": lambda product: jacrev(jacrev(loss_of(product), 1), 0)(*OPERANDS),
    "third order": third_order,
    "dual numbers": dual,
    "dual numbers without gradients": torch.no_grad()(dual),
    "penalty": penalty,
    "twice": twice,
    "several at once": several_at_once,
    "make_fx": lambda product: torch.no_grad()(make_fx(product)(*OPERANDS))(INPUT + 1, VALUES, BIAS),
    "jit.trace": lambda product: torch.jit.trace(product, OPERANDS)(torch.cat([INPUT, INPUT]), VALUES, BIAS),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # forward mode scripts, too
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_works_with_a_dense_layer_works_with_a_sparse_one(name: str) -> None:
    expected = TRANSFORMS[name](dense)
    with use_backend("tiled"):
        found = TRANSFORMS[name](sparse)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(expected))


@pytest.mark.parametrize("name", ["vmap of all", "penalty", "twice", "several at once", "make_fx"])
def test_the_operator_itself(name: str) -> None:
    with use_backend("tiled"):
        found = TRANSFORMS[name](operator)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(TRANSFORMS[name](dense)))


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "dual numbers"])
def test_forward_mode_of_the_operator_itself_is_refused(name: str) -> None:
    # PyTorch would answer with tangents of zero.
    with pytest.raises(NotImplementedError, match="must call a layer, or `block_sparse_linear`, in eager mode. Got a"):
        TRANSFORMS[name](operator)


def test_numbers_agree_with_the_formulas() -> None:
    operands = tuple(operand.clone().requires_grad_() for operand in (INPUT[:2], VALUES[:, :, :4], BIAS))
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(sparse, operands, check_rev_over_rev=True)


def test_samples_by_the_kernels_in_float32() -> None:
    layer, input = make_layer((2, 3), 4, 3), torch.randn(6, 12, generator=generator())

    def loss(parameters: dict[str, torch.Tensor], input: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (input,)).square().sum()

    found = vmap(grad(loss), (None, 0))(dict(layer.named_parameters()), input)
    for place in range(6):
        layer.zero_grad()
        layer(input[place]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][place], parameter.grad)


def test_a_layer_on_meta() -> None:
    layer = BlockSparseLinear(12, 8, 4, device="meta", dtype=torch.bfloat16)
    input = torch.empty(2, 5, 12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert output.is_meta
    assert output.shape == (2, 5, 8)
    for tensor in (input, layer.values, layer.bias):
        assert tensor.grad.is_meta
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, torch.bfloat16)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="must be on one device. Got cpu and meta"):
        layer(torch.ones(2, 12))


def test_vmap_of_the_operator_itself() -> None:
    with use_backend("tiled"):
        found = vmap(operator, (0, None, None))(pair(INPUT), VALUES, BIAS)
    torch.testing.assert_close(found, vmap(dense, (0, None, None))(pair(INPUT), VALUES, BIAS))
