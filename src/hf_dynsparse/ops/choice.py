"""
Which backend serves a product: the fastest, timed once, or one that was asked for.

The first product of a kind times the backends that can serve it and remembers the fastest, on disk as well if the
machine was calm. A fixed rule decides where timings do not: nothing is timed, samples disagree, or it is a tie. A run
settles all its choices at its first step and keeps them, so that it repeats itself bit for bit.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import tuning
from .backends import BACKENDS, Backend
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


@dataclass
class Settings:
    """
    How backends are chosen.

    Args:
        tuning (`str`): `"once"`: time a problem when it is first met, unless the disk knows; `"force"`: whatever the
            disk knows; `"off"`: never, a fixed rule decides.
        dense_workspace (`bool`): whether a dense weight may exist for the time of a product.
    """

    tuning: str = "once"
    dense_workspace: bool = True


# Of the process, not of a context: autograd runs backward passes on threads of its own.
_settings = Settings()
_override: str | None = None
_choices: dict[Problem, Choice] = {}
_settled = False


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
    if tuning is not None and tuning not in TUNING_MODES:
        raise ValueError(f"`tuning` must be one of {', '.join(TUNING_MODES)}. Got {tuning!r}.")
    _settings.tuning = _settings.tuning if tuning is None else tuning
    _settings.dense_workspace = _settings.dense_workspace if dense_workspace is None else dense_workspace
    _choices.clear()
    allow_new_choices()


def choose_backend(problem: Problem) -> Backend:
    """
    The backend for `problem`: the one named by `use_backend`, or the one chosen before, or the fastest by timing.

    Raises:
        ValueError: if none can serve; the message gives each backend's reason.
    """
    if _override is not None:
        return _serving(problem, [_override])[0]
    choice = _choices.get(problem)
    if choice is None:
        choice = _nearest(problem) if _settled else _decide(problem)
        _choices[problem] = choice
        logger.info("%s: %s (%s).", problem, choice.backend, choice.why)
    return _named(choice.backend)


def keep_choices(choices: dict[Problem, Choice]) -> None:
    """
    Use these choices and make no others by timing, until `allow_new_choices`: a problem that is not among them is
    served like the most similar one. Ranks that keep the same choices agree, whatever they meet.
    """
    global _settled
    _choices.clear()
    _choices.update(choices)
    _settled = True


def allow_new_choices() -> None:
    """Time what was not met before, again."""
    global _settled
    _settled = False


def choices_made() -> dict[Problem, Choice]:
    """All choices of the process so far."""
    return dict(_choices)


def choice_to_json(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Both as what a JSON file can hold."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return {**asdict(problem), "device": problem.device.type, "dtype": dtype, **asdict(choice)}


def choice_from_json(saved: dict[str, Any]) -> tuple[Problem, Choice]:
    """What `choice_to_json` was given."""
    fields = {**saved, "device": torch.device(saved["device"]), "dtype": getattr(torch, saved["dtype"])}
    choice = Choice(fields.pop("backend"), fields.pop("why"), fields.pop("timed", None))
    return Problem(**{**fields, "block_shape": tuple(saved["block_shape"]), "shape": tuple(saved["shape"])}), choice


def is_allowed(problem: Problem, choice: Choice) -> bool:
    """Whether the backend of `choice` can serve `problem` here and now."""
    return choice.backend in [backend.name for backend in _serving(problem, _allowed())]


def describe_choice(problem: Problem) -> tuple[str, str]:
    """
    Which backend serves a layer, `forward/backward` where they differ, and why: for the most tokens met so far.

    Args:
        problem (`Problem`): of the layer; tokens, direction, dtype and threads do not matter.
    """
    if _override is not None:
        return _override, "asked for with `use_backend`"
    known = [
        (other, choice)
        for other, choice in _choices.items()
        if (other.device, other.block_shape, other.shape, other.nnzb)
        == (problem.device, problem.block_shape, problem.shape, problem.nnzb)
    ]
    if not known:
        choice = _by_rule(problem, _serving(problem, _allowed()))
        return choice.backend, f"not used yet; {choice.reason}"
    names, reasons = [], []
    for backward in (False, True):
        met = [(other.tokens, choice) for other, choice in known if other.backward == backward]
        if met:
            _, choice = max(met, key=lambda item: item[0])
            names.append(choice.backend)
            reasons.append(f"{'backward' if backward else 'forward'} {choice.reason}")
    return "/".join(dict.fromkeys(names)), "; ".join(reasons)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Serve every product of the process inside the `with` block by one backend.

    Raises:
        ValueError: if no backend has that name.
    """
    if name not in [backend.name for backend in BACKENDS]:
        raise ValueError(
            f"`use_backend` takes one of {', '.join(backend.name for backend in BACKENDS)}. Got {name!r}."
        )
    global _override
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def _decide(problem: Problem) -> Choice:
    candidates = _serving(problem, _allowed())
    ruled = _by_rule(problem, candidates)
    if _settings.tuning == "off":
        return ruled
    rivals = candidates
    missing = _missing(problem)
    if any(backend.name == "workspace" for backend in candidates):
        # Tiles do the work of the workspace in less memory: never faster.
        rivals = [backend for backend in candidates if backend.name != "tiled"]
    if len(rivals) == 1:
        return Choice(rivals[0].name, f"no other can serve{missing}")
    timing = None if _settings.tuning == "force" else tuning.recall(problem, rivals)
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


def _by_rule(problem: Problem, candidates: list[Backend]) -> Choice:
    for backend in candidates:
        limit = backend.break_even(problem.device, problem.block_shape)
        if problem.density <= limit:
            why = f"by rule: density {problem.density:.3g} is at most {limit:.3g}{_missing(problem)}"
            return Choice(backend.name, why)
    return Choice(candidates[-1].name, "by rule: the last that can serve")


def _nearest(problem: Problem) -> Choice:
    known = [(other, choice) for other, choice in _choices.items() if replace(problem, tokens=other.tokens) == other]
    if not known:
        return _by_rule(problem, _serving(problem, _allowed()))
    nearest, choice = min(known, key=lambda item: abs(item[0].tokens.bit_length() - problem.tokens.bit_length()))
    return Choice(choice.backend, f"as for {nearest.tokens} tokens")


def _missing(problem: Problem) -> str:
    """Why the backends made for this device cannot serve, if they cannot; those of plain PyTorch do not count."""
    made_for_it = [backend for backend in BACKENDS if backend.device == problem.device.type]
    reasons = {
        backend.name: backend.why_not(problem.device, problem.dtype, problem.block_shape) for backend in made_for_it
    }
    return "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason is not None)


def _allowed() -> list[str]:
    barred = ONLY_ON_REQUEST if _settings.dense_workspace else ONLY_ON_REQUEST | {"workspace"}
    return [backend.name for backend in BACKENDS if backend.name not in barred]


def _serving(problem: Problem, names: Iterable[str]) -> list[Backend]:
    """Those of the named backends that can serve."""
    reasons = {
        backend: backend.why_not(problem.device, problem.dtype, problem.block_shape)
        for backend in BACKENDS
        if backend.name in names
    }
    able = [backend for backend, reason in reasons.items() if reason is None]
    if not able:
        rows, columns = problem.block_shape
        raise ValueError(
            f"No backend serves {rows} x {columns} blocks of {problem.dtype} on {problem.device}: "
            + "; ".join(f"{backend.name}: {reason}" for backend, reason in reasons.items())
        )
    return able


def _named(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend.name == name)
