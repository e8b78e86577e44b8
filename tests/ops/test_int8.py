"""The compiled int8 kernels against sums in int64: every instruction set, bit for bit."""

import pytest
import torch
from helpers import cover_pairs, needs_kernels, variants
from torch.nn.functional import gelu, layer_norm

from hf_dynsparse.blocks.draw import random_block_index
from hf_dynsparse.ops import int8, native, to_dense, use_backend
from hf_dynsparse.ops.int8 import PackedLinear


pytestmark = needs_kernels

# Block shape and grid; the last is a dense matrix with odd sides.
WEIGHTS = [
    *(
        ((1, 1), (7, 13)),
        ((1, 1), (48, 90)),
        ((1, 4), (9, 33)),
        ((2, 8), (9, 5)),
        ((4, 1), (5, 31)),
        ((4, 2), (5, 31)),
    ),
    *(((4, 4), (19, 21)), ((8, 8), (5, 9)), ((16, 16), (5, 7)), ((32, 32), (1, 3)), ((7, 13), (1, 1))),
]
TOKENS = (1, 15, 16, 17, 64, 65, 200)
ZERO_POINTS = (0, 1, 128, 255)
DRAW = {
    "any": lambda shape, drawn: torch.randint(-127, 128, shape, generator=drawn),
    "lowest": lambda shape, drawn: torch.full(shape, -127),
    "highest": lambda shape, drawn: torch.full(shape, 127),
    "alternating": lambda shape, drawn: 127 - 254 * (torch.arange(torch.Size(shape).numel()).view(shape) % 2),
}


