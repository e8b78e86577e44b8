"""
Which backend serves a product: the fastest, timed once, or one that was asked for.

The first product of a kind times the backends that can serve it and remembers the fastest, on disk as well if the
machine was calm. A fixed rule decides where timings do not: nothing is timed, samples disagree, or it is a tie. A run
makes all its choices at its first step and keeps them, so that it repeats itself bit for bit.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from . import tuning
from .backends import BACKENDS, Backend
from .checks import Weight
from .problem import Problem


logger = logging.getLogger(__name__)

TUNING_MODES = ("off", "once", "force")

# Never chosen by itself.
ONLY_ON_REQUEST = {"reference"}

# The backend of the rule serves unless another is faster by more than this: near ties would change from run to run.
TIE = 1.1


@dataclass(frozen=True)
class Choice:
    """The backend for one problem, why, and when it was timed, if it was (seconds since the epoch)."""

    backend: str
    why: str
    timed: float | None = None

    @property
    def reason(self) -> str:
        """Why, with the age of a timing."""
        if self.timed is None:
            return self.why
        age, unit = max(0.0, time.time() - self.timed), "s"
        for length, longer in ((86400, "days"), (3600, "h"), (60, "min")):
            if age >= length:
                age, unit = age / length, longer
                break
        return self.why.replace("timed", f"timed {age:.0f} {unit} ago", 1)


class Served(NamedTuple):
    """What serves operands of certain sizes: a backend (`None` on the meta device), and what the ids must fit."""

    backend: Backend | None
    weight: Weight


class KernelPlan:
    """
    Which backend serves which problem.

    Args:
        tuning (`str`): `"once"`: time a problem when it is first met, unless the disk knows; `"force"`: whatever the
            disk knows; `"off"`: never, a fixed rule decides.
        dense_workspace (`bool`): whether a dense weight may exist for the time of a product.

    Attributes:
        choices (`dict[Problem, Choice]`): all that were made so far.
        is_fixed (`bool`): whether no others are made by timing; see `fix`.
        served (`dict`): what follows from the choices for operands that were met, by all that the rules look at of
            them: one look-up tells a product that its operands fit and which backend serves them.
    """

    MOST_SERVED = 4096  # each number of tokens counts

    def __init__(self, tuning: str = "once", dense_workspace: bool = True) -> None:
        self.tuning, self.dense_workspace = tuning, dense_workspace
        self.choices: dict[Problem, Choice] = {}
        self.is_fixed = False
        self.served: dict[Any, Served] = {}

    def choose(self, problem: Problem) -> Choice:
        """
        The choice for `problem`, made when it is first met.

        Raises:
            ValueError: if no backend can serve; the message gives each backend's reason.
        """
        choice = self.choices.get(problem)
        if choice is None:
            choice = self._nearest(problem) if self.is_fixed else self._decide(problem)
            self.choices[problem] = choice
            logger.debug("%s: %s (%s).", problem, choice.backend, choice.why)
        return choice

    def fix(self, choices: Mapping[Problem, Choice]) -> None:
        """
        Use these choices and make no others by timing: a problem that is not among them is served like the most
        similar one. Ranks that are given the same choices agree, whatever they meet.
        """
        self.choices = dict(choices)
        self.is_fixed = True
        self.served.clear()

    def serve(self, key: Any, problem: Problem, weight: Weight) -> Served:
        """Choose what serves `problem`, and remember it under `key`, what the rules looked at."""
        served = Served(None if problem.device.type == "meta" else choose_backend(problem), weight)
        if len(self.served) >= self.MOST_SERVED:
            self.served.clear()
        self.served[key] = served
        return served

    def candidates(self, problem: Problem) -> list[Backend]:
        """
        The backends that can serve and may be chosen.

        Raises:
            ValueError: if there is none; the message gives each backend's reason.
        """
        barred = ONLY_ON_REQUEST if self.dense_workspace else ONLY_ON_REQUEST | {"workspace"}
        return _serving(problem, [backend for name, backend in BACKENDS.items() if name not in barred])

    def is_allowed(self, problem: Problem, choice: Choice) -> bool:
        """Whether the backend of `choice` can serve `problem` here and now."""
        return choice.backend in [backend.name for backend in self.candidates(problem)]

    def describe(self, problem: Problem) -> tuple[str, str]:
        """See `describe_choice`."""
        known = [
            (other, choice)
            for other, choice in self.choices.items()
            if (other.device, other.block_shape, other.shape, other.nnzb)
            == (problem.device, problem.block_shape, problem.shape, problem.nnzb)
        ]
        if not known:
            choice = _by_rule(problem, self.candidates(problem))
            return choice.backend, f"not used yet; {choice.reason}"
        names, reasons = [], []
        for backward in (False, True):
            met = [(other.tokens, choice) for other, choice in known if other.backward == backward]
            if met:
                _, choice = max(met, key=lambda item: item[0])
                names.append(choice.backend)
                reasons.append(f"{'backward' if backward else 'forward'} {choice.reason}")
        return "/".join(dict.fromkeys(names)), "; ".join(reasons)

    def _decide(self, problem: Problem) -> Choice:
        rivals = self.candidates(problem)
        ruled = _by_rule(problem, rivals)
        if self.tuning == "off":
            return ruled
        if any(backend.name == "workspace" for backend in rivals):
            # Tiles do the work of the workspace in less memory: never faster.
            rivals = [backend for backend in rivals if backend.name != "tiled"]
        missing = _missing(problem)
        if len(rivals) == 1:
            return Choice(rivals[0].name, f"no other can serve{missing}")
        timing = None if self.tuning == "force" else tuning.recall(problem, rivals)
        if timing is None:
            timing = tuning.time_backends(problem, rivals)
            if timing.steady and timing.calm:
                tuning.remember(problem, rivals, timing)
        if not timing.steady:
            return Choice(ruled.backend, f"{ruled.why}; timings were scattered")
        seconds, best = timing.seconds, timing.fastest
        if seconds.get(ruled.backend, math.inf) <= TIE * seconds[best]:
            best = ruled.backend
        times = ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in seconds.items())
        busy = "" if timing.calm else "; not kept, the machine was busy"
        return Choice(best, f"timed: {times}{busy}{missing}", timing.when)

    def _nearest(self, problem: Problem) -> Choice:
        known = [other for other in self.choices if replace(problem, tokens=other.tokens) == other]
        if not known:
            return _by_rule(problem, self.candidates(problem))
        nearest = min(known, key=lambda other: abs(other.tokens.bit_length() - problem.tokens.bit_length()))
        return Choice(self.choices[nearest].backend, f"as for {nearest.tokens} tokens")


# Of the process, not of a context: autograd runs backward passes on threads of its own.
plan = KernelPlan()
requested: str | None = None  # by `use_backend`, whatever the plan


def configure_kernels(*, tuning: str | None = None, dense_workspace: bool | None = None) -> None:
    """
    Change how this process chooses its backends; choices made so far are forgotten.

    Args:
        tuning (`str`, *optional*): `"once"` (the default of the process): backends are timed when a product is first
            met, and the result is kept on disk per machine and version; `"force"`: timed again; `"off"`: a fixed rule.
        dense_workspace (`bool`, *optional*): whether a dense weight may exist for the time of one product, where that
            is faster. Without it no dense weight or gradient is ever made.

    Raises:
        ValueError: for another `tuning`.
    """
    global plan
    if tuning is not None and tuning not in TUNING_MODES:
        raise ValueError(f"`tuning` must be one of {', '.join(TUNING_MODES)}. Got {tuning!r}.")
    plan = KernelPlan(
        plan.tuning if tuning is None else tuning,
        plan.dense_workspace if dense_workspace is None else dense_workspace,
    )


def current_plan() -> KernelPlan:
    """The plan of this process, until the next `configure_kernels`."""
    return plan


def choose_backend(problem: Problem) -> Backend:
    """
    The backend for `problem`: the one named by `use_backend`, or the one of the plan.

    Raises:
        ValueError: if none can serve; the message gives each backend's reason.
    """
    if requested is not None:
        return _serving(problem, [BACKENDS[requested]])[0]
    return BACKENDS[plan.choose(problem).backend]


def describe_choice(problem: Problem) -> tuple[str, str]:
    """
    Which backend serves a layer, `forward/backward` where they differ, and why: for the most tokens met so far.

    Args:
        problem (`Problem`): of the layer; tokens, direction, dtype and threads do not matter.
    """
    return plan.describe(problem) if requested is None else (requested, "asked for with `use_backend`")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Serve every product of the process inside the `with` block by one backend.

    Raises:
        ValueError: if no backend has that name.
    """
    global requested
    if name not in BACKENDS:
        raise ValueError(f"`use_backend` takes one of {', '.join(BACKENDS)}. Got {name!r}.")
    before, requested = requested, name
    try:
        yield
    finally:
        requested = before


