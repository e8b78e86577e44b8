"""`KernelCallback`: what computes a run, chosen once, the same on all ranks and in a resumed run."""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import ExportableState
from ...models.passes import fuse_passes_
from ...nn.linear import sparse_layers
from ...ops import choose_backend, configure_kernels
from ...ops.choice import Choice, choice_from_json, choice_to_json, current_plan
from ...ops.problem import Problem
from .throughput import keep_state, saved_state


logger = logging.getLogger(__name__)

# Why a backend serves a number of blocks that was not timed itself.
INHERITED = "as for nnzb="


class KernelCallback(TrainerCallback, ExportableState):
    """
    Chooses at the first step of a run which backend serves each product: timed on the first rank, the same on all of
    them, kept in checkpoints. So ranks agree, and a resumed run repeats the undisturbed one bit for bit.

    Args:
        tuning, dense_workspace: see [`configure_kernels`].
        fused_passes (`bool`): see [`fuse_passes_`]; on CPUs. A resumed run goes on as it began.
    """

    def __init__(self, tuning: str = "once", dense_workspace: bool = True, fused_passes: bool = True) -> None:
        self.tuning, self.dense_workspace, self.fused_passes = tuning, dense_workspace, fused_passes
        self._saved: list[dict[str, Any]] = []
        self._steps: tuple[int, torch.dtype | None] | None = None  # tokens and dtype of a step, once it is planned for

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`."""
        return {
            "args": {
                "tuning": self.tuning,
                "dense_workspace": self.dense_workspace,
                "fused_passes": self.fused_passes,
            },
            "attributes": {"choices": self._saved},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        configure_kernels(tuning=self.tuning, dense_workspace=self.dense_workspace)
        saved = saved_state(self, state)
        self._saved = saved["attributes"]["choices"] if saved is not None and state.global_step > 0 else []
        if state.global_step > 0:  # earlier versions did not fuse
            self.fused_passes = saved is not None and saved["args"].get("fused_passes", False)
        if args.device.type == "cpu":
            fuse_passes_(kwargs["model"], self.fused_passes)
        self._steps = None
        keep_state(self, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The state that a run leaves tells of its choices, also where it wrote no checkpoint.
        cast(dict[str, Any], state.stateful_callbacks)[type(self).__name__] = self.state()

    def plan(self, models: Iterable[nn.Module], tokens: int, dtype: torch.dtype | None) -> None:
        """
        Choose the backends of all layers for steps of `tokens` tokens (0: unknown, a fixed rule decides) in `dtype`
        (default: the layers' own); once a run. Every rank must call it.
        """
        if self._steps is not None:
            return
        self._steps = tokens, dtype
        saved, plan = dict(map(choice_from_json, self._saved)), current_plan()
        choices = {problem: choice for problem, choice in saved.items() if plan.is_allowed(problem, choice)}
        if lost := len(saved) - len(choices):
            logger.warning("%d backends of the interrupted run are not to be had here; others serve.", lost)
        self._complete(models, choices)

    def plan_again(self, model: nn.Module) -> None:
        """
        After layers have changed their sizes: choose for the new ones. Every rank must call it. A number of blocks
        that was timed decides for others within a factor of 1.25, or gradual pruning would time at every update.
        """
        if self._steps is None:
            return
        choices = dict(current_plan().choices)
        for problem in self._problems([model]):
            near = nearest_timed(problem, choices) if problem not in choices else None
            if near is not None:
                choices[problem] = Choice(choices[near].backend, f"{INHERITED}{near.nnzb}")
        self._complete([model], choices)

    def _complete(self, models: Iterable[nn.Module], choices: dict[Problem, Choice]) -> None:
        """Fix a plan of `choices` and of those that they lack for `models`, which the first rank makes."""
        plan = current_plan()
        plan.fix(choices)
        if self._steps is not None and self._steps[0] and PartialState().is_main_process:
            plan.is_fixed = False
            for problem in self._problems(models):
                choose_backend(problem)
        self._saved = broadcast_object_list([[choice_to_json(*item) for item in plan.choices.items()]])[0]
        plan.fix(dict(map(choice_from_json, self._saved)))

    def _problems(self, models: Iterable[nn.Module]) -> Iterator[Problem]:
        tokens, dtype = self._steps or (0, None)
        for model in models:
            for layer in sparse_layers(model).values():
                for backward in (False, True):
                    yield layer.problem(tokens, backward=backward, dtype=dtype)


def nearest_timed(problem: Problem, choices: dict[Problem, Choice]) -> Problem | None:
    """The same product with the nearest number of blocks, within a factor of 1.25, whose backend was not inherited."""
    near = [
        (abs(math.log(other.nnzb / problem.nnzb)), other.nnzb, other)
        for other, choice in choices.items()
        if replace(problem, nnzb=other.nnzb) == other and not choice.why.startswith(INHERITED)
    ]
    distance, _, nearest = min(near, default=(math.inf, 0, problem), key=lambda item: item[:2])
    return nearest if distance <= math.log(1.25) else None
