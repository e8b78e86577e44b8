"""Int8 layers and quantisation-aware ones against plain arithmetic with integers."""

import copy
import pickle
from itertools import product

import pytest
import torch
from helpers import needs_kernels
from torch import nn

from hf_dynsparse import BlockSparseLinear, use_backend
from hf_dynsparse.compress.int8 import Int8BlockSparseLinear, Int8Linear, integer_reference, prepare_qat_
from hf_dynsparse.compress.int8.layers import EXACT_IN_FLOAT32
from hf_dynsparse.ops import int8 as kernels


INPUTS = {
    "both signs": lambda draw, width: torch.randn(3, 5, width, generator=draw),
    "positive": lambda draw, width: torch.rand(3, 5, width, generator=draw) + 1,
    "negative": lambda draw, width: -torch.rand(3, 5, width, generator=draw) - 1,
    "constant": lambda draw, width: torch.full((3, 5, width), 0.37),
    "zero": lambda draw, width: torch.zeros(3, 5, width),
}
# Block, or None for a dense layer; (out_features, in_features).
LAYERS = [
    (1, (24, 40)),
    (1, (7, 13)),
    ((1, 4), (9, 20)),
    (4, (24, 40)),
    (16, (48, 32)),
    (None, (7, 13)),
    (None, (24, 40)),
]


def qat_layer(block, shape, bias, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if block is None:
        layer = nn.Linear(shape[1], shape[0], bias)
        torch.nn.init.normal_(layer.weight, std=0.1, generator=draw)
    else:
        layer = BlockSparseLinear(shape[1], shape[0], block, 0.6, bias, device="meta").to_empty(device="cpu")
        layer.reset_parameters(std=0.1, generator=draw)
    if bias:
        torch.nn.init.normal_(layer.bias, std=0.1, generator=draw)
    return prepare_qat_(nn.Sequential(layer))[0]


def to_int8(layer):
    return (Int8Linear if isinstance(layer, nn.Linear) else Int8BlockSparseLinear).from_qat(layer)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("block", "shape"), LAYERS, ids=str)
def test_all_three_are_the_same(block, shape, kind, bias):
    draw = torch.Generator().manual_seed(1)
    layer = qat_layer(block, shape, bias)
    for _ in range(3):
        layer.train()(INPUTS[kind](draw, shape[1]))
    int8 = to_int8(layer)
    input = 1.2 * INPUTS[kind](draw, shape[1])  # with some of it out of range
    truth = integer_reference(int8, input)
    assert truth.shape == (3, 5, shape[0])
    assert bias == bool(truth.any()) or kind != "zero"
    torch.testing.assert_close(int8(input), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.eval()(input), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_every_backend_computes_the_same_integers(backend):
    layer = qat_layer(4, (24, 40), True)
    input = torch.randn(8, 40, generator=torch.Generator().manual_seed(2))
    layer(input)
    int8 = to_int8(layer)
    with use_backend(backend):
        outputs = int8(input)
    assert torch.equal(outputs, int8(input))  # bit for bit: no sum was rounded


@pytest.mark.parametrize("block", [None, (2, 8)], ids=str)
def test_heavy_rows_are_computed_in_float64(block):
    layer = qat_layer(block, (4, 4096), False)
    with torch.no_grad():
        (layer.weight if block is None else layer.values).fill_(1.0)
    input = torch.ones(2, 4096)
    input[:, ::2] = 0.9961
    layer(input)
    int8 = to_int8(layer)
    assert int8.exact_dtype == torch.float64
    assert integer_reference(int8, input).max() / int8.step > EXACT_IN_FLOAT32
    assert torch.equal(int8(input), integer_reference(int8, input))
    assert to_int8(trained(qat_layer(block, (4, 64), False))).exact_dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize(("block", "shape"), LAYERS, ids=str)
def test_with_and_without_kernels_the_outputs_are_the_same(block, shape):
    layer = trained(qat_layer(block, shape, True))
    one, other = to_int8(layer), to_int8(layer)
    input = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(2))
    with kernels.use_variant(None):
        truth = one(input)
    assert one._constants.packed is None
    torch.testing.assert_close(other(input), truth, rtol=1e-6, atol=1e-7)
    assert (other._constants.packed is not None) == (kernels.find_best() is not None)


@needs_kernels
def test_what_is_packed_follows_the_values():
    int8 = to_int8(trained(qat_layer(4, (24, 40), True)))
    input = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before = int8(input).clone()
    assert not int8.block_index.is_inference()  # else its order would be derived at every call
    for other in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(other(input), before)
        other.int8_values.neg_()
        torch.testing.assert_close(other(input), integer_reference(other, input), rtol=1e-6, atol=1e-7)
    assert torch.equal(int8(input), before)


def test_a_compiled_layer_computes_the_same():
    int8 = to_int8(trained(qat_layer(4, (24, 40), True)))
    input = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        eager = int8(input)
        assert torch.equal(torch.compile(int8, backend="eager", fullgraph=True)(input), eager)


