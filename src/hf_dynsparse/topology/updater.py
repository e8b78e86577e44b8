"""The topology of a whole model over a run: `TopologyUpdater`, for any training loop."""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import BlockSparseLinear, sparse_layers
from ..optim import check_optimizer_state
from ..shards import local_rows, shard_again_
from .allocation import allocate_by_weight, allocate_globally
from .dense_gradient import DenseGradientProbe
from .density import changes_sizes, check_density, check_sizes_may_change, scheduled_blocks
from .exploration import block_ages, dof_coverage, is_tracked, track_exploration_
from .momentum import add_to_momentum_, has_momentum, mean_momentum, track_momentum_
from .resize import begin_at_size_
from .schedules import density_share, pruning_ratio_at, update_steps
from .scores import PRUNE_SCORES, REGROW_RULES, SCORES, check_regrow_std, resolve_score
from .update import (
    LayerUpdate,
    Replacement,
    choose_replacement,
    is_finite,
    replace_blocks_,
    replaced_count,
    score_slots,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TopologyReport:
    """
    One topology update of a model.

    Args:
        update (`int`): its number, from 0.
        pruning_ratio (`float`): `pr(t)`.
        removed (`int`): blocks replaced, over all layers.
        newborn_share (`float`): share of them that the update just before had activated (arXiv:2108.06277, section 4).
        coverage (`float`): DOF coverage after the update.
        block_age (`float`): mean age of the active blocks, in updates survived.
        layers (`dict[str, LayerUpdate]`): the same by layer name.
    """

    update: int
    pruning_ratio: float
    removed: int
    newborn_share: float
    coverage: float
    block_age: float
    layers: dict[str, LayerUpdate]


class TopologyUpdater:
    """
    Prunes and regrows the sparse layers of `model` at fixed steps of a run (arXiv:2108.06277, section 3).

    Random draws depend on `(seed, number of the update, layer name)` alone: ranks agree without communication and a
    resumed run repeats them. Every rank's topology is compared after each update. Layers may be whole on every rank
    (DDP) or split by blocks (FSDP2: `fully_shard`); then scores are gathered, and a rank writes the blocks it holds.

    With a `density_schedule` the model as it is has the density of the end; the updater gives it the initial one at
    once, by random blocks. Shapes follow the density: whatever depends on the sizes of parameters, such as DDP, must
    be made anew after an update.

    Args:
        model (`nn.Module`): a model with `BlockSparseLinear` layers.
        optimizer (`torch.optim.Optimizer`): of this model's parameters; moments of new blocks are cleared in it.
        total_steps (`int`): optimiser steps of the run.
        num_updates (`int`, *optional*), update_every (`float`, *optional*): give one; see `update_steps`.
        first_step, last_step (`float`, *optional*): no update before or after; see `update_steps`.
        pruning_ratio (`float`): share of active blocks that the first update replaces.
        prune_score, regrow_rule (`str`): see `SCORES`.
        schedule (`str`): how the pruning ratio decays; see `SCHEDULES`.
        readmit (`bool`): whether a block pruned in an update may return in the same one (RigL).
        seed (`int`): the same on every rank.
        replace_step (`bool`): whether an update takes the place of the optimiser step before it (RigL). The loop does
            this: no parameter may move in a step that `replaces_step` names.
        regrow_std (`float`): standard deviation of the values of new blocks; 0 makes them zero.
        density_schedule (`str`): how the density goes from the initial to the final one; see `density_share`.
        initial_sparsity (`float`): that of the beginning, with a density schedule.
        density_begin, density_end (`float`): shares of the run between which a named density schedule acts. The last
            update has the final density in any case.
        shrink_counts (`bool`): whether blocks that a smaller density costs count as replaced (MST).
        allocation (`str`): which layers have how many blocks: "layer": as scheduled for each; "global": those of the
            highest prune scores of all layers stay (GraNet); "momentum": what is regrown is shared out by the mean
            gradient momentum of the layers (SNFS).
        final_nnzb (`Mapping[str, int]`, *optional*): active blocks of each layer at the end, when a run resumes: the
            layers then stay as they are.

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
        prune_score: str = "l1",
        regrow_rule: str = "random",
        schedule: str = "cosine",
        readmit: bool = False,
        seed: int = 0,
        *,
        update_every: float | None = None,
        first_step: float | None = None,
        last_step: float | None = None,
        replace_step: bool = False,
        regrow_std: float = 0.0,
        density_schedule: str = "constant",
        initial_sparsity: float = 0.0,
        density_begin: float = 0.0,
        density_end: float = 1.0,
        shrink_counts: bool = False,
        allocation: str = "layer",
        final_nnzb: Mapping[str, int] | None = None,
    ) -> None:
        self.layers: dict[str, BlockSparseLinear] = sparse_layers(model)
        if not self.layers:
            raise ValueError(
                "`TopologyUpdater` needs a model with `BlockSparseLinear` layers. Got none: build a DynSparse model "
                "with sparsity > 0, or call `sparsify_(model, ...)` first."
            )
        self.needs = resolve_score(prune_score, "prune_score", PRUNE_SCORES).needs
        self.needs |= resolve_score(regrow_rule, "regrow_rule", REGROW_RULES).needs
        check_regrow_std(regrow_std)
        check_density(density_schedule, initial_sparsity, density_begin, density_end, allocation)
        self.update_steps = update_steps(total_steps, num_updates, update_every, first_step, last_step)
        pruning_ratio_at(0, max(1, len(self.update_steps)), pruning_ratio, schedule)
        frozen = [name for name, layer in self.layers.items() if not layer.values.requires_grad]
        if self.update_steps and frozen:
            raise ValueError(
                "A topology update regrows blocks at zero, so values must train. Got frozen values in "
                f"{len(frozen)} of {len(self.layers)} sparse layers, first `{frozen[0]}`. Train them, or ask for no "
                "updates: `num_topology_updates=0` in DynSparseTrainingArguments, `num_updates=0` here. With LoRA "
                "only the adapters train."
            )
        shard_again_(model)
        if self.update_steps:
            check_updatable(self.layers, optimizer)
        self.model, self.optimizer = model, optimizer
        self.pruning_ratio, self.schedule, self.seed = pruning_ratio, schedule, seed
        self.prune_score, self.regrow_rule, self.readmit = prune_score, regrow_rule, readmit
        self.regrow_std, self.replace_step = regrow_std, replace_step
        self.needs_gradient = "gradient" in self.needs
        self.needs_momentum = "momentum" in {*self.needs, allocation}
        self.density_schedule, self.initial_sparsity = density_schedule, initial_sparsity
        self.density_begin, self.density_end = density_begin, density_end
        self.shrink_counts, self.allocation, self.total_steps = shrink_counts, allocation, total_steps
        self._probe: DenseGradientProbe | None = None
        for layer in self.layers.values():
            if not is_tracked(layer):
                track_exploration_(layer)
            if self.needs_momentum and not has_momentum(layer):
                track_momentum_(layer)
        self.final_nnzb = dict(final_nnzb or {name: layer.nnzb for name, layer in self.layers.items()})
        if changes_sizes(density_schedule, allocation):
            what = f"density_schedule={density_schedule!r} and allocation={allocation!r}"
            check_sizes_may_change(self.layers, self.num_updates, what)
            if final_nnzb is None:
                self._begin()
        self.prepare(1)

    @property
    def num_updates(self) -> int:
        """Topology updates of the whole run."""
        return len(self.update_steps)

    def replaces_step(self, next_step: int) -> bool:
        """Whether an update takes the place of optimiser step `next_step`."""
        return self.replace_step and next_step in self.update_steps

    def prepare(self, next_step: int) -> None:
        """
        Get ready for the forward and backward passes of optimiser step `next_step`: if it is to be followed by an
        update whose scores need the dense gradient, begin to collect it. `step` does this for the step after; call it
        by hand when a run resumes.
        """
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
        updates_follow = bool(self.update_steps) and next_step <= self.update_steps[-1]
        if (self.needs_gradient and next_step in self.update_steps) or (self.needs_momentum and updates_follow):
            self._probe = DenseGradientProbe(self.layers.values())

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
            if self.needs_momentum and all(map(is_finite, self._probe.gradients.values())):
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
        ratio = pruning_ratio_at(update, self.num_updates, self.pruning_ratio, self.schedule)
        # All layers choose before any is changed, so that a skipped update leaves no trace.
        try:
            targets = self._targets(ratio, update)
            chosen = {
                name: self._choose(name, layer, ratio, update, targets[name]) for name, layer in self.layers.items()
            }
        except FloatingPointError as error:
            logger.warning("Topology update %d of %d is skipped: %s.", update + 1, self.num_updates, error)
            return None
        if self._probe is not None:  # it knows the layers by the memory of their indices
            self._probe.remove()
            self._probe = None
        done = {
            name: replace_blocks_(layer, chosen[name], self.optimizer, update) for name, layer in self.layers.items()
        }
        self.check_ranks_agree()
        removed = sum(layer.removed for layer in done.values())
        newborn = sum(layer.newborn_removed for layer in done.values())
        ages = [block_ages(layer, update + 1).float().mean() for layer in self.layers.values()]
        return TopologyReport(
            update=update,
            pruning_ratio=ratio,
            removed=removed,
            newborn_share=newborn / removed if removed else 0.0,
            coverage=self.coverage(),
            block_age=float(torch.stack(ages).mean()),
            layers=done,
        )

    def _begin(self) -> None:
        for name, nnzb in self._scheduled(0.0).items():
            begin_at_size_(self.layers[name], nnzb, self._generator("start", name))

    def _scheduled(self, progress: float) -> dict[str, int]:
        share = density_share(progress, self.density_schedule, self.density_begin, self.density_end)
        return scheduled_blocks(self.layers, self.final_nnzb, self.initial_sparsity, share)

    def _targets(self, ratio: float, update: int) -> dict[str, int]:
        """Active blocks of each layer after the update."""
        is_last = update == self.num_updates - 1
        scheduled = self._scheduled(1.0 if is_last else self.update_steps[update] / self.total_steps)
        total = sum(scheduled.values())
        if self.allocation == "global":
            score = SCORES[self.prune_score]
            return allocate_globally(
                self.layers,
                total,
                {
                    # The mean over entries, should layers have blocks of several sizes.
                    name: score_slots(layer, score, self._generator(update, f"{name}/all"), self._observed(layer))
                    / layer.values[0].numel()
                    for name, layer in self.layers.items()
                },
            )
        if self.allocation == "momentum":
            replaced = {
                name: replaced_count(ratio, layer.nnzb, layer.num_blocks, self.readmit)
                for name, layer in self.layers.items()
            }
            weights = {name: mean_momentum(layer) for name, layer in self.layers.items()}
            return allocate_by_weight(self.layers, total, replaced, weights)
        return scheduled

    def _generator(self, moment: int | str, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{moment}/{name}".encode()))

    def _observed(self, layer: BlockSparseLinear) -> dict[str, torch.Tensor]:
        observed = self._probe.statistics(layer, self.needs) if self._probe else {}
        if self.needs_momentum:
            observed["momentum"] = layer.get_buffer("gradient_momentum")
        return observed

    def _choose(self, name: str, layer: BlockSparseLinear, ratio: float, update: int, target: int) -> Replacement:
        return choose_replacement(
            layer,
            pruning_ratio=ratio,
            prune_score=self.prune_score,
            regrow_rule=self.regrow_rule,
            readmit=self.readmit,
            regrow_std=self.regrow_std,
            generator=self._generator(update, name),
            observed=self._observed(layer),
            nnzb=target,
            # Under SNFS a layer prunes its share and regrows another: not both.
            shrink_counts=self.shrink_counts or self.allocation == "momentum",
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


def check_updatable(layers: dict[str, BlockSparseLinear], optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse layers whose blocks an update could not find, or whose moments it could not clear.

    Raises:
        ValueError: naming the first such layer.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if layer.values.shape != (len(layer.block_index), *layer.block_shape):
            raise ValueError(
                f"A topology update needs whole blocks. Got `{name}.values` of shape {tuple(layer.values.shape)} for "
                f"{len(layer.block_index)} blocks of {layer.block_shape}: FSDP1 and DeepSpeed ZeRO-3 flatten "
                "parameters. Launch with DDP, or with FSDP2 (`fsdp_version: 2`)."
            )
        local_rows(layer.values)
        if layer.values not in trained:
            raise ValueError(
                f"The optimizer must train the parameters that the model has now. Got one without `{name}.values`. "
                "Make it from `model.parameters()` after `fully_shard`. DeepSpeed keeps copies of its own: use DDP "
                "or FSDP2."
            )
