"""`TopologyCallback`: topology updates while any `Trainer` trains."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import ExportableState
from ...models.density import configured, distribution_of, sizes_of, tell_config_
from ...nn.linear import trainable_layers
from ...optim.lasso import group_lasso_
from ...reports.layers import model_facts
from ...topology import METHODS, TopologySettings, TopologyUpdater, ever_active, track_, untrack_
from ...topology.exploration import is_tracked
from ...topology.settings import OLD_NAMES, as_settings
from .console import announce
from .refusals import check_parallelism, check_resizing
from .throughput import add_to_log, check_alone, keep_state, saved_state


logger = logging.getLogger(__name__)


class TopologyCallback(TrainerCallback, ExportableState):
    """
    Updates the topology of the sparse layers while they train, with any [`~transformers.Trainer`].

    An update happens in `on_step_end`: after the optimiser step, before that step is logged and saved, so that a
    checkpoint holds the new topology and a resumed run does not repeat it.

    Args:
        settings, options: see [`TopologySettings`]; an option goes before the same of the settings. Without a number
            of updates or an interval, 80, or as many as leave 100 steps between them.
        group_lasso (`float`): strength of the decoupled group lasso, applied after every optimiser step.

    Attributes:
        metrics (`dict[str, float]`): `sparsity`, `coverage`, `block_age`, and after the first update `pruning_ratio`,
            `newborn_share`, `newborn_survival` and `topology_updates`.
        ever_active (`dict[str, torch.Tensor]`): after training, per layer, the Boolean map `(block_rows,
            block_columns)` of the positions that were active at any time.
        on_resize (`Callable[[], None]` or `None`): called whenever layers have changed their sizes. A trainer of many
            processes must have one, and make its reducer anew.
    """

    def __init__(self, settings: TopologySettings | None = None, *, group_lasso: float = 0.0, **options: Any) -> None:
        # transformers, and `check_settings`, give what `state` of any version has saved.
        options = {OLD_NAMES.get(name, name): value for name, value in options.items()}
        self.settings = as_settings(settings, options)
        self.group_lasso = group_lasso
        self.metrics: dict[str, float] = {}
        self.ever_active: dict[str, torch.Tensor] = {}
        self.on_resize: Callable[[], None] | None = None
        self.resizes = self.settings.changes_sizes
        self._final: dict[str, Any] | None = None  # what `configured` says, and the sizes of the model as given
        self.total_steps = 0  # of the run that updates are laid out over
        self._sizes: dict[str, int] = {}
        self._updater: TopologyUpdater | None = None
        self._hooks: list[RemovableHandle] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`; block histories travel in buffers of the model."""
        return {
            "args": {**asdict(self.settings), "group_lasso": self.group_lasso},
            "attributes": {
                "metrics": dict(self.metrics),
                "total_steps": self.total_steps,
                **({"final": self._final} if self.resizes else {}),
            },
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_parallelism(args)
        if self.resizes:
            check_resizing(self.on_resize is not None, bool(args.load_best_model_at_end))
        # What a checkpoint has recorded needs a place when it is loaded. Until then the model is a plain one.
        track = partial(_track_what_comes, self.settings.needs)
        layers = trainable_layers(kwargs["model"]).values() if kwargs["model"] is not None else ()
        self._hooks = [layer.register_load_state_dict_pre_hook(track) for layer in layers]

    @property
    def observed_positions(self) -> int:
        """See [`TopologyUpdater`]; 0 outside of training."""
        return self._updater.observed_positions if self._updater is not None else 0

    @property
    def has_final_density(self) -> bool:
        """See [`TopologyUpdater`]; `True` outside of training."""
        return self._updater is None or self._updater.has_final_density

    def given_sizes(self, model: nn.Module) -> dict[str, int]:
        """Active blocks of each sparse layer before this run, or one that it repeats, began to change them."""
        if self._final is not None:
            return dict(self._final["sizes"])
        return {
            name: layer.nnzb if layer.given_nnzb is None else layer.given_nnzb
            for name, layer in trainable_layers(model).items()
        }

    def track_(self, model: nn.Module) -> None:
        """Begin to record what this run needs in every sparse layer that does not yet."""
        for layer in trainable_layers(model).values():
            track_(layer, self.settings.needs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        check_parallelism(args)
        check_alone(self, state)
        if self.resizes:
            check_resizing(self.on_resize is not None, bool(args.load_best_model_at_end))
        while self._hooks:
            self._hooks.pop().remove()
        for name, layer in trainable_layers(model).items():
            layer.layout.validate(f"`{name}`")
            if state.global_step == 0:
                untrack_(layer)  # the updater begins anew
        if state.global_step == 0:
            self.metrics, self.total_steps = {}, state.max_steps
        else:
            self.restore(state, state.max_steps)
        settings = self.settings.for_run(self.total_steps)
        given = self._final["sizes"] if state.global_step > 0 and self._final is not None else None
        if self.total_steps != state.max_steps:
            settings, given = settings.without_updates(), None
        self._updater = TopologyUpdater(
            model,
            kwargs["optimizer"],
            state.max_steps,
            settings,
            distribution=distribution_of(model),
            given_nnzb=given,
        )
        sizes = self._updater.given_nnzb
        # A run that is begun again leads where it led, whatever the configuration of a half-way model says.
        if self._final is None or (state.global_step == 0 and self._final["sizes"] != sizes):
            self._final = {"sizes": sizes, **configured(model, self.settings.final_sparsity)}
        self._sizes = {}
        self.note_sizes(model)
        keep_state(self, state)
        self._updater.prepare(state.global_step + 1)
        self.metrics["sparsity"] = model_facts(model).sparsity
        self.metrics["coverage"] = self._updater.coverage()
        announce(logger, self._describe(self._updater, settings), args)

    def _describe(self, updater: TopologyUpdater, settings: TopologySettings) -> str:
        """One line: what the run does to the topology."""
        density = "" if settings.density_schedule == "constant" else f" on the way to {updater.final_sparsity:.4f}"
        begin = f"Topology: {len(updater.layers)} sparse layers at sparsity {self.metrics['sparsity']:.4f}{density}"
        if updater.num_updates == 0:
            return f"{begin}, no updates: the pattern stays."
        steps, count = updater.update_steps, updater.num_updates
        when = f"update at step {steps[0]}" if count == 1 else f"updates from step {steps[0]} to {steps[-1]}"
        default = "" if self.settings.say_when else " (by default: at most 80, and 100 steps for new blocks to grow)"
        regrow = "remember what was pruned" if settings.hidden_copy else f"regrow by {settings.regrow_rule}"
        return f"{begin}, {count} {when}{default}, prune by {settings.prune_score}, {regrow}."

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._replaces_step(state):
            for group in kwargs["optimizer"].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # an optimiser leaves such a parameter alone, weight decay included

    def _replaces_step(self, state: TrainerState) -> bool:
        return self._updater is not None and self._updater.replaces_step(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.group_lasso or self._updater is None or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        if self._replaces_step(state):
            return
        rates = {parameter: group["lr"] for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        for layer in self._updater.layers.values():
            # Not under LoRA, which trains its adapters only, nor where layers are frozen.
            if layer.values in rates and layer.values.requires_grad:
                group_lasso_(layer.values, float(rates[layer.values]), self.group_lasso)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._updater is None:
            return
        report = self._updater.step(state.global_step)
        if report is not None:
            self.note_sizes(kwargs["model"])
            self.metrics.update(
                pruning_ratio=report.pruning_ratio,
                newborn_share=report.newborn_share,
                newborn_survival=report.newborn_survival,
                coverage=report.coverage,
                block_age=report.block_age,
                topology_updates=report.update + 1,
            )

    def note_sizes(self, model: nn.Module) -> None:
        """Tell everybody if layers have changed their sizes: metrics, the configuration, the reducer of DDP."""
        if not self.resizes or self._sizes == sizes_of(model):
            return
        self._sizes = sizes_of(model)
        self.metrics["sparsity"] = model_facts(model).sparsity
        tell_config_(model, self._final or configured(model))
        if self.on_resize is not None:
            self.on_resize()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resizes and self._final is not None:
            tell_config_(kwargs["model"], self._final)  # the best model may have been loaded
        self._sizes = {}
        self.end(kwargs["model"])

    def end(self, model: nn.Module) -> None:
        """
        Leave a plain model behind: what training has recorded is kept here, not in its file, and nothing observes it
        any more. After an interruption, which no callback hears of, call it yourself; [`DynSparseTrainer`] does.
        """
        layers = trainable_layers(model)
        self.ever_active |= {
            name: ever_active(layer).view(layer.grid).cpu() for name, layer in layers.items() if is_tracked(layer)
        }
        for layer in layers.values():
            untrack_(layer)
        if self._updater is not None:
            self._updater.close()
            self._updater = None

    @property
    def logged(self) -> dict[str, float]:
        """`metrics` by the names that they have in the log."""
        return {f"dynsparse/{name}": value for name, value in self.metrics.items()}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        add_to_log(state, kwargs["logs"], self.logged)

    def check_settings(self, saved: dict[str, Any]) -> None:
        """
        Compare with the state that a checkpoint keeps of the interrupted run.

        Raises:
            ValueError: naming every setting that differs.
        """
        there, here = (callback.state()["args"] for callback in (type(self)(**saved["args"]), self))
        if METHODS[there["method"]].decides == METHODS[here["method"]].decides:
            del there["method"]  # a preset: what it amounts to is compared
        changed = {name: (value, here[name]) for name, value in there.items() if here[name] != value}
        if changed:
            raise ValueError(
                "A resumed run must update the topology as the interrupted one did. Got "
                + ", ".join(f"{name}: {new!r} (checkpoint: {old!r})" for name, (old, new) in changed.items())
                + ". Give the checkpoint's values, or start a new run in another output folder."
            )

    def check_steps(self, planned: int, done: int, max_steps: int) -> int:
        """
        Of how many steps the run is whose updates a resumed run of `max_steps` makes, if the interrupted one has laid
        them out over `planned` and is at step `done`: `max_steps`, or `planned` if all updates are done.

        Raises:
            ValueError: if updates are to come, and a run of `max_steps` would have made others so far.
        """
        plan = self.settings.for_run(planned).plan(planned)
        made = [update for update in plan if update.step <= done]
        all_made = len(made) == len(plan)
        if max_steps == planned or (all_made and max_steps < planned):
            return planned
        with suppress(ValueError):  # so many updates do not fit
            if made == [update for update in self.settings.for_run(max_steps).plan(max_steps) if update.step <= done]:
                return max_steps
        if all_made:
            return planned
        raise ValueError(
            "Topology updates, pruning ratios and densities are laid out over the steps of a run, so a resumed run "
            f"must have as many until its updates are done. Got max_steps={max_steps}, but the checkpoint at step "
            f"{done} is of a run of {planned} steps with {len(made)} of {len(plan)} updates made. Give "
            f"max_steps={planned}, and more when that run has ended; or start a new run in another output folder."
        )

    def check_run(self, state: TrainerState, max_steps: int) -> int:
        """
        Compare with the run whose checkpoint holds `state`, to be resumed for `max_steps` (or less than 1: unknown).

        Returns:
            `int`: over how many steps the updates are laid out; see `check_steps`.

        Raises:
            ValueError: see `check_settings` and `check_steps`.
        """
        saved = saved_state(self, state)
        if saved is None:
            return max_steps
        self.check_settings(saved)
        planned = int(saved["attributes"].get("total_steps", max_steps))
        return self.check_steps(planned, state.global_step, max_steps) if max_steps > 0 else planned

    def restore(self, state: TrainerState, max_steps: int) -> None:
        """
        Take over what the `trainer_state.json` of a checkpoint keeps, for a run of `max_steps`.

        Raises:
            ValueError: see `check_run`.
        """
        self.total_steps = self.check_run(state, max_steps)
        saved = saved_state(self, state)
        if saved is None:
            logger.warning("The checkpoint was not written by a run with topology updates; coverage starts here.")
            return
        if self.total_steps != max_steps:
            logger.info("All topology updates of the run of %d steps are done: the topology stays.", self.total_steps)
        self.metrics = dict(saved["attributes"]["metrics"])
        self._final = saved["attributes"].get("final")


def _track_what_comes(needs: frozenset[str], layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a layer loads: make room for what a checkpoint has recorded, if it has."""
    if f"{prefix}ever_active" in state_dict:
        track_(layer, needs)