def choice_to_json(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Both as what a JSON file can hold."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return {**asdict(problem), "device": problem.device.type, "dtype": dtype, **asdict(choice)}


def choice_from_json(saved: dict[str, Any]) -> tuple[Problem, Choice]:
    """What `choice_to_json` was given."""
    fields = {**saved, "device": torch.device(saved["device"]), "dtype": getattr(torch, saved["dtype"])}
    choice = Choice(fields.pop("backend"), fields.pop("why"), fields.pop("timed", None))
    return Problem(**{**fields, "block_shape": tuple(saved["block_shape"]), "shape": tuple(saved["shape"])}), choice


def _by_rule(problem: Problem, candidates: list[Backend]) -> Choice:
    for backend in candidates:
        limit = backend.break_even(problem.device, problem.block_shape)
        if problem.density <= limit:
            why = f"by rule: density {problem.density:.3g} is at most {limit:.3g}{_missing(problem)}"
            return Choice(backend.name, why)
    return Choice(candidates[-1].name, "by rule: the last that can serve")


def _missing(problem: Problem) -> str:
    """Why the backends made for this device cannot serve, if they cannot; those of plain PyTorch do not count."""
    reasons = {
        backend.name: backend.why_not(problem.device, problem.dtype, problem.block_shape)
        for backend in BACKENDS.values()
        if backend.device == problem.device.type
    }
    return "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason is not None)


def _serving(problem: Problem, backends: Iterable[Backend]) -> list[Backend]:
    """Those of the backends that can serve."""
    reasons = {
        backend.name: backend.why_not(problem.device, problem.dtype, problem.block_shape) for backend in backends
    }
    able = [BACKENDS[name] for name, reason in reasons.items() if reason is None]
    if not able:
        rows, columns = problem.block_shape
        raise ValueError(
            f"No backend serves {rows} x {columns} blocks of {problem.dtype} on {problem.device}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    return able
