"""The topology of a whole model over a run: `TopologyUpdater`, for any training loop."""

import logging
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.linear import BlockSparseLinear, trainable_layers
from ..nn.shards import shard_again_
from ..optim.moments import check_optimizer_state, check_state_size
from .active_gradient import ActiveGradientProbe
from .checks import check_ranks_agree, check_sizes_may_change, check_updatable
from .context import UpdateContext
from .counts import count_entries, largest_block
from .dense_gradient import DenseGradientProbe
from .density import begin_, density_path, sizes_as_given
from .exploration import dof_coverage
from .records import records_of, track_
from .report import ChurnWarning, TopologyReport, report_update
from .settings import TopologySettings, as_settings
from .update import LayerUpdate, is_finite, replace_blocks_


logger = logging.getLogger(__name__)


class TopologyUpdater:
    """
    Prunes and regrows the sparse layers of `model` at fixed steps of a run (arXiv:2108.06277, section 3).

    Random draws depend on `(seed, number of the update, layer name)` alone: ranks agree without communication and a
    resumed run repeats them. Every rank's topology is compared at the start and after each update. Layers may be whole
    on every rank (DDP) or split by blocks (FSDP2: `fully_shard`); then scores are gathered, and a rank writes the
    blocks it holds.

    With a `density_schedule` the model as it is has the density of the end; the updater gives it the initial one at
    once, by random blocks. The layers remember the sizes that they were given with, so that a run that is begun again
    after an interruption ends there too; `prune_regrow_(..., nnzb=...)` decides anew. With a `final_sparsity` too, the
    model has the density of the beginning, and keeps its blocks. Shapes follow the density: moments do by themselves;
    whatever else depends on the sizes of parameters, such as DDP, must be made anew after an update.

    A layer whose values are frozen (`requires_grad=False`) during the run keeps its blocks until they train again.

    Args:
        model (`nn.Module`): a model with `BlockSparseLinear` layers.
        optimizer (`torch.optim.Optimizer`): of this model's parameters; moments of new blocks are cleared in it.
        total_steps (`int`): optimiser steps of the run.
        settings, options: see [`TopologySettings`]; an option goes before the same of the settings.
        distribution (`str`): how `final_sparsity` is spread over the layers; see `hf_dynsparse.distributions`.
        given_nnzb (`Mapping[str, int]`, *optional*): active blocks of each layer of the model that the run was started
            with, when it resumes: the layers then stay as they are.

    Raises:
        ValueError: for arguments out of range, a model without sparse layers, frozen values to update, layers that
            share values or block index, values that the optimizer does not have or has moments of another size for,
            or values flattened or split otherwise than by blocks (FSDP1, DeepSpeed).
        RuntimeError: if the ranks of a distributed run disagree about the topology, or about its updates.

    Example:
        ```python
        updater = TopologyUpdater(model, optimizer, total_steps=1000, num_topology_updates=80)
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
        settings: TopologySettings | None = None,
        *,
        distribution: str = "uniform",
        given_nnzb: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        self.layers: dict[str, BlockSparseLinear] = trainable_layers(model)
        if not self.layers:
            raise ValueError(
                "`TopologyUpdater` needs a model with `BlockSparseLinear` layers. Got none: build a DynSparse model "
                "with sparsity > 0, or call `sparsify_(model, ...)` first."
            )
        self.settings = as_settings(settings, options)
        self.plan = self.settings.plan(total_steps)
        self.update_steps = tuple(update.step for update in self.plan)
        shard_again_(model)
        if self.plan:
            check_updatable(self.layers, optimizer, self.settings.needs)
        for name, layer in self.layers.items():
            check_state_size(optimizer, layer.values, f"{name}.values")
        self.model, self.optimizer, self.total_steps = model, optimizer, total_steps
        self._probe: DenseGradientProbe | None = None
        self._active_probe: ActiveGradientProbe | None = None
        self._churn = ChurnWarning(self.settings.prune_score)
        self._told_frozen = False
        self._needs = self.settings.needs
        for layer in self.layers.values():
            track_(layer, self._needs)
        self.given_nnzb = sizes_as_given(self.layers, self.settings) if given_nnzb is None else dict(given_nnzb)
        self._path = density_path(self.layers, self.given_nnzb, self.settings, distribution)
        if self.settings.changes_sizes:
            what = f"density_schedule={self.settings.density_schedule!r} and allocation={self.settings.allocation!r}"
            check_sizes_may_change(self.layers, self.num_updates, what)
        if self.settings.density_schedule != "constant":
            begin_(self.layers, self._path, self.given_nnzb, self.settings, optimizer, is_new=given_nnzb is None)
        self.check_ranks_agree()
        self.prepare(1)

    @property
    def num_updates(self) -> int:
        """Topology updates of the whole run."""
        return len(self.update_steps)

    @property
    def final_sparsity(self) -> float:
        """That which the run leads to."""
        end = count_entries(self.layers, self._path.at(self.settings.density_share(1.0)))
        return 1.0 - end / sum(layer.in_features * layer.out_features for layer in self.layers.values())

    @property
    def has_final_density(self) -> bool:
        """Whether the model has as many active entries as the run leads to, to one block."""
        scheduled, layers = self._path.at(self.settings.density_share(1.0)), self._training()
        if not self.settings.shares_out:
            return all(layer.nnzb == scheduled[name] for name, layer in layers.items())
        active = count_entries(layers, {name: layer.nnzb for name, layer in layers.items()})
        return not layers or abs(active - self._budget(scheduled, layers)) < largest_block(layers)

    def replaces_step(self, next_step: int) -> bool:
        """Whether an update takes the place of optimiser step `next_step`."""
        return self.settings.replace_step and next_step in self.update_steps

    def prepare(self, next_step: int) -> None:
        """
        Get ready for the forward and backward passes of optimiser step `next_step`: if it is to be followed by an
        update that needs its dense gradient, or gradients of all steps, begin to collect them. `step` does this for
        the step after; call it by hand when a run resumes.
        """
        self.close()
        updates_follow = bool(self.update_steps) and next_step <= self.update_steps[-1]
        update_is_next = next_step in self.update_steps
        if (self.settings.observes_updates and update_is_next) or (
            self.settings.observes_every_step and updates_follow
        ):
            gradient = "gradient" in self._needs or self.settings.observes_every_step
            scales = not self._needs.isdisjoint({"input_scale", "output_scale"})
            self._probe = DenseGradientProbe(self._training().values(), gradient, scales)
        if self.settings.observes_active_blocks and updates_follow:
            self._active_probe = ActiveGradientProbe(self.optimizer, self._training().values())

    def close(self) -> None:
        """
        Collect no gradient any more: when a run ends before its last update. An updater that is dropped is closed.
        """
        for probe in (self._probe, self._active_probe):
            if probe is not None:
                probe.remove()
        self._probe = self._active_probe = None

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
            if self.settings.observes_every_step and all(map(is_finite, self._probe.gradients.values())):
                for layer in self._probe.gradients:
                    for record in records_of(layer):
                        if record.after_step is not None:
                            record.after_step(layer, self._probe)
        report = self._update(self.update_steps.index(global_step)) if global_step in self.update_steps else None
        self.prepare(global_step + 1)
        return report

    @property
    def observed_positions(self) -> int:
        """Inactive positions whose gradient is being collected for the next update; usually none."""
        if self._probe is None or not self._probe.gradient:
            return 0
        return sum(layer.in_features * layer.out_features - layer.values.numel() for layer in self._probe.layers)

    def coverage(self) -> float:
        """DOF coverage so far."""
        return dof_coverage(self.layers.values())

    def check_ranks_agree(self) -> None:
        """
        Compare the topology of all ranks, and the updates that are to come; nothing to do in a single process.

        Raises:
            RuntimeError: on every rank, naming the ranks that differ from rank 0.
        """
        run = repr((self.settings, self.total_steps, sorted(self.given_nnzb.items())))
        device = next(iter(self.layers.values())).block_index.device
        here = f"{self.num_updates} updates in {self.total_steps} steps by {self.settings}"
        check_ranks_agree(self.checksum(), zlib.crc32(run.encode()), device, here)

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
        layers = self._to_update()
        for layer in layers.values():
            check_optimizer_state(self.optimizer, layer.values)
        # All layers choose before any is changed, so that a skipped update leaves no trace.
        try:
            context = self._context(update, layers)
            targets = context.targets() if layers else {}
            chosen = {name: context.choose(name, targets[name]) for name in layers}
        except FloatingPointError as error:
            logger.warning("Topology update %d of %d is skipped: %s.", update + 1, self.num_updates, error)
            return None
        self.close()  # a probe finds its layers by their index tensors, which may now be replaced
        done = dict.fromkeys(self.layers, LayerUpdate(0, 0))
        for name, layer in layers.items():
            done[name] = replace_blocks_(layer, chosen[name], self.optimizer, update)
        self.check_ranks_agree()
        report = report_update(self.layers, done, update, context.pruning_ratio)
        self._churn.look_at(report)
        return report

    def _training(self) -> dict[str, BlockSparseLinear]:
        """The layers whose values train at this moment."""
        return {name: layer for name, layer in self.layers.items() if layer.values.requires_grad}

    def _to_update(self) -> dict[str, BlockSparseLinear]:
        """The layers of an update: not those that are frozen, nor those whose gradient was, when it was collected."""
        layers = self._training()
        if self._probe is not None:
            layers = {name: layer for name, layer in layers.items() if self._probe.has_seen(layer)}
        frozen = [name for name in self.layers if name not in layers]
        if frozen and not self._told_frozen:
            self._told_frozen = True
            logger.warning(
                "%d of %d sparse layers, first `%s`, are frozen: topology updates leave them as they are.",
                len(frozen),
                len(self.layers),
                frozen[0],
            )
        return layers

    def _context(self, update: int, layers: dict[str, BlockSparseLinear]) -> UpdateContext:
        planned = self.plan[update]
        scheduled = self._path.at(planned.density_share)
        budget = self._budget(scheduled, layers)
        # What an update takes the place of is no step.
        steps = tuple(step - done * self.settings.replace_step for done, step in enumerate(self.update_steps, start=1))
        known = self._probe, self.optimizer, steps[: update + 1]
        return UpdateContext(update, planned.pruning_ratio, self.settings, layers, scheduled, budget, *known)

    def _budget(self, scheduled: Mapping[str, int], layers: Mapping[str, BlockSparseLinear]) -> int:
        """Active entries for `layers` beside the others, which stay as they are: a block each at least."""
        others = {name: layer for name, layer in self.layers.items() if name not in layers}
        taken = count_entries(others, {name: layer.nnzb for name, layer in others.items()})
        return max(count_entries(self.layers, scheduled) - taken, count_entries(layers, dict.fromkeys(layers, 1)))

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