def test_nan_stays_nan():
    int8 = to_int8(trained(qat_layer(None, (8, 16), True)))
    input = torch.ones(3, 16)
    input[1, 5] = torch.nan
    assert int8(input).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("block", [None, 4], ids=str)
def test_another_width_is_refused(block):
    int8 = to_int8(trained(qat_layer(block, (8, 16), True)))
    with pytest.raises((ValueError, RuntimeError), match="16"):
        int8(torch.ones(3, 8))


def trained(layer):
    layer(torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(3)))
    return layer


def test_autocast_rounds_no_integers():
    int8 = to_int8(trained(qat_layer(4, (24, 40), True)))
    input = torch.randn(8, 40, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8(input), int8(input))
        inside = int8(input)
    assert torch.equal(inside, int8(input))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block", [None, 4], ids=str)
def test_on_meta_there_are_shapes(block, bias):
    int8 = to_int8(trained(qat_layer(block, (24, 40), bias))).to("meta")
    output = int8(torch.empty(3, 5, 40, device="meta", dtype=torch.bfloat16))
    assert (output.device.type, output.shape, output.dtype) == ("meta", (3, 5, 24), torch.bfloat16)


def test_training_mode_is_refused():
    int8 = to_int8(trained(qat_layer(4, (24, 40), True)))
    with pytest.raises(ValueError, match="for inference. Got one in training mode"):
        int8.train()(torch.zeros(1, 40))


def test_values_stand_in_ascending_order_whatever_the_slots():
    layer = trained(qat_layer(4, (24, 40), True))
    shuffled = copy.deepcopy(layer)
    order = torch.randperm(layer.nnzb, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        shuffled.values.copy_(layer.values[order])
        shuffled.block_index.copy_(layer.block_index[order])
    one, other = to_int8(layer), to_int8(shuffled)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(one.block_index, layer.block_index.sort().values)


def test_a_loaded_state_replaces_the_decoded_index():
    one, other = (to_int8(trained(qat_layer(1, (24, 40), True, seed))) for seed in (0, 5))
    assert not torch.equal(one.block_index, other.block_index)
    target = Int8BlockSparseLinear(40, 24, 1, other.nnzb, other.code_bits, other.block_code.numel())
    target.load_state_dict(one.state_dict() | {"block_code": other.block_code})
    assert torch.equal(target.block_index, other.block_index)
    target.load_state_dict(other.state_dict())
    input = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target(input), other(input))


def test_a_bias_that_does_not_fit_is_an_error():
    layer = qat_layer(None, (4, 8), True)
    layer(torch.full((2, 8), 1e-6))
    with torch.no_grad():
        layer.weight.mul_(1e-6)
        layer.bias.fill_(1.0)
    with pytest.raises(ValueError, match="must fit into int32"):
        to_int8(layer)


@pytest.mark.parametrize("block", [None, 4], ids=str)
@pytest.mark.parametrize("of_input", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("of_weight", [1e-44, 1e-38, 1e-20, 1e20])
def test_scales_whose_product_float32_does_not_hold(block, of_input, of_weight):
    layer = qat_layer(block, (8, 16), True)
    with torch.no_grad():
        (layer.weight if block is None else layer.values).mul_(of_weight)
        layer.bias.zero_()
    draw = torch.Generator().manual_seed(6)
    layer(torch.randn(4, 16, generator=draw) * of_input)
    int8 = to_int8(layer)
    input = torch.randn(4, 16, generator=draw) * of_input
    input[0] = 0.0  # and 0 stays 0, whatever it is multiplied by
    output = int8(input)
    assert not int8.int32_bias.any()
    torch.testing.assert_close(output, integer_reference(int8, input), rtol=1e-6, atol=0)
    assert not output[0].any()
    assert not layer.eval()(input)[0].any()
    assert int8.step > 0
    assert output.isfinite().all() == (of_input * of_weight < 1e38)


@pytest.mark.parametrize("block", [None, 4], ids=str)
@pytest.mark.parametrize(
    ("bias", "what"), [*product((True, False), ("weight", "input", "wide input")), (True, "bias")], ids=str
)
def test_what_is_not_finite_is_refused(block, bias, what):
    layer = trained(qat_layer(block, (8, 16), bias))
    with torch.no_grad():
        if what == "weight":
            (layer.weight if block is None else layer.values).view(-1)[0] = torch.nan
        elif what == "bias":
            layer.bias[0] = torch.nan
        else:
            layer.input_range.copy_(torch.tensor([-3e38, torch.nan if what == "input" else 3e38]))
    with pytest.raises(ValueError, match="must be finite. Got|must fit into int32"):
        to_int8(layer)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(("block", "shape"), [(4, (24, 40)), (None, (7, 13))], ids=str)
def test_back_to_floating_point(block, shape):
    int8 = to_int8(trained(qat_layer(block, shape, True)))
    layer = int8.to_float()
    input = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    torch.testing.assert_close(layer(input), int8(input), rtol=0, atol=0.05)
    dense = layer.weight if block is None else layer.to_dense()
    assert (dense / int8.scale).round().unique().numel() > 10
    if block is not None:
        assert torch.equal(int8.to_sparse_bsr().to_dense(), dense)
