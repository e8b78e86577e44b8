"""The topology of a whole model over a run: `TopologyUpdater`, for any training loop."""

import logging
import zlib
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..nn import BlockSparseLinear, sparse_layers
from ..optim import check_optimizer_state
from ..shards import shard_again_
from .allocation import DensityPath, allocate_by_momentum, allocate_globally
from .checks import check_sizes_may_change, check_updatable
from .dense_gradient import DenseGradientProbe
from .exploration import dof_coverage, is_tracked, track_exploration_, untrack_exploration_
from .hidden_copy import (
    choose_by_hidden_copy,
    has_hidden_copy,
    remember_,
    track_hidden_copy_,
    untrack_hidden_copy_,
)
from .momentum import add_to_momentum_, has_momentum, track_momentum_, untrack_momentum_
from .report import TopologyReport, report_update
from .resize import begin_at_size_
from .schedules import pruning_ratio_at, update_steps
from .scores import SCORES
from .settings import TopologySettings
from .update import Replacement, choose_replacement, is_finite, replace_blocks_, score_slots


logger = logging.getLogger(__name__)

# Above this newborn share an update undoes what the one before has done.
CHURN = 0.9


class TopologyUpdater:
    """
    Prunes and regrows the sparse layers of `model` at fixed steps of a run (arXiv:2108.06277, section 3).

    Random draws depend on `(seed, number of the update, layer name)` alone: ranks agree without communication and a
    resumed run repeats them. Every rank's topology is compared after each update. Layers may be whole on every rank
    (DDP) or split by blocks (FSDP2: `fully_shard`); then scores are gathered, and a rank writes the blocks it holds.

    With a `density_schedule` the model as it is has the density of the end; the updater gives it the initial one at
    once, by random blocks. With a `final_sparsity` too, it has the density of the beginning, and keeps its blocks.
    Shapes follow the density: whatever depends on the sizes of parameters, such as DDP, must be made anew after an
    update.

    Args:
        model (`nn.Module`): a model with `BlockSparseLinear` layers.
        optimizer (`torch.optim.Optimizer`): of this model's parameters; moments of new blocks are cleared in it.
        total_steps (`int`): optimiser steps of the run.
        num_updates, pruning_ratio, settings: see [`TopologySettings`].
        distribution (`str`): how `final_sparsity` is spread over the layers; see `hf_dynsparse.distributions`.
        given_nnzb (`Mapping[str, int]`, *optional*): active blocks of each layer of the model that the run was started
            with, when it resumes: the layers then stay as they are.

    Raises:
        ValueError: for arguments out of range, a model without sparse layers, frozen values to update, values that
            the optimizer does not have, or values flattened or split otherwise than by blocks (FSDP1, DeepSpeed).

    Example:
        ```python
        updater = TopologyUpdater(model, optimizer, total_steps=1000, num_updates=80)
        for step, batch in enumerate(batches, start=1):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updater.step(step)
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        num_updates: int | None = None,
        pruning_ratio: float = 0.5,
        *,
        distribution: str = "uniform",
        given_nnzb: Mapping[str, int] | None = None,
        **settings: Any,
    ) -> None:
        self.layers: dict[str, BlockSparseLinear] = sparse_layers(model)
        if not self.layers:
            raise ValueError(
                "`TopologyUpdater` needs a model with `BlockSparseLinear` layers. Got none: build a DynSparse model "
                "with sparsity > 0, or call `sparsify_(model, ...)` first."
            )
        self.settings = TopologySettings(num_updates, pruning_ratio=pruning_ratio, **settings)
        when = (self.settings.update_every, self.settings.first_step, self.settings.last_step)
        self.update_steps = update_steps(total_steps, num_updates, *when)
        shard_again_(model)
        if self.update_steps:
            check_updatable(self.layers, optimizer)
        self.model, self.optimizer, self.total_steps = model, optimizer, total_steps
        self._probe: DenseGradientProbe | None = None
        self._newborn_shares: list[float] = []
        self._needs = self.settings.needs
        track_layers_(self.layers.values(), self._needs)
        self.given_nnzb = dict(given_nnzb or {name: layer.nnzb for name, layer in self.layers.items()})
        self._path = self._density_path(distribution)
        if self.settings.changes_sizes:
            what = f"density_schedule={self.settings.density_schedule!r} and allocation={self.settings.allocation!r}"
            check_sizes_may_change(self.layers, self.num_updates, what)
            if given_nnzb is None and self.settings.final_sparsity is None:
                for name, nnzb in self._scheduled(0.0).items():
                    begin_at_size_(self.layers[name], nnzb, self._generator("start", name))
        self.prepare(1)

    @property
    def num_updates(self) -> int:
        """Topology updates of the whole run."""
        return len(self.update_steps)

    @property
    def has_final_density(self) -> bool:
        """Whether the model has as many active blocks as the run leads to."""
        return sum(layer.nnzb for layer in self.layers.values()) == sum(self._scheduled(1.0).values())

    def replaces_step(self, next_step: int) -> bool:
        """Whether an update takes the place of optimiser step `next_step`."""
        return self.settings.replace_step and next_step in self.update_steps

    def prepare(self, next_step: int) -> None:
        """
        Get ready for the forward and backward passes of optimiser step `next_step`: if it is to be followed by an
        update that needs its dense gradient, or the mean of those of all steps, begin to collect it. `step` does this
        for the step after; call it by hand when a run resumes.
        """
        self.close()
        updates_follow = bool(self.update_steps) and next_step <= self.update_steps[-1]
        update_is_next = next_step in self.update_steps
        if ("gradient" in self._needs and update_is_next) or ("momentum" in self._needs and updates_follow):
            scales = not self._needs.isdisjoint({"input_scale", "output_scale"})
            self._probe = DenseGradientProbe(self.layers.values(), scales)

    def close(self) -> None:
        """
        Collect no gradient any more: when a run ends before its last update. An updater that is dropped is closed.
        """
        if self._probe is not None:
            self._probe.remove()
            self._probe = None

    def step(self, global_step: int) -> TopologyReport | None:
        """
        Call once after each optimiser step, with the number of steps done. Updates the topology if it is time.

        Returns:
            `TopologyReport` if there was an update, else `None`; `None` too if a gradient or score was not finite:
            such an update is skipped with a warning.

        Raises:
            TypeError: for optimiser state that cannot be told apart by block.
            RuntimeError: if the ranks of a distributed run disagree about the topology.
        """
        if self._probe is not None:
            self._probe.reduce()
            if "momentum" in self._needs and all(map(is_finite, self._probe.gradients.values())):
                for layer in self.layers.values():
                    add_to_momentum_(layer, self._probe)
        report = self._update(self.update_steps.index(global_step)) if global_step in self.update_steps else None
        self.prepare(global_step + 1)
        return report

    @property
    def observed_positions(self) -> int:
        """Inactive positions whose gradient is being collected for the next update; usually none."""
        if self._probe is None:
            return 0
        return sum(layer.in_features * layer.out_features - layer.values.numel() for layer in self.layers.values())

    def coverage(self) -> float:
        """DOF coverage so far."""
        return dof_coverage(self.layers.values())

    def check_ranks_agree(self) -> None:
        """
        Compare the topology of all ranks; nothing to do in a single process.

        Raises:
            RuntimeError: on every rank, naming the ranks that differ from rank 0.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_world_size() == 1:
            return
        device = next(iter(self.layers.values())).block_index.device
        own = torch.tensor([self.checksum()], dtype=torch.int64, device=device)
        every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, own)
        differing = [rank for rank, other in enumerate(every) if int(other) != int(every[0])]
        if differing:
            raise RuntimeError(
                f"All ranks must have the same topology. Got another one on rank(s) {differing} than on rank 0: their "
                "values would be averaged block by block although they stand in different places. Give every rank the "
                "same seed and the same initial model."
            )

    def checksum(self) -> int:
        """CRC-32 of all block indices."""
        checksum = 0
        for layer in self.layers.values():
            checksum = zlib.crc32(layer.block_index.cpu().numpy().tobytes(), checksum)
        return checksum

    @torch.no_grad()
    def _update(self, update: int) -> TopologyReport | None:
        shard_again_(self.model)
        problem = self._not_finite()
        if problem:
            logger.warning("Topology update %d of %d is skipped: %s.", update + 1, self.num_updates, problem)
            return None
        for layer in self.layers.values():
            check_optimizer_state(self.optimizer, layer.values)
        ratio = pruning_ratio_at(update, self.num_updates, self.settings.pruning_ratio, self.settings.schedule)
        # All layers choose before any is changed, so that a skipped update leaves no trace.
        try:
            targets = self._targets(ratio, update)
            chosen = {
                name: self._choose(name, layer, ratio, update, targets[name]) for name, layer in self.layers.items()
            }
        except FloatingPointError as error:
            logger.warning("Topology update %d of %d is skipped: %s.", update + 1, self.num_updates, error)
            return None
        self.close()  # a probe knows the layers by the memory of their indices
        if self.settings.hidden_copy:
            for name, layer in self.layers.items():
                remember_(layer, chosen[name].slots)
        done = {
            name: replace_blocks_(layer, chosen[name], self.optimizer, update) for name, layer in self.layers.items()
        }
        self.check_ranks_agree()
        report = report_update(self.layers, done, update, ratio)
        self._warn_of_churn(report)
        return report

    def _warn_of_churn(self, report: TopologyReport) -> None:
        """Say once if two updates in a row removed hardly anything but what the update before them had brought."""
        self._newborn_shares.append(report.newborn_share)
        churns = [min(pair) > CHURN for pair in pairwise(self._newborn_shares)]
        if churns and churns[-1] and sum(churns) == 1:
            logger.warning(
                "New blocks do not live: topology updates %d and %d removed hardly anything but what the update just "
                "before had brought (newborn shares %.2f and %.2f): the topology churns in place. Give new blocks "
                "more steps to grow: fewer updates, or a longer interval; or prune by 'weight_gradient' instead of "
                "%r.",
                report.update,
                report.update + 1,
                *self._newborn_shares[-2:],
                self.settings.prune_score,
            )

    def _targets(self, ratio: float, update: int) -> dict[str, int]:
        """Active blocks of each layer after the update."""
        is_last = update == self.num_updates - 1
        scheduled = self._scheduled(1.0 if is_last else self.update_steps[update] / self.total_steps)
        total = sum(scheduled.values())
        if self.settings.allocation == "global":
            return allocate_globally(self.layers, total, self._mean_scores(update))
        if self.settings.allocation == "momentum":
            return allocate_by_momentum(self.layers, total, ratio, self.settings.readmit)
        return scheduled

    def _scheduled(self, progress: float) -> dict[str, int]:
        return self._path.at(self.settings.density_share(progress))

    def _density_path(self, distribution: str) -> DensityPath:
        final = self.settings.final_sparsity
        if final is None:
            return DensityPath.to_model(self.layers, self.given_nnzb, self.settings.initial_sparsity)
        return DensityPath.from_model(self.layers, self.given_nnzb, final, distribution)

    def _mean_scores(self, update: int) -> dict[str, torch.Tensor]:
        """The prune scores of all slots, over the entries of a block: layers may have blocks of several sizes."""
        score = SCORES[self.settings.prune_score]
        return {
            name: score_slots(layer, score, self._generator(update, f"{name}/all"), self._observed(layer))
            / layer.values[0].numel()
            for name, layer in self.layers.items()
        }

    def _generator(self, moment: int | str, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed}/{moment}/{name}".encode()))

    def _observed(self, layer: BlockSparseLinear) -> dict[str, torch.Tensor]:
        observed = self._probe.statistics(layer, self._needs) if self._probe else {}
        if "momentum" in self._needs:
            observed["momentum"] = layer.get_buffer("gradient_momentum")
        return observed

    def _choose(self, name: str, layer: BlockSparseLinear, ratio: float, update: int, target: int) -> Replacement:
        if self.settings.hidden_copy:
            return choose_by_hidden_copy(layer, self.settings.prune_score, target)
        return choose_replacement(
            layer,
            pruning_ratio=ratio,
            prune_score=self.settings.prune_score,
            regrow_rule=self.settings.regrow_rule,
            readmit=self.settings.readmit,
            regrow_std=self.settings.regrow_std,
            generator=self._generator(update, name),
            observed=self._observed(layer),
            nnzb=target,
            # Under SNFS a layer prunes its share and regrows another: not both.
            shrink_counts=self.settings.shrink_counts or self.settings.allocation == "momentum",
        )

    def _not_finite(self) -> str | None:
        """The first layer with a value or gradient that is not finite, in words."""
        for name, layer in self.layers.items():
            watched = {"values": layer.values, "gradient": layer.values.grad}
            if self._probe is not None:
                watched["dense gradient"] = self._probe.gradients.get(layer)
            for what, tensor in watched.items():
                if tensor is not None and not is_finite(tensor):
                    return f"the {what} of `{name}` holds NaN or infinity"
        return None


def track_layers_(layers: Iterable[BlockSparseLinear], needs: Set[str]) -> None:
    """Begin to record, in every layer that does not yet, its exploration and what updates need besides."""
    for layer in layers:
        if not is_tracked(layer):
            track_exploration_(layer)
        if "momentum" in needs and not has_momentum(layer):
            track_momentum_(layer)
        if "hidden_copy" in needs and not has_hidden_copy(layer):
            track_hidden_copy_(layer)


def untrack_layers_(layers: Iterable[BlockSparseLinear]) -> None:
    """Take away what `track_layers_` has added, if anything: a plain layer is left."""
    for layer in layers:
        untrack_exploration_(layer)
        untrack_momentum_(layer)
        untrack_hidden_copy_(layer)
