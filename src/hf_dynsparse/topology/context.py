"""What a method sees of one topology update of a model, and how it decides."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..nn.linear import BlockSparseLinear
from .allocation import ALLOCATIONS
from .dense_gradient import DenseGradientProbe
from .exploration import ages_in_steps
from .hidden_copy import choose_by_hidden_copy
from .methods import METHODS
from .records import RECORDS
from .scores import OBSERVED, SCORES
from .settings import TopologySettings
from .update import Replacement, choose_replacement, held_moments, score_slots


@dataclass(frozen=True)
class UpdateContext:
    """
    One topology update of a model, before anything is changed.

    Args:
        number (`int`): of the update in the run, from 0.
        pruning_ratio (`float`): `pr(t)`.
        settings (`TopologySettings`): of the run.
        layers (`Mapping[str, BlockSparseLinear]`): those that are updated.
        scheduled (`Mapping[str, int]`): active blocks of each layer by the density schedule.
        budget (`int`): active entries of all `layers` by the density schedule.
        probe (`DenseGradientProbe`, *optional*): the gradient of the step before, if something needs it.
        optimizer (`torch.optim.Optimizer`, *optional*): that which holds the moments.
        steps (`tuple[int, ...]`): the optimiser steps done at each update so far, and now.
    """

    number: int
    pruning_ratio: float
    settings: TopologySettings
    layers: Mapping[str, BlockSparseLinear]
    scheduled: Mapping[str, int]
    budget: int
    probe: DenseGradientProbe | None = None
    optimizer: torch.optim.Optimizer | None = None
    steps: tuple[int, ...] = ()

    def targets(self) -> dict[str, int]:
        """Active blocks of each layer after the update, as the method says."""
        targets = METHODS[self.settings.method].targets or ALLOCATIONS[self.settings.allocation].targets
        return targets(self)

    def choose(self, name: str, nnzb: int) -> Replacement:
        """
        Which blocks of the layer `name` are pruned and regrown to reach `nnzb` active ones, as the method says.

        Raises:
            FloatingPointError: if a score is not finite.
        """
        choose = choose_by_hidden_copy if self.settings.hidden_copy else choose_by_scores
        return (METHODS[self.settings.method].choose or choose)(self, name, nnzb)

    def generator(self, name: str) -> torch.Generator:
        """For random draws about the layer `name`: the same on every rank, and when a run resumes."""
        return draw_generator(self.settings.seed, self.number, name)

    def observed(self, name: str) -> dict[str, torch.Tensor]:
        """The fields of [`BlockStatistics`] that the run has collected of the layer `name`, of every position."""
        layer, needs = self.layers[name], self.settings.needs
        observed = self.probe.statistics(layer, needs) if self.probe else {}
        recorded = needs & OBSERVED & RECORDS.keys()
        return observed | {need: layer.get_buffer(RECORDS[need].buffer) for need in recorded}

    def held(self, name: str) -> dict[str, torch.Tensor]:
        """Those that the optimiser keeps of the layer `name`, of the active blocks on this rank."""
        layer = self.layers[name]
        ages = ages_in_steps(layer, self.steps) if self.steps else None
        return held_moments(layer, self.settings, self.optimizer, ages)

    def prune_scores(self, name: str) -> torch.Tensor:
        """The prune scores of all slots of the layer `name`, of shape `(nnzb,)`."""
        score, generator = SCORES[self.settings.prune_score], self.generator(f"{name}/all")
        return score_slots(self.layers[name], score, generator, self.observed(name), self.held(name))

    def mean_prune_scores(self) -> dict[str, torch.Tensor]:
        """Those of all layers over the entries of a block: layers may have blocks of several sizes."""
        return {name: self.prune_scores(name) / layer.values[0].numel() for name, layer in self.layers.items()}


def choose_by_scores(update: UpdateContext, name: str, nnzb: int) -> Replacement:
    """The default of every method: prune by `prune_score`, regrow by `regrow_rule`; see `choose_replacement`."""
    how = update.settings, update.pruning_ratio, nnzb
    known = update.generator(name), update.observed(name), update.held(name)
    return choose_replacement(update.layers[name], *how, *known)


def draw_generator(seed: int, moment: int | str, name: str) -> torch.Generator:
    """A generator that depends on nothing but the seed of a run, the number of the update, and the layer."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{moment}/{name}".encode()))
