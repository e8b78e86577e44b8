"""Tickets: which heads and intermediate neurons of each layer stay, drawn from their gates (arXiv:2101.00063)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from math import floor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from ...files import write_atomically


Kept = tuple[tuple[int, ...], ...]

# What a unit is worth by its gate. The authors rank by the signed gate: a large negative one would go first.
TICKET_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "magnitude": torch.abs,
    "signed": lambda gates: gates,
}


@dataclass(frozen=True)
class Ticket:
    """
    The units of each layer that stay.

    Args:
        heads, neurons (`tuple[tuple[int, ...], ...]`): per layer the ascending indices of the attention heads, and of
            the intermediate neurons, that stay.
        num_heads, num_neurons (`tuple[int, ...]`): per layer how many there were.
    """

    heads: Kept
    neurons: Kept
    num_heads: tuple[int, ...]
    num_neurons: tuple[int, ...]

    def save(self, path: str | Path, **about: Any) -> None:
        """Write the ticket as JSON, and beside it `about`: how it came about. The file is there whole or not."""
        write_atomically(path, json.dumps(asdict(self) | about) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Read what `save` wrote.

        Raises:
            ValueError: if the file holds no ticket.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"A ticket must hold heads, neurons, num_heads and num_neurons. Got {path}: {error!r}. Draw it anew."
            ) from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """From the content of the file."""
        heads, neurons = (tuple(tuple(layer) for layer in content[name]) for name in ("heads", "neurons"))
        return cls(heads, neurons, tuple(content["num_heads"]), tuple(content["num_neurons"]))


def draw_ticket(
    head_gates: Sequence[torch.Tensor],
    neuron_gates: Sequence[torch.Tensor],
    *,
    head_ratio: float = 1 / 3,
    neuron_ratio: float = 0.4,
    heads: str = "layer",
    neurons: str = "global",
    score: str = "magnitude",
    multiple_of: int = 1,
) -> Ticket:
    """
    Keep the units with the highest scores: `round(ratio * units)` go, of every layer or of all layers together. Counts
    are exact, ties go to the lower index, and the best unit of each layer stays whatever the others are worth.

    Args:
        head_gates (sequence of `torch.Tensor` of shape `(heads,)`): a gate for each head, layer by layer.
        neuron_gates (sequence of `torch.Tensor` of shape `(intermediate_size,)`): the same for each neuron.
        head_ratio, neuron_ratio (`float`): share of units to leave out, in [0, 1).
        heads, neurons (`str`): `"layer"`, units compete within their layer, or `"global"`, with those of all layers.
        score (`str`): `"magnitude"`, or `"signed"` as in the authors' code.
        multiple_of (`int`): the neurons that stay in each layer are rounded to the nearest multiple, so that blocks
            and vector kernels fit; at least one multiple, at most the whole layer.

    Raises:
        ValueError: for an unknown name, or a number out of range.
    """
    _check_rule(head_ratio, neuron_ratio, heads, neurons, score, multiple_of)
    scores = [[TICKET_SCORES[score](gates.detach().cpu()) for gates in part] for part in (head_gates, neuron_gates)]
    return Ticket(
        _kept(scores[0], head_ratio, heads),
        _kept(scores[1], neuron_ratio, neurons, multiple_of),
        tuple(map(len, head_gates)),
        tuple(map(len, neuron_gates)),
    )


def random_ticket(
    num_heads: Sequence[int],
    num_neurons: Sequence[int],
    *,
    seed: int,
    head_ratio: float = 1 / 3,
    neuron_ratio: float = 0.4,
    multiple_of: int = 1,
) -> Ticket:
    """
    Units drawn at random, as many in each layer as a layer-wise draw keeps: what a search must be better than.

    Args:
        num_heads, num_neurons (sequence of `int`): units of each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    # A permutation: no ties, which a draw of floats may have.
    gates = [[torch.randperm(units, generator=generator) for units in part] for part in (num_heads, num_neurons)]
    ratios: dict[str, Any] = {"head_ratio": head_ratio, "neuron_ratio": neuron_ratio}
    return draw_ticket(*gates, **ratios, neurons="layer", multiple_of=multiple_of)


