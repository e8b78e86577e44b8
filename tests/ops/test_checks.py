"""The boundary of the operators: operands that do not fit are refused, and none is read or written beyond its end."""

import random
import re
from dataclasses import replace

import pytest
import torch
from helpers import generator, make_layer, needs_kernels
from torch import nn
from wrong_operands import FORMS, Operands, change, draw, must_be_right_or_refused, run

from hf_dynsparse import BlockLayout, use_backend
from hf_dynsparse.ops import BACKENDS, block_sparse_linear
from hf_dynsparse.ops.dropout import seeded_dropout
from hf_dynsparse.ops.operators import linear, linear_backward


# That of GPUs has its turn in test_triton.py.
BACKEND_NAMES = [name for name in BACKENDS if name != "triton"]
SEEDS = 500


@pytest.mark.parametrize("form", FORMS)
def test_operands_drawn_at_random_give_the_right_result_or_an_error(form: str) -> None:
    outcomes = must_be_right_or_refused(form, [None, *BACKEND_NAMES], range(SEEDS))
    assert min(outcomes["right"], outcomes["refused"]) > SEEDS / 10


def test_an_exported_program_with_other_weights_gives_the_right_result_or_an_error() -> None:
    outcomes = set()
    for seed in range(4):
        operands = replace(draw(random.Random(seed)), bias=None)
        program = torch.export.export(Product(operands), (operands.input,)).module()

        def with_other_weights(changed: Operands, program: nn.Module = program) -> list[torch.Tensor]:
            for name in ("values", "block_index"):
                setattr(program, name, nn.Parameter(getattr(changed, name), requires_grad=False))
            return [program(changed.input)]

        for place in range(100):
            changed = change(operands, random.Random(place))
            if changed.input is operands.input and changed.out_features == operands.out_features:
                for backend in (None, "native"):
                    outcomes.add(run("layer", changed, backend, with_other_weights))
    assert outcomes == {"right", "refused"}


class Product(nn.Module):
    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.values = nn.Parameter(operands.values, requires_grad=False)
        self.block_index = nn.Parameter(operands.block_index, requires_grad=False)
        self.out_features = operands.out_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return block_sparse_linear(input, self.values, self.block_index, None, self.out_features)


GOOD = {"input": (3, 20), "values": (4, 4, 4), "bias": (12,), "grad": (3, 12)}

WRONG = {
    "`values` must be of shape (nnzb, rows, columns), all at least 1. Got (0, 4, 4). Give": {"values": (0, 4, 4)},
    "`values` must be of shape (nnzb, rows, columns), all at least 1. Got (4, 16). Give": {"values": (4, 16)},
    "`block_index` must name one block for each of the `values`. Got 4 ids for 3 blocks. Change": {
        "values": (3, 4, 4)
    },
    "`block_size` must divide both sides of the layer (12 x 21). Got 4 x 4. Choose": {"input": (3, 21)},
    "`bias` must be of shape (12,), one number for each output. Got (5,). Give": {"bias": (5,)},
    "`bias` must be of shape (12,), one number for each output. Got (12, 1). Give": {"bias": (12, 1)},
    "must share a dtype. Got torch.float32 and torch.float64. Convert": {"bias": torch.float64},
    "must be on one device. Got cpu and meta. Move one with": {"values": torch.device("meta")},
    "must be on one device. Got meta and cpu. Move": {"input": torch.device("meta")},
    "`input` must be of dtype float64, float32, bfloat16, float16. Got torch.int64. Convert": {"input": torch.int64},
    "`input` must be of dtype float64, float32, bfloat16, float16. Got torch.complex64": {"input": torch.complex64},
    "`block_index` must be a 1-D int32 tensor. Got torch.int64 of shape (4,). Convert": {"block_index": torch.int64},
    "must be on one device. Got cpu and meta. Move one": {"block_index": torch.device("meta")},
}
WRONG_BACKWARD = {
    "with the tokens of `input`. Got (2, 12) for an input of (3, 20). Give": {"grad": (2, 12)},
    "with the tokens of `input`. Got (12,) for an input of (3, 20). Give": {"grad": (12,)},
    "`block_size` must divide both sides of the layer (13 x 20). Got 4 x 4. Choose": {"grad": (3, 13)},
    "`input` and `grad` must share a dtype. Got torch.float32 and torch.bfloat16. Convert": {"grad": torch.bfloat16},
}


def operands_but(wrong: dict[str, object]) -> dict[str, torch.Tensor]:
    made = {name: torch.ones(shape) for name, shape in GOOD.items()}
    made["block_index"] = torch.tensor([7, 0, 14, 3], dtype=torch.int32)
    for name, what in wrong.items():
        made[name] = torch.ones(what) if isinstance(what, tuple) else made[name].to(what)
    return made


@pytest.mark.parametrize("message", WRONG)
def test_the_error_says_rule_received_and_fix_in_every_form(message: str) -> None:
    made = operands_but(WRONG[message])
    operands = *(made[name] for name in ("input", "values", "block_index", "bias")), 12
    for product in (block_sparse_linear, linear):
        for _ in range(2):  # the second time from memory: an error must not be taken for a verdict
            with pytest.raises(ValueError, match=re.escape(message)):
                product(*operands)


@pytest.mark.parametrize("message", [message for message in WRONG if re.search(r"3 blocks|\(5,\)", message)])
def test_what_is_compiled_says_it_too(message: str) -> None:
    torch.compiler.reset()
    made = operands_but(WRONG[message])
    compiled = torch.compile(block_sparse_linear, backend="eager")
    with pytest.raises(RuntimeError, match=re.escape(message)):  # PyTorch's own around ours
        compiled(*(made[name] for name in ("input", "values", "block_index", "bias")), 12)


