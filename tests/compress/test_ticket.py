"""Tickets: exact counts, ties, protected layers, distances, files."""

import pytest
import torch
from helpers import generator

from hf_dynsparse.compress.slimming import Ticket, draw_ticket, random_ticket, ticket_distance, tied_share


HEADS = [torch.tensor([1.0, 0.9, -1.2, 0.8]), torch.tensor([0.5, 0.4, 0.3, 0.2])]
NEURONS = [torch.tensor([1.0, 0.1, 0.9, 0.8, 0.7]), torch.tensor([0.2, 0.05, 0.3, 0.1, 0.25])]


def drawn(count, layers=3, seed=0):
    rows = torch.rand(layers, count, generator=generator(seed))
    return list(rows)


@pytest.mark.parametrize(
    ("rule", "heads", "neurons"),
    [
        # A quarter of four heads goes in each layer: the smallest |c|. Of ten neurons go the worst four.
        ({"head_ratio": 0.25}, ((0, 1, 2), (0, 1, 2)), ((0, 2, 3, 4), (2, 4))),
        # By sign the negative gate is the worst of its layer, though it is the largest.
        ({"head_ratio": 0.25, "score": "signed"}, ((0, 1, 3), (0, 1, 2)), ((0, 2, 3, 4), (2, 4))),
        ({"head_ratio": 0.5, "heads": "global"}, ((0, 1, 2), (0,)), ((0, 2, 3, 4), (2, 4))),
        ({"head_ratio": 0.0, "neurons": "layer"}, ((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 2, 3), (0, 2, 4))),
        # Four stay in the first layer and two in the second, rounded to threes: half a three rounds up.
        ({"head_ratio": 0.25, "multiple_of": 3}, ((0, 1, 2), (0, 1, 2)), ((0, 2, 3), (0, 2, 4))),
        # A multiple that is more than the layer keeps the layer.
        ({"head_ratio": 0.25, "multiple_of": 16}, ((0, 1, 2), (0, 1, 2)), ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))),
        # Everything but the best of each layer.
        ({"head_ratio": 0.99, "neuron_ratio": 0.99, "heads": "global"}, ((2,), (0,)), ((0,), (2,))),
    ],
)
def test_worked_examples(rule, heads, neurons):
    ticket = draw_ticket(HEADS, NEURONS, **rule)
    assert (ticket.heads, ticket.neurons) == (heads, neurons)
    assert (ticket.num_heads, ticket.num_neurons) == ((4, 4), (5, 5))


def test_equal_gates_give_exact_counts_to_the_lower_indices():
    """A quantile with `>` would leave out every unit of a model that has not trained."""
    ones = [torch.ones(12)] * 3, [torch.ones(50)] * 3
    ticket = draw_ticket(*ones)
    assert ticket.heads == (tuple(range(8)),) * 3
    assert sum(map(len, ticket.neurons)) == 90
    # One of each layer is protected, the other 87 are the first.
    assert ticket.neurons == (tuple(range(50)), tuple(range(39)), (0,))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.0, 1 / 3, 0.4, 0.5, 0.97])
def test_counts_are_exact_and_no_layer_is_empty(ratio, scope):
    gates = drawn(37)
    gates[1] *= 1e-3  # the worst layer loses all that it may
    ticket = draw_ticket(drawn(4), gates, neuron_ratio=ratio, neurons=scope)
    sizes = [len(layer) for layer in ticket.neurons]
    if scope == "layer":
        assert sizes == [37 - int(ratio * 37 + 0.5)] * 3
    else:
        assert sum(sizes) == 111 - int(ratio * 111 + 0.5)
    assert min(sizes) >= 1
    assert int(gates[1].argmax()) in ticket.neurons[1]


def test_random_tickets_have_the_counts_of_a_layer_wise_draw():
    rule = {"head_ratio": 0.25, "neuron_ratio": 0.4, "multiple_of": 4}
    first, again, other = (random_ticket([4, 4], [32, 32], seed=seed, **rule) for seed in (0, 0, 1))
    assert first == again != other
    learned = draw_ticket(drawn(4, 2), drawn(32, 2), neurons="layer", **rule)
    for part in ("heads", "neurons"):
        assert [len(layer) for layer in getattr(first, part)] == [len(layer) for layer in getattr(learned, part)]


def test_distance():
    first = Ticket(((0, 1), (0, 1)), ((0, 1, 2), (3, 4, 5)), (4, 4), (6, 6))
    second = Ticket(((0, 2), (0, 1)), ((0, 1, 3), (0, 1, 2)), (4, 4), (6, 6))
    distance = ticket_distance(first, second)
    assert distance == (10 / 20, 2 / 8, 8 / 12)
    assert distance.largest == 8 / 12
    assert ticket_distance(first, first) == (0.0, 0.0, 0.0)
    assert ticket_distance(second, first) == distance


def test_share_of_ties():
    ones = [torch.ones(4)] * 2, [torch.ones(10)] * 2
    # Of each layer stay the first two heads or the last two.
    assert tied_share(*ones, head_ratio=0.5, neurons="layer") == 1.0
    assert tied_share(drawn(4), drawn(10)) == 0.0
    heads = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0, 4.0])]
    assert tied_share(heads, drawn(10, 2), head_ratio=0.5) == 2 / 8
    # Ties away from the cut decide nothing.
    assert tied_share(heads, drawn(10, 2), head_ratio=0.25) == 0.0


def test_file(tmp_path):
    ticket = draw_ticket(HEADS, NEURONS)
    ticket.save(tmp_path / "ticket.json", step=3)
    assert Ticket.load(tmp_path / "ticket.json") == ticket
    assert [path.name for path in tmp_path.iterdir()] == ["ticket.json"]
    (tmp_path / "other.json").write_text('{"heads": []}')
    with pytest.raises(ValueError, match=r"other.json: KeyError\('neurons'\). Draw it anew"):
        Ticket.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"head_ratio": 1.0}, r"`head_ratio` must lie in \[0, 1\). Got 1.0"),
        ({"neuron_ratio": -0.1}, "`neuron_ratio` must lie"),
        ({"heads": "all"}, "`heads` must be drawn by layer or global. Got 'all'"),
        ({"score": "l1"}, "`score` must be one of magnitude, signed. Got 'l1'"),
        ({"multiple_of": 0}, "`multiple_of` must be at least 1. Got 0"),
    ],
)
def test_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        draw_ticket(HEADS, NEURONS, **rule)
