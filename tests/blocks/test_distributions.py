"""How a density is spread over layers."""

import pytest

from hf_dynsparse.blocks.distributions import DISTRIBUTIONS, active_blocks


BERT_LIKE = {"query": (64, 64), "up": (256, 64), "down": (64, 256), "tiny": (16, 16)}


def test_uniform_by_hand() -> None:
    shapes = {"square": (8, 8), "wide": (4, 16)}
    assert active_blocks(shapes, 0.75, (2, 2)) == {"square": 4, "wide": 4}
    assert active_blocks(shapes, 0.9, (1, 4)) == {"square": 2, "wide": 2}
    assert active_blocks(shapes, 0.99, (4, 4)) == {"square": 1, "wide": 1}


def test_erk_by_hand() -> None:
    # raw densities 1/4 and 5/32 on 64 and 256 entries: 56 entries at scale 1; asked 28.
    densities = DISTRIBUTIONS["erk"]({"a": (8, 8), "b": (8, 32)}, 28 / 320)
    assert densities == pytest.approx({"a": 1 / 8, "b": 5 / 64})
    # `a` would be fuller than full: it is kept whole and `b` gets the rest.
    densities = DISTRIBUTIONS["erk"]({"a": (2, 2), "b": (16, 16)}, 0.5)
    assert densities == pytest.approx({"a": 1.0, "b": 126 / 256})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("block_shape", [(1, 1), (4, 4), (16, 16), (1, 4)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_the_total_is_what_was_asked_for(distribution: str, block_shape: tuple[int, int], sparsity: float) -> None:
    area = block_shape[0] * block_shape[1]
    nnzb = active_blocks(BERT_LIKE, sparsity, block_shape, distribution)
    total = {name: height * width // area for name, (height, width) in BERT_LIKE.items()}
    assert list(nnzb) == list(BERT_LIKE)
    assert all(1 <= nnzb[name] <= total[name] for name in nnzb)
    assert abs(sum(nnzb.values()) - (1 - sparsity) * sum(total.values())) <= len(BERT_LIKE) / 2 + 0.5
    if sparsity == 0.0:
        assert nnzb == total


def test_erk_leaves_small_layers_denser() -> None:
    densities = DISTRIBUTIONS["erk"](BERT_LIKE, 0.1)
    assert densities["tiny"] > densities["query"] > densities["up"] == densities["down"]
    assert max(DISTRIBUTIONS["erk"](BERT_LIKE, 0.7).values()) == 1.0


def test_errors_name_the_argument_and_the_layer() -> None:
    with pytest.raises(ValueError, match="`distribution` must be one of uniform, erk. Got 'even'"):
        active_blocks(BERT_LIKE, 0.9, (4, 4), "even")
    with pytest.raises(ValueError, match=r"both sides of `tiny` \(16 x 16\). Got 32 x 32. Choose 1, 2, 4, 8, 16"):
        active_blocks(BERT_LIKE, 0.9, (32, 32))
    with pytest.raises(ValueError, match="`sparsity` is the share of inactive positions"):
        active_blocks(BERT_LIKE, 1.0, (4, 4))