@pytest.mark.parametrize("message", WRONG_BACKWARD)
def test_the_error_of_the_backward_operator(message: str) -> None:
    made = operands_but(WRONG_BACKWARD[message])
    operands = [made[name] for name in ("grad", "input", "values", "block_index")]
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            linear_backward(*operands, True, True, True)


@pytest.mark.parametrize("operand", ["values", "bias", "block_index"])
def test_an_export_of_what_does_not_fit_is_refused(operand: str) -> None:
    layer = make_layer((3, 5), 4, 6)
    cut = getattr(layer, operand).detach()[:-1].clone()
    setattr(layer, operand, cut if operand == "block_index" else nn.Parameter(cut))
    with pytest.raises(ValueError, match=r"must .* Got \(?\d"):
        torch.export.export(layer, (torch.ones(2, 20),))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 3, 15], r"must lie in \[0, 15\). Got 15 in slot 2"),
        ([0, -1, 3], r"must lie in \[0, 15\). Got -1 in slot 1"),
        ([4, 0, 4], "must name each block once. Got 4 twice"),
    ],
)
def test_ids_are_checked_once_after_every_change(
    backend: str, ids: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer((3, 5), 16, 3)
    input = torch.ones(2, 80)
    with use_backend(backend):
        good = layer.block_index.clone()
        expected = layer(input)
        layer.block_index.copy_(torch.tensor(ids))
        for run_layer in (layer, lambda input: linear(input, layer.values, layer.block_index, layer.bias, 48)):
            with pytest.raises(ValueError, match=message):
                run_layer(input)
        with torch.inference_mode(), pytest.raises(ValueError, match=message):
            layer(input)
        layer.block_index.copy_(good)
        assert torch.equal(layer(input), expected)
        layer.block_index.data = torch.tensor(ids, dtype=torch.int32)  # no change of version, but of place
        with pytest.raises(ValueError, match=message):
            layer(input)


def test_ids_are_looked_at_once_per_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(BlockLayout, "validate", lambda layout: looked.append(layout))
    layer = make_layer((3, 5), 4, 3)
    for tokens in (1, 7, 7):
        layer(torch.ones(tokens, 20, requires_grad=True)).sum().backward()
    assert len(looked) == 1
    layer.block_index.add_(0)
    layer(torch.ones(1, 20))
    assert len(looked) == 2


@pytest.mark.parametrize("width", [4, 16, 40])
def test_a_layer_knows_its_width(width: int) -> None:
    # Both are widths that the operator could not refuse: blocks divide them, and the ids exist.
    layer = make_layer((2, 2), 4, 2)
    layer.block_index.copy_(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"must be of shape \(..., 8\). Got \(3, {width}\). Give the layer"):
        layer(torch.ones(3, width))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 0)], ids=str)
def test_an_input_without_features_is_refused(shape: tuple[int, ...]) -> None:
    layer = make_layer((2, 2), 4, 2)
    with pytest.raises(ValueError, match=r"`input` must be of shape \(..., in_features\)"):
        block_sparse_linear(torch.ones(shape), layer.values, layer.block_index, None, 8)


@needs_kernels
@pytest.mark.parametrize("operand", ["input", "values", "bias"])
def test_memory_that_was_freed_is_not_read(operand: str) -> None:
    layer, input = make_layer((2, 2), 4, 2).requires_grad_(False), torch.ones(3, 8)
    freed = input if operand == "input" else getattr(layer, operand)
    freed.untyped_storage().resize_(0)
    with use_backend("native"), pytest.raises(ValueError, match="must be in memory. Got one whose storage has been"):
        layer(input)


@needs_kernels
def test_dropout_takes_what_its_kernel_reads() -> None:
    input, seed = torch.ones(8), torch.tensor(3)
    for dtype in (torch.float64, torch.float16, torch.int8, torch.bool):
        with pytest.raises(ValueError, match=f"float32 or bfloat16 on the CPU. Got {dtype} on cpu"):
            seeded_dropout(input.to(dtype), seed, 0.5)
    with pytest.raises(ValueError, match="Got torch.float32 on cpu .torch.sparse_coo"):
        seeded_dropout(input.to_sparse(), seed, 0.5)
    for wrong in (torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="`seed` must be one int64 on the CPU"):
            seeded_dropout(input, wrong, 0.5)
    for p in (0.0, 1.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"`p` must lie in .0, 1.. Got {p}"):
            seeded_dropout(input, seed, p)
    with pytest.raises(ValueError, match="Got torch.float16 on meta"):
        seeded_dropout(input.half().to("meta"), seed, 0.5)
    negative = torch._neg_view(-torch.ones(8))
    assert torch.equal(seeded_dropout(negative, seed, 0.5), seeded_dropout(input, seed, 0.5))


def test_views_with_turned_signs_are_read_as_they_are() -> None:
    layer, input = make_layer((3, 5), 16, 6), torch.randn(4, 80, generator=generator())
    expected, turned = layer(input), torch._neg_view(-input)
    assert turned.is_neg()
    for backend in BACKEND_NAMES:
        with use_backend(backend):
            torch.testing.assert_close(layer(turned), expected)


def test_ids_that_int32_does_not_hold() -> None:
    side = 2**16  # 2**32 blocks of one entry; nothing of that size is made
    sizes = ((1, side), torch.float32), ((1, 1, 1), torch.float32), ((1,), torch.int32)
    operands = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]
    with pytest.raises(ValueError, match="must have at most 2147483647 blocks.* Got 65536 x 65536"):
        linear(*operands, None, side)
