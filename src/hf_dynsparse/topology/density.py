"""The active blocks of each layer while the density of the model changes, and how such a run begins."""

from collections.abc import Mapping

import torch

from ..blocks.distributions import DISTRIBUTIONS
from ..blocks.sizes import count_active_blocks
from .context import draw_generator
from .counts import Layers, count_entries, largest_block
from .resize import begin_at_size_
from .settings import TopologySettings


class DensityPath:
    """
    Active blocks of each layer on the way from an initial density to a final one.

    Args:
        initial, final (`Mapping[str, float]`): sparsity of each layer at the ends.
    """

    def __init__(self, layers: Layers, initial: Mapping[str, float], final: Mapping[str, float]) -> None:
        self._ends = {name: (layer.num_blocks, initial[name], final[name]) for name, layer in layers.items()}

    @classmethod
    def to_model(cls, layers: Layers, nnzb: Mapping[str, int], initial_sparsity: float) -> "DensityPath":
        """
        From `initial_sparsity` to the `nnzb` active blocks of a model. On the way the sparsity of every layer is the
        same multiple of its final one, so that the whole model has what the schedule says.
        """
        positions = sum(layer.in_features * layer.out_features for layer in layers.values())
        end = 1.0 - count_entries(layers, nnzb) / positions
        final = {name: 1.0 - nnzb[name] / layer.num_blocks for name, layer in layers.items()}
        initial = {name: initial_sparsity * own / end if end else initial_sparsity for name, own in final.items()}
        return cls(layers, initial, final)

    @classmethod
    def from_model(
        cls, layers: Layers, nnzb: Mapping[str, int], final_sparsity: float, distribution: str
    ) -> "DensityPath":
        """
        From the `nnzb` active blocks of a model to `final_sparsity`, spread over its layers by `distribution`.

        Raises:
            ValueError: if the model has fewer blocks than it is to end with.
        """
        shapes = {name: layer.shape for name, layer in layers.items()}
        densities = DISTRIBUTIONS[distribution](shapes, 1.0 - final_sparsity)
        initial = {name: 1.0 - nnzb[name] / layer.num_blocks for name, layer in layers.items()}
        path = cls(layers, initial, {name: 1.0 - density for name, density in densities.items()})
        begin, end = count_entries(layers, nnzb), count_entries(layers, path.at(0.0))
        if end >= begin + largest_block(layers):  # a run before this one may have left it a block short
            raise ValueError(
                f"A run prunes from the model's sparsity to `final_sparsity`. Got {final_sparsity} for a model with "
                f"{begin:,} active entries, where it leaves {end:,}. Start from a denser model: all blocks of a "
                "trained dense one, for example."
            )
        return path

    def at(self, share: float) -> dict[str, int]:
        """
        Active blocks of each layer at a share of the way back from the final density (0) to the initial one (1):
        `count_active_blocks` of `s_final + (s_initial - s_final) * share`.
        """
        return {
            name: count_active_blocks(blocks, 1.0 - (final + (initial - final) * share))
            for name, (blocks, initial, final) in self._ends.items()
        }


def sizes_as_given(layers: Layers, settings: TopologySettings) -> dict[str, int]:
    """
    Active blocks of each layer of the model that a new run was given: as it is, or, where the run itself decides how
    it begins, as it was before an earlier one began to change it.
    """
    begins_anew = settings.density_schedule != "constant" and settings.final_sparsity is None
    return {
        name: layer.given_nnzb if begins_anew and layer.given_nnzb is not None else layer.nnzb
        for name, layer in layers.items()
    }


def density_path(
    layers: Layers, given_nnzb: Mapping[str, int], settings: TopologySettings, distribution: str
) -> DensityPath:
    """
    The way of a run whose model was given with these active blocks: to them, or from them to `final_sparsity`.

    Raises:
        ValueError: see `DensityPath.from_model`.
    """
    if settings.final_sparsity is None:
        return DensityPath.to_model(layers, given_nnzb, settings.initial_sparsity)
    return DensityPath.from_model(layers, given_nnzb, settings.final_sparsity, distribution)


def begin_(
    layers: Layers,
    path: DensityPath,
    given_nnzb: Mapping[str, int],
    settings: TopologySettings,
    optimizer: torch.optim.Optimizer,
    *,
    is_new: bool,
) -> None:
    """
    Note in the layers how many blocks a changing density leads to, and, in a new run, give them the first ones, in
    place.
    """
    as_it_is = settings.final_sparsity is not None
    first = path.at(settings.density_share(0.0))
    for name, layer in layers.items():
        if is_new and not as_it_is:
            begin_at_size_(layer, first[name], draw_generator(settings.seed, "start", name), optimizer=optimizer)
        layer.given_nnzb = None if as_it_is else given_nnzb[name]