def packed(
    weight: tuple[tuple[int, int], tuple[int, int]],
    kind: str = "any",
    zero_point: int = 128,
    step: float = 1.0,
    bias: torch.Tensor | None = None,
) -> tuple[PackedLinear, torch.Tensor]:
    """A packed weight of which two fifths are active, and the dense int64 matrix."""
    block, grid = weight
    drawn = torch.Generator().manual_seed(grid[0])
    ids = random_block_index(grid[0] * grid[1], max(1, 2 * grid[0] * grid[1] // 5), drawn)
    values = DRAW[kind]((len(ids), *block), drawn).to(torch.int8)
    shape = grid[0] * block[0], grid[1] * block[1]
    places = ids.long() // grid[1], ids.long() % grid[1]
    scale = torch.tensor(0.5)
    made = int8.pack(values, *places, shape, zero_point=zero_point, input_scale=scale, step=step, bias=bias)
    assert made is not None
    return made, to_dense(values.double(), ids, shape).long()


def numbers(tokens: int, features: int, zero_point: int, extreme: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs on the grid of 0.5, on ties, and beyond its ends; and their integers less the zero point."""
    if extreme:
        integers = torch.full((tokens, features), 255 if zero_point < 128 else 0)
        return 2 * (integers - zero_point + 0.0), integers - zero_point
    drawn = torch.Generator().manual_seed(tokens)
    input = torch.randint(-1200, 1200, (tokens, features), generator=drawn) / 8
    return input, (2 * input).round().long().clamp(-zero_point, 255 - zero_point)


@pytest.mark.parametrize(
    ("variant", "weight", "tokens", "zero_point", "kind"),
    cover_pairs(
        [(variant, weight) for variant in variants(int8) for weight in WEIGHTS], TOKENS, ZERO_POINTS, tuple(DRAW)
    ),
    ids=str,
)
def test_every_instruction_set_adds_exactly(variant, weight, tokens, zero_point, kind, threads):
    with int8.use_variant(variant):
        layer, dense = packed(weight, kind, zero_point)
    for extreme in (False, True):
        input, integers = numbers(tokens, layer.in_features, zero_point, extreme)
        wanted = (integers @ dense.T).float()  # below 2^24: exact
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert layer.serves(input)
            assert torch.equal(layer.multiply(input), wanted)


@pytest.mark.parametrize("variant", variants(int8))
def test_a_step_and_a_bias(variant):
    with int8.use_variant(variant):
        bias = torch.randn(36, generator=torch.Generator().manual_seed(0))
        layer, dense = packed(((4, 4), (9, 9)), step=1e-3, bias=bias)
    input, integers = numbers(30, 36, 128, False)
    wanted = ((integers @ dense.T).double() * 1e-3 + bias).float()
    torch.testing.assert_close(layer.multiply(input.view(2, 15, 36)), wanted.view(2, 15, 36), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 65])
@pytest.mark.parametrize("weights", [(((4, 4), (9, 5)), ((4, 4), (5, 9))), (((1, 1), (13, 7)), ((1, 1), (9, 13)))])
@pytest.mark.parametrize("variant", variants(int8))
def test_two_layers_with_gelu_between(variant, weights, tokens):
    with int8.use_variant(variant):
        up, dense_up = packed(weights[0], step=2e-3)
        down, dense_down = packed(weights[1], zero_point=1, step=1.0)
    input, integers = numbers(tokens, up.in_features, 128, False)
    between = gelu((integers @ dense_up.T).double() * 2e-3)
    wanted = ((2 * between).round().clamp(-1, 254) @ dense_down.T.double()).float()
    found = up.multiply(input, down)
    # A difference in the last digit moves a number near a tie to the neighbouring integer.
    assert (found == wanted).float().mean() > 0.98
    assert (found - wanted).abs().max() <= 127


@pytest.mark.parametrize("variant", variants(int8))
def test_residual_and_norm_follow(variant):
    with int8.use_variant(variant):
        layer, dense = packed(((4, 4), (9, 5)), step=1e-3)
    input, integers = numbers(70, 20, 128, False)
    residual = torch.randn(70, 36, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.linspace(-1, 2, 36), torch.linspace(3, 4, 36)
    product = (integers @ dense.T).double() * 1e-3 + residual
    wanted = layer_norm(product, (36,), weight.double(), bias.double(), 1e-3).float()
    found = layer.multiply(input, ending=int8.Ending(residual, weight, bias, 1e-3))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", variants(int8))
def test_what_is_not_finite_is_noticed(variant):
    with int8.use_variant(variant):
        layer, _ = packed(((4, 4), (3, 5)))
        down, _ = packed(((1, 4), (5, 3)))
    for place in ((0, 0), (69, 19), (33, 16)):
        for wrong in (torch.nan, torch.inf):
            input = torch.ones(70, 20)
            input[place] = wrong
            assert layer.multiply(input) is None
            assert layer.multiply(input, down) is None


def test_what_is_served():
    with int8.use_variant(variants(int8)[0]):
        layer, dense = packed(((4, 4), (3, 5)))
    input = torch.ones(6, 20)
    assert torch.equal(layer.multiply(input[::2]), layer.multiply(input)[::2])  # rows apart
    assert layer.multiply(input[:0]).shape == (0, 12)
    assert not layer.serves(input.double())
    assert not layer.serves(input[:, 1:])
    assert not layer.serves(input.to("meta"))
    with use_backend("reference"):
        assert not layer.serves(input)
    assert layer.nbytes >= dense.count_nonzero()


def test_an_instruction_set_must_be_there():
    with (
        pytest.raises(native.LibraryUnavailable, match=r"This CPU runs .*portable. Got 'sse9'"),
        int8.use_variant("sse9"),
    ):
        pass


def test_without_the_best_variant_the_next_serves(monkeypatch, caplog):
    load = int8.load_variant

    def load_old(variant: str) -> object:
        if variant != "portable":
            raise native.LibraryUnavailable(f"_native_int8_{variant}.so is not built.")
        return load(variant)

    monkeypatch.setattr(int8, "load_variant", load_old)
    assert int8.find_best.__wrapped__() is None  # floating-point numbers are faster than portable integers
    if len(int8.runnable()) > 1:
        assert "cannot be used, slower ones serve" in caplog.text