class TicketDistance(NamedTuple):
    """Shares of units that stay in one ticket and go in the other, in [0, 1]."""

    total: float
    heads: float
    neurons: float

    @property
    def largest(self) -> float:
        """Of heads or neurons: in `total` the few heads vanish among the many neurons."""
        return max(self.heads, self.neurons)


def ticket_distance(first: Ticket, second: Ticket) -> TicketDistance:
    """Normalised Hamming distance of two tickets of the same model."""
    heads, neurons = (
        sum(len(set(a) ^ set(b)) for a, b in zip(*pair, strict=True))
        for pair in ((first.heads, second.heads), (first.neurons, second.neurons))
    )
    num_heads, num_neurons = sum(first.num_heads), sum(first.num_neurons)
    return TicketDistance((heads + neurons) / (num_heads + num_neurons), heads / num_heads, neurons / num_neurons)


def tied_share(head_gates: Sequence[torch.Tensor], neuron_gates: Sequence[torch.Tensor], **rule: Any) -> float:
    """
    How much of a ticket rests on ties: its distance to the ticket of the same gates with ties to the higher index, the
    larger of heads and neurons. Before the first optimiser step all gates are equal, and tickets agree for nothing.
    """
    ticket = draw_ticket(head_gates, neuron_gates, **rule)
    turned = draw_ticket(*([gates.flip(0) for gates in reversed(part)] for part in (head_gates, neuron_gates)), **rule)

    def turn_back(kept: Kept, sizes: tuple[int, ...]) -> Kept:
        layers = zip(reversed(kept), sizes, strict=True)
        return tuple(tuple(size - 1 - unit for unit in reversed(layer)) for layer, size in layers)

    heads, neurons = turn_back(turned.heads, ticket.num_heads), turn_back(turned.neurons, ticket.num_neurons)
    return ticket_distance(ticket, Ticket(heads, neurons, ticket.num_heads, ticket.num_neurons)).largest


def _check_rule(
    head_ratio: float, neuron_ratio: float, heads: str, neurons: str, score: str, multiple_of: int
) -> None:
    """Refuse what `draw_ticket` cannot draw by."""
    for name, ratio in (("head_ratio", head_ratio), ("neuron_ratio", neuron_ratio)):
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1). Got {ratio}. It is the share of units to leave out.")
    for name, scope in (("heads", heads), ("neurons", neurons)):
        if scope not in ("layer", "global"):
            raise ValueError(f"`{name}` must be drawn by layer or global. Got {scope!r}. Choose one of them.")
    if score not in TICKET_SCORES:
        raise ValueError(f"`score` must be one of {', '.join(TICKET_SCORES)}. Got {score!r}.")
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be at least 1. Got {multiple_of}. 1 rounds nothing.")


def _kept(scores: list[torch.Tensor], ratio: float, scope: str, multiple_of: int = 1) -> Kept:
    """Per layer the units that stay, ascending."""
    if scope == "layer":
        counts = [max(1, len(layer) - floor(ratio * len(layer) + 0.5)) for layer in scores]
    else:
        counts = _global_counts(scores, ratio)
    if multiple_of > 1:
        counts = [
            min(len(layer), max(multiple_of, floor(count / multiple_of + 0.5) * multiple_of))
            for layer, count in zip(scores, counts, strict=True)
        ]
    return tuple(tuple(sorted(_order(layer)[:count])) for layer, count in zip(scores, counts, strict=True))


def _global_counts(scores: list[torch.Tensor], ratio: float) -> list[int]:
    """How many units of each layer are among the best of all, where the best of each layer comes first."""
    every, ends = torch.cat(scores).double(), list(accumulate(map(len, scores), initial=0))
    best = [start + _order(layer)[0] for start, layer in zip(ends[:-1], scores, strict=True)]
    every[best] = torch.inf
    count = max(len(scores), len(every) - floor(ratio * len(every) + 0.5))
    kept = torch.tensor(_order(every)[:count])
    return [int(((kept >= start) & (kept < end)).sum()) for start, end in pairwise(ends)]


def _order(scores: torch.Tensor) -> list[int]:
    """Units from the best to the worst, of equals the lower index first."""
    return scores.sort(descending=True, stable=True).indices.tolist()
