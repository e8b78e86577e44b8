"""`EarlyBirdCallback`: searches for a ticket while any `Trainer` trains, and stops once it changes no more."""

import json
import logging
import time
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import ExportableState, has_length
from ...compress.slimming.gates import Gates, add_gates_, gates_of
from ...compress.slimming.ticket import Kept, Ticket, draw_ticket, ticket_distance, tied_share
from ...nn.linear import SEARCH_GATES
from ...nn.shards import whole
from .throughput import add_to_log, check_alone, keep_state, saved_state


logger = logging.getLogger(__name__)

TICKET_FILE = "ticket.json"


class EarlyBirdCallback(TrainerCallback, ExportableState):
    """
    Adds gates to a dense BERT, presses them down by an L1 penalty, draws a ticket every few steps, and ends training
    once the newest differs little from each of the last ones (arXiv:2101.00063, section 3). Works with any
    [`~transformers.Trainer`].

    The penalty `l1_heads * sum |c| + l1_neurons * sum |c|` is no part of the loss: its gradient is added once per
    optimiser step, after the gradients of micro-batches and ranks have come together and were clipped. It is therefore
    exact whatever the accumulation and the number of processes.

    Tickets of the first steps agree for nothing, for equal gates are ranked by their index: a draw counts only once
    ties decide less than a tenth of `tolerance` of it ([`~early_bird.ticket.tied_share`]).

    Args:
        l1_heads, l1_neurons (`float`): strength of the penalty; sums, not means.
        draw_every (`float`): steps between draws, or below 1 a share of the first epoch; at least a step.
        queue_length (`int`): how many tickets, with the newest, must agree.
        tolerance (`float`): training stops when the largest distance of the newest ticket to the others is below it,
            for heads and for neurons.
        fallback (`float`): steps, or below 1 a share of the first epoch, after which training stops in any case.
        rule: keyword arguments of [`draw_ticket`].

    Attributes:
        ticket (`Ticket` or `None`): the newest.
        metrics (`dict[str, float]`): `distance`, `head_distance`, `neuron_distance`, `head_gates` and `neuron_gates`
            (means of |c|), as of the last draw.
        seconds (`float`): spent in optimiser steps.

    Raises:
        ValueError: for a number out of range, or an unknown name.
    """

    def __init__(
        self,
        *,
        l1_heads: float = 1e-4,
        l1_neurons: float = 1e-4,
        draw_every: float = 0.02,
        queue_length: int = 5,
        tolerance: float = 0.1,
        fallback: float = 0.2,
        **rule: Any,
    ) -> None:
        draw_ticket([torch.ones(1)], [torch.ones(1)], **rule)  # refuses a rule that it cannot draw by
        for name, value in {"l1_heads": l1_heads, "l1_neurons": l1_neurons}.items():
            if value < 0:
                raise ValueError(f"`{name}` must not be negative. Got {value}. 0 turns it off.")
        for name, value in {"draw_every": draw_every, "fallback": fallback, "tolerance": tolerance}.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive. Got {value}.")
        if queue_length < 2:
            raise ValueError(f"`queue_length` must be at least 2: tickets are compared. Got {queue_length}.")
        self.l1_heads, self.l1_neurons = l1_heads, l1_neurons
        self.draw_every, self.fallback = draw_every, fallback
        self.queue_length, self.tolerance = queue_length, tolerance
        self.rule = rule
        self._forget()

    def _forget(self) -> None:
        self.ticket: Ticket | None = None
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self._queue: list[Ticket] = []
        self._history: list[dict[str, float]] = []
        self._began = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in `trainer_state.json`; the gates are in the model."""
        names = ("l1_heads", "l1_neurons", "draw_every", "queue_length", "tolerance", "fallback")
        attributes = {
            "queue": [{"heads": _pack(ticket.heads), "neurons": _pack(ticket.neurons)} for ticket in self._queue],
            "history": self._history,
            "metrics": self.metrics,
            "seconds": self.seconds,
        }
        return {
            "args": {name: getattr(self, name) for name in names} | self.rule,
            "attributes": json.loads(json.dumps(attributes)),
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Before an optimiser is made, or a checkpoint loaded.
        if not any(name.endswith(f".{SEARCH_GATES}") for name, _ in kwargs["model"].named_parameters()):
            add_gates_(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "The L1 penalty is added to gradients in their true scale. Got fp16 without clipping, where they are "
                "still scaled. Give `max_grad_norm`, for example 1, or bf16."
            )
        check_alone(self, state)
        self._forget()
        self._gates = gates_of(kwargs["model"])
        self._every, self._last = schedule(args, state, kwargs["train_dataloader"], self.draw_every, self.fallback)
        if state.global_step > 0:
            self._restore(state)
        keep_state(self, state)
        logger.info("A ticket is drawn every %d steps; the search ends at step %d.", self._every, self._last)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for part, strength in zip(self._gates, (self.l1_heads, self.l1_neurons), strict=True):
            for gates in part:
                cast(Any, gates.grad).add_(gates.detach().sign(), alpha=strength)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, reason = state.global_step, None
        if step % self._every == 0 or step >= self._last:
            if self._draw(step) < self.tolerance:
                reason = "settled"
            elif step >= self._last:
                reason = "fallback"
        self.seconds += time.perf_counter() - self._began
        if reason is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                self._save(Path(str(args.output_dir)), step, reason)

    @property
    def logged(self) -> dict[str, float]:
        """`metrics` by the names that they have in the log."""
        return {f"early_bird/{name}": value for name, value in self.metrics.items()}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        add_to_log(state, kwargs["logs"], self.logged)

    def _draw(self, step: int) -> float:
        """Draw a ticket; its largest distance to the others of a full queue, else infinity."""
        gates = self._drawn = Gates(*([whole(gate.detach()).cpu() for gate in part] for part in self._gates))
        ticket = self.ticket = draw_ticket(*gates, **self.rule)
        earlier = self._queue[-(self.queue_length - 1) :]
        rests_on_ties = tied_share(*gates, **self.rule) > self.tolerance / 10
        self._queue = [] if rests_on_ties else [*earlier, ticket]
        self.metrics = {
            "head_gates": float(torch.cat(gates.heads).abs().mean()),
            "neuron_gates": float(torch.cat(gates.neurons).abs().mean()),
        }
        if earlier:
            distances = [ticket_distance(ticket, other) for other in earlier]
            self.metrics |= {
                "distance": max(distance.largest for distance in distances),
                "head_distance": max(distance.heads for distance in distances),
                "neuron_distance": max(distance.neurons for distance in distances),
            }
        self._history.append({"step": step, **self.metrics})
        return self.metrics["distance"] if len(self._queue) == self.queue_length else float("inf")

    def _save(self, folder: Path, step: int, reason: str) -> None:
        gates = {name: [gate.tolist() for gate in part] for name, part in self._drawn._asdict().items()}
        about = {"step": step, "reason": reason, "seconds": self.seconds, "rule": self.rule, "draws": self._history}
        folder.mkdir(parents=True, exist_ok=True)
        cast(Ticket, self.ticket).save(folder / TICKET_FILE, **about, gates=gates)
        logger.info("The ticket is drawn at step %d (%s): %s.", step, reason, folder / TICKET_FILE)

    def _restore(self, state: TrainerState) -> None:
        saved = saved_state(self, state)
        if saved is None:
            raise ValueError("A search must go on from a checkpoint of a search. Got one without tickets. Begin anew.")
        here = self.state()["args"]
        changed = [name for name in here.keys() | saved["args"].keys() if here.get(name) != saved["args"].get(name)]
        if changed:
            raise ValueError(
                "A resumed search must draw as the interrupted one did. Got other values of "
                f"{', '.join(sorted(changed))}. Give the checkpoint's {saved['args']}, or begin in another folder."
            )
        kept = saved["attributes"]
        sizes = [tuple(len(gate) for gate in part) for part in self._gates]
        self._queue = [Ticket(_unpack(t["heads"]), _unpack(t["neurons"]), *sizes) for t in kept["queue"]]
        self.ticket = self._queue[-1] if self._queue else None
        self._history, self.metrics, self.seconds = kept["history"], kept["metrics"], kept["seconds"]


def schedule(
    args: TrainingArguments, state: TrainerState, dataloader: Any, draw_every: float, fallback: float
) -> tuple[int, int]:
    """
    Steps between draws, and the last step of a search. The first epoch is the whole run if that is shorter, or has no
    epochs.
    """
    epoch = state.max_steps
    if has_length(dataloader):
        epoch = min(epoch, ceil(len(dataloader) / args.gradient_accumulation_steps))
    every, last = (int(number) if number >= 1 else max(1, round(number * epoch)) for number in (draw_every, fallback))
    return every, min(last, state.max_steps)


def _pack(kept: Kept) -> list[str]:
    """A bit for each unit, in hexadecimal digits: a state in JSON has a line for every number."""
    return [format(sum(1 << unit for unit in layer), "x") for layer in kept]


def _unpack(packed: list[str]) -> Kept:
    layers = (bin(int(digits, 16))[:1:-1] for digits in packed)
    return tuple(tuple(unit for unit, bit in enumerate(layer) if bit == "1") for layer in layers)
