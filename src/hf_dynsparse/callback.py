"""Training callbacks: topology updates for any `Trainer`, throughput, and epochs for a masking collator."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .nn import sparse_layers, topology_summary
from .ops import choose_backend, configure_kernels
from .ops.backends import Problem
from .ops.choice import (
    Choice,
    allow_new_choices,
    choice_from_json,
    choice_to_json,
    choices_made,
    is_allowed,
    keep_choices,
)
from .optim import group_lasso_
from .resizing import configured, sizes_of, tell_config_
from .topology import TopologyUpdater, ever_active, track_exploration_
from .topology.density import changes_sizes
from .topology.exploration import is_tracked, untrack_exploration_
from .topology.momentum import has_momentum, track_momentum_, untrack_momentum_


logger = logging.getLogger(__name__)

# Not tested, or known to keep no tensor in which a block could be found.
REFUSED = {
    DistributedType.DEEPSPEED: "DeepSpeed, which flattens parameters and moments",
    DistributedType.FSDP: "FSDP1, which flattens parameters",
}


# Why a backend serves a number of blocks that was not timed itself.
INHERITED = "as for nnzb="


class TopologyCallback(TrainerCallback, ExportableState):
    """
    Updates the topology of the sparse layers while they train, with any [`~transformers.Trainer`].

    An update happens in `on_step_end`: after the optimiser step, before that step is logged and saved, so that a
    checkpoint holds the new topology and a resumed run does not repeat it.

    Args:
        num_updates, update_every, first_step, last_step (`float`, *optional*): see [`TopologyUpdater`]; without a
            number of updates or an interval, `default_num_updates` of the run.
        pruning_ratio, prune_score, regrow_rule, regrow_std, schedule, readmit, replace_step, density_schedule,
            initial_sparsity, density_begin, density_end, shrink_counts, allocation, seed: see [`TopologyUpdater`].
        group_lasso (`float`): strength of the decoupled group lasso, applied after every optimiser step.

    Attributes:
        metrics (`dict[str, float]`): `sparsity`, `coverage`, `block_age`, and after the first update `pruning_ratio`,
            `newborn_share` and `topology_updates`.
        ever_active (`dict[str, torch.Tensor]`): after training, per layer, the Boolean map `(block_rows,
            block_columns)` of the positions that were active at any time.
        on_resize (`Callable[[], None]` or `None`): called whenever layers have changed their sizes. A trainer of many
            processes must have one, and make its reducer anew.
    """

    def __init__(
        self,
        num_updates: int | None = None,
        *,
        update_every: float | None = None,
        first_step: float | None = None,
        last_step: float | None = None,
        pruning_ratio: float = 0.5,
        prune_score: str = "l1",
        regrow_rule: str = "random",
        schedule: str = "cosine",
        readmit: bool = False,
        replace_step: bool = False,
        density_schedule: str = "constant",
        initial_sparsity: float = 0.0,
        density_begin: float = 0.0,
        density_end: float = 1.0,
        shrink_counts: bool = False,
        allocation: str = "layer",
        regrow_std: float = 0.0,
        group_lasso: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.settings: dict[str, Any] = {
            "num_updates": num_updates,
            "update_every": update_every,
            "first_step": first_step,
            "last_step": last_step,
            "pruning_ratio": pruning_ratio,
            "prune_score": prune_score,
            "regrow_rule": regrow_rule,
            "schedule": schedule,
            "readmit": readmit,
            "replace_step": replace_step,
            "density_schedule": density_schedule,
            "initial_sparsity": initial_sparsity,
            "density_begin": density_begin,
            "density_end": density_end,
            "shrink_counts": shrink_counts,
            "allocation": allocation,
            "regrow_std": regrow_std,
            "seed": seed,
        }
        self.group_lasso = group_lasso
        self.metrics: dict[str, float] = {}
        self.ever_active: dict[str, torch.Tensor] = {}
        self.on_resize: Callable[[], None] | None = None
        self.resizes = changes_sizes(density_schedule, allocation)
        self._final: dict[str, Any] | None = None
        self._sizes: dict[str, int] = {}
        self._updater: TopologyUpdater | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`; block histories travel in buffers of the model."""
        return {
            "args": {**self.settings, "group_lasso": self.group_lasso},
            "attributes": {"metrics": dict(self.metrics), **({"final": self._final} if self.resizes else {})},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_parallelism(args)
        if self.resizes:
            check_resizing(self.on_resize is not None)
        # The buffers must exist before a checkpoint is loaded into the model.
        if kwargs["model"] is not None:
            self.track_(kwargs["model"])

    @property
    def observed_positions(self) -> int:
        """See [`TopologyUpdater`]; 0 outside of training."""
        return self._updater.observed_positions if self._updater is not None else 0

    def track_(self, model: nn.Module) -> None:
        """Begin to record what this run needs in every sparse layer that does not yet."""
        track_model_(model)
        if "momentum" in (self.settings["regrow_rule"], self.settings["allocation"]):
            for layer in sparse_layers(model).values():
                if not has_momentum(layer):
                    track_momentum_(layer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        check_parallelism(args)
        for name, layer in sparse_layers(model).items():
            layer.layout.validate(f"`{name}`")
            if state.global_step == 0:
                # Initial weights may have been loaded since `on_init_end`.
                track_exploration_(layer)
                untrack_momentum_(layer)
        if state.global_step == 0:
            self.metrics = {}
            self._final = {"sizes": sizes_of(model), **configured(model)}
        else:
            self.restore(state)
        settings = dict(self.settings)
        if settings["num_updates"] is None and settings["update_every"] is None:
            settings["num_updates"] = default_num_updates(state.max_steps)
        if state.global_step > 0 and self._final is not None:
            settings["final_nnzb"] = self._final["sizes"]
        self._updater = TopologyUpdater(model, kwargs["optimizer"], state.max_steps, **settings)
        self._note_sizes(model)
        cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, self.state())
        self._updater.check_ranks_agree()
        self._updater.prepare(state.global_step + 1)
        self.metrics["sparsity"] = topology_summary(model).sparsity
        self.metrics["coverage"] = self._updater.coverage()
        logger.info(
            "Topology: %d sparse layers at sparsity %.4f, %d updates%s, prune by %s, regrow by %s.",
            len(self._updater.layers),
            self.metrics["sparsity"],
            self._updater.num_updates,
            f" from step {self._updater.update_steps[0]} to {self._updater.update_steps[-1]}"
            if self._updater.num_updates
            else "",
            self.settings["prune_score"],
            self.settings["regrow_rule"],
        )

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
            if layer.values in rates:  # not under LoRA, which trains its adapters only
                group_lasso_(layer.values, float(rates[layer.values]), self.group_lasso)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._updater is None:
            return
        report = self._updater.step(state.global_step)
        if report is not None:
            self._note_sizes(kwargs["model"])
            self.metrics.update(
                pruning_ratio=report.pruning_ratio,
                newborn_share=report.newborn_share,
                coverage=report.coverage,
                block_age=report.block_age,
                topology_updates=report.update + 1,
            )

    def _note_sizes(self, model: nn.Module) -> None:
        """Tell everybody if layers have changed their sizes."""
        if not self.resizes or self._sizes == sizes_of(model):
            return
        self._sizes = sizes_of(model)
        self.metrics["sparsity"] = topology_summary(model).sparsity
        tell_config_(model, self._final or configured(model))
        if self.on_resize is not None:
            self.on_resize()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resizes and self._final is not None:
            tell_config_(kwargs["model"], self._final)  # the best model may have been loaded
        self._sizes = {}
        # A finished model is a plain model: what training recorded is kept here, not in its file.
        for name, layer in sparse_layers(kwargs["model"]).items():
            self.ever_active[name] = ever_active(layer).view(layer.grid).cpu()
            untrack_exploration_(layer)
            untrack_momentum_(layer)
        self._updater = None

    def check_settings(self, saved: dict[str, Any]) -> None:
        """
        Compare with the state that a checkpoint keeps of the interrupted run.

        Raises:
            ValueError: naming every setting that differs.
        """
        here = self.state()["args"]
        changed = {name: (value, here[name]) for name, value in saved["args"].items() if here.get(name) != value}
        if changed:
            raise ValueError(
                "A resumed run must update the topology as the interrupted one did. Got "
                + ", ".join(f"{name}: {new!r} (checkpoint: {old!r})" for name, (old, new) in changed.items())
                + ". Give the checkpoint's values, or start a new run in another output folder."
            )

    def restore(self, state: TrainerState) -> None:
        """
        Take over the metrics that the `trainer_state.json` of a checkpoint keeps.

        Raises:
            ValueError: see `check_settings`.
        """
        saved = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        if saved is None:
            logger.warning("The checkpoint was not written by a run with topology updates; coverage starts here.")
            return
        self.check_settings(saved)
        self.metrics = dict(saved["attributes"]["metrics"])
        self._final = saved["attributes"].get("final")


def default_num_updates(total_steps: int) -> int:
    """
    The paper's optimum for 16 x 16 blocks, 80 updates a run; fewer in a run too short for five steps between them.
    """
    return min(80, max(0, total_steps - 1) // 5)


def check_parallelism(args: TrainingArguments) -> None:
    """
    Refuse what keeps parameters or moments in a form of its own, and what accelerate would silently leave out.

    Raises:
        ValueError: for DeepSpeed, FSDP1, FSDP on processors, and processes that were launched together but do not
            know of each other.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.FSDP and state.is_fsdp2:
        return
    received = REFUSED.get(state.distributed_type)
    if received is None and args.fsdp:
        received = "FSDP on processors, which accelerate leaves out"
    if received is not None:
        raise ValueError(
            "Sparse layers train in one process, by DDP (`distributed_type: MULTI_GPU`), or by FSDP2 on accelerators "
            f"(`distributed_type: FSDP`, `fsdp_version: 2`). Got {received}. Launch with one of the files in "
            "examples/accelerate."
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() != state.num_processes:
        raise ValueError(
            f"Processes that were launched together must train together. Got {torch.distributed.get_world_size()} of "
            "them, and each would train alone, for accelerate looks for GPUs and finds none. Add `--use_cpu` "
            "(`TrainingArguments(use_cpu=True)`)."
        )


def check_resizing(reducer_is_rebuilt: bool) -> None:
    """
    Refuse a density that changes where parameters cannot change their sizes.

    Raises:
        ValueError: for FSDP2, and for several processes under a trainer that does not know of it.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.FSDP:
        received = "FSDP2, which splits parameters between ranks"
    elif state.num_processes > 1 and not reducer_is_rebuilt:
        received = f"{state.num_processes} processes under a trainer that does not make its reducer anew"
    else:
        return
    raise ValueError(
        "A density that changes over time needs one process, or DDP under `DynSparseTrainer`. Got "
        f"{received}. Use that, or `density_schedule='constant'` with `allocation='layer'`."
    )


def track_model_(model: nn.Module) -> None:
    """Begin to record the exploration of every sparse layer that does not yet."""
    for layer in sparse_layers(model).values():
        if not is_tracked(layer):
            track_exploration_(layer)


class KernelCallback(TrainerCallback, ExportableState):
    """
    Settles at the first step of a run which backend serves each product: timed on the first rank, the same on all of
    them, kept in checkpoints. So ranks agree, and a resumed run repeats the undisturbed one bit for bit.

    Args:
        tuning, dense_workspace: see [`configure_kernels`].
    """

    def __init__(self, tuning: str = "once", dense_workspace: bool = True) -> None:
        self.tuning, self.dense_workspace = tuning, dense_workspace
        self._saved: list[dict[str, Any]] = []
        self._settled = False
        self._steps: tuple[int, torch.dtype | None] = (0, None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`."""
        return {
            "args": {"tuning": self.tuning, "dense_workspace": self.dense_workspace},
            "attributes": {"choices": self._saved},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        configure_kernels(tuning=self.tuning, dense_workspace=self.dense_workspace)
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        saved = callbacks.get(type(self).__name__)
        self._saved = saved["attributes"]["choices"] if saved is not None and state.global_step > 0 else []
        self._settled = False
        callbacks.setdefault(type(self).__name__, self.state())

    def settle(self, model: nn.Module, tokens: int, dtype: torch.dtype | None) -> None:
        """
        Choose the backends of all layers for steps of `tokens` tokens (0: unknown, a fixed rule decides) in `dtype`
        (default: the layers' own); once a run. Every rank must call it.
        """
        if self._settled:
            return
        self._settled = True
        choices = {
            problem: choice for problem, choice in map(choice_from_json, self._saved) if is_allowed(problem, choice)
        }
        dropped = len(self._saved) - len(choices)
        if dropped:
            logger.warning("%d backends of the interrupted run are not to be had here; others serve.", dropped)
        keep_choices(choices)
        self._steps = tokens, dtype
        self._add_choices(model)

    def settle_again(self, model: nn.Module) -> None:
        """
        After layers have changed their sizes: choose for the new ones. Every rank must call it. A density that was
        timed within a factor of 1.25 speaks for its neighbours, or gradual pruning would time at every update.
        """
        if not self._settled:
            return
        choices, (tokens, dtype) = choices_made(), self._steps
        for layer in sparse_layers(model).values():
            for backward in (False, True):
                problem = layer.problem(tokens, backward=backward, dtype=dtype)
                near = nearest_timed(problem, choices) if problem not in choices else None
                if near is not None:
                    choices[problem] = Choice(choices[near].backend, f"{INHERITED}{near.nnzb}")
        keep_choices(choices)
        self._add_choices(model)

    def _add_choices(self, model: nn.Module) -> None:
        allow_new_choices()
        tokens, dtype = self._steps
        if tokens and PartialState().is_main_process:
            for layer in sparse_layers(model).values():
                for backward in (False, True):
                    choose_backend(layer.problem(tokens, backward=backward, dtype=dtype))
        self._saved = broadcast_object_list([[choice_to_json(*item) for item in choices_made().items()]])[0]
        keep_choices(dict(map(choice_from_json, self._saved)))


def nearest_timed(problem: Problem, choices: dict[Problem, Choice]) -> Problem | None:
    """The same product with the nearest number of blocks, within a factor of 1.25, whose backend was not inherited."""
    near = [
        (abs(math.log(other.nnzb / problem.nnzb)), other.nnzb, other)
        for other, choice in choices.items()
        if replace(problem, nnzb=other.nnzb) == other and not choice.why.startswith(INHERITED)
    ]
    distance, _, nearest = min(near, default=(math.inf, 0, problem), key=lambda item: item[:2])
    return nearest if distance <= math.log(1.25) else None


class ThroughputCallback(TrainerCallback, ExportableState):
    """
    Seconds spent in optimiser steps, data loading, evaluation and saving left out; `tokens` is counted by the trainer.
    Both go on after a resume.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean over the steps of the run so far; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "seconds": self.seconds}}

    def restore(self, state: TrainerState) -> None:
        """Take over what a checkpoint keeps, if it keeps any."""
        saved = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        if saved is not None:
            self.tokens, self.seconds = saved["attributes"]["tokens"], saved["attributes"]["seconds"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens, self.seconds = 0, 0.0
        if state.global_step > 0:
            self.restore(state)
        cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, self.state())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._began


@runtime_checkable
class EpochAware(Protocol):
    """A collator whose draw depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Use the draw of this epoch from now on."""
        ...


class EpochCallback(TrainerCallback):
    """Tells a collator the epoch, so that masks change between epochs and a resumed epoch repeats its own."""

    def __init__(self, collator: EpochAware) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a whole epoch the state may hold 0.9999….
        self.collator.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))
