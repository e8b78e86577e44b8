"""
How long each backend takes for a product: timed on made-up operands, remembered on disk.

A CPU is timed by the CPU time of one thread that computes its share of the tokens. Wall time says nothing on a
busy machine: threads that wait for each other at every step wait for whatever else runs, up to a hundred times the
length of the product. CPU time counts this thread's work alone, so a busy machine chooses as an idle one does.
"""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..blocks.draw import random_block_index
from ..blocks.layout import BlockLayout
from ..files import write_atomically
from . import native
from .backends import Backend
from .problem import Problem


logger = logging.getLogger(__name__)

Product = Callable[[Backend], object]

# More tokens take longer, not another backend.
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}

# Enough on a CPU to see an error of `CONTRADICTED`.
GLANCE_TOKENS = {**MOST_TOKENS, "cpu": 256}

# At most; a disturbance lasts for some, seldom for all.
ROUNDS = 10

# Seconds of a sample; shorter work is repeated, for others have emptied the caches.
SHORTEST = 5e-4

# The two smallest samples of a backend may differ by this factor, or they say nothing.
ALIKE = 1.15

# A backend whose samples agree that it takes this much longer than the fastest is not timed again.
HOPELESS = 1.5

# Work that took this much longer than its CPU time had to wait for the work of others.
WAITED = 1.25

# A remembered timing is wrong if its fastest backend takes this much longer than another now.
CONTRADICTED = 2.0


@dataclass(frozen=True)
class Clock:
    """
    What samples are read from, in seconds.

    Args:
        worked (`Callable`): how long the product has worked.
        passed (`Callable`): how long it has taken; the same, unless it had to wait.
        give_way (`Callable`): lets others go first.
    """

    worked: Callable[[], float]
    passed: Callable[[], float]
    give_way: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """
    Backends compared on one problem.

    Args:
        seconds (`dict[str, float]`): of each backend by name: the smallest sample, which nothing made smaller than the
            work is. On a CPU those of one thread for its share of the tokens.
        steady (`bool`): whether the samples agree; else they must not decide.
        calm (`bool`): whether no other process wanted the CPU; else they must not be kept.
        when (`float`): seconds since the epoch.
    """

    seconds: dict[str, float]
    steady: bool = True
    calm: bool = True
    when: float = field(default_factory=time.time)

    @property
    def fastest(self) -> str:
        """Name of the fastest backend."""
        return min(self.seconds, key=self.seconds.__getitem__)


def time_backends(problem: Problem, backends: Iterable[Backend]) -> Timing:
    """Compare the backends on `problem`."""
    with _alone(problem, MOST_TOKENS) as run:
        return compare(run, list(backends), _clock(problem.device))


def glance(problem: Problem, backends: Iterable[Backend]) -> dict[str, float]:
    """Seconds of one sample of each backend on few tokens: enough to notice that a timing is far off."""
    with _alone(problem, GLANCE_TOKENS) as run:
        return compare(run, list(backends), _clock(problem.device), 1).seconds


def compare(run: Product, backends: list[Backend], clock: Clock, rounds: int = ROUNDS) -> Timing:
    """Time `run` with each of the backends in turn, until each has two samples alike."""
    for backend in backends:
        run(backend)  # warm-up: derived orders, scratch memory, compiled kernels
    samples: dict[str, list[float]] = {backend.name: [] for backend in backends}
    rivals, steady = backends, False
    passed, worked = clock.passed(), clock.worked()
    for _ in range(rounds):
        # A process that waits for this core gets it now: the round begins with a whole time slice, and waiting shows.
        clock.give_way()
        for backend in rivals:
            samples[backend.name].append(_sample(run, backend, clock))
        fastest = min(map(min, samples.values()))
        certain = {backend for backend in rivals if _alike(samples[backend.name])}
        steady = len(certain) == len(rivals)
        if steady:
            break
        hopeless = {backend for backend in certain if min(samples[backend.name]) > HOPELESS * fastest}
        rivals = [backend for backend in rivals if backend not in hopeless]
    worked, passed = clock.worked() - worked, clock.passed() - passed
    return Timing({name: min(times) for name, times in samples.items()}, steady, passed <= WAITED * worked)


def recall(problem: Problem, backends: Iterable[Backend]) -> Timing | None:
    """What the disk knows of `problem` served by one of `backends`, unless a glance at them contradicts it."""
    backends = list(backends)
    timing = _read().get(_key(problem, backends))
    if timing is None:
        return None
    now = glance(problem, backends)
    if now[timing.fastest] > CONTRADICTED * min(now.values()):
        logger.debug("%s: the remembered timing %s is contradicted by %s; timed again.", problem, timing.seconds, now)
        return None
    return timing


def remember(problem: Problem, backends: Iterable[Backend], timing: Timing) -> None:
    """Keep a timing on disk, for this machine and these versions."""
    try:
        file = cache_file()
        # Read again: another process may have written since. What was damaged there is gone now.
        known = {**_read(), _key(problem, backends): timing}
        content = {key: {"seconds": one.seconds, "when": one.when} for key, one in known.items()}
        write_atomically(file, json.dumps(content, indent=1))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        logger.warning("Timings of backends cannot be kept (%s); each process measures its own.", error)


def cache_file() -> Path:
    """Where the timings of this machine and these versions are kept: in `~/.cache`."""
    return Path.home() / ".cache" / "hf_dynsparse" / f"kernels-{_fingerprint()}.json"


def processor_name() -> str:
    """What the CPU calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def _fingerprint() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        own = version("hf_dynsparse")
    except PackageNotFoundError:  # run from a folder of sources
        own = "sources"
    parts = processor_name(), gpu, f"torch {torch.__version__}", own, f"kernels {native.INTERFACE_VERSION}"
    return "-".join("".join(letter if letter.isalnum() else "_" for letter in part) for part in parts)


@contextmanager
def _alone(problem: Problem, most: dict[str, int]) -> Iterator[Product]:
    """A call that has a backend serve one thread's share of `problem`, of at most `most` tokens, on that thread."""
    threads = problem.threads or 1
    tokens = -(-problem.tokens // threads)
    tokens = min(tokens, most.get(problem.device.type, tokens))
    # Whatever mode the caller is in: inference tensors have no version, so nothing derived from them is kept.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        before = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
        try:
            yield _product(problem, tokens)
        finally:
            if threads > 1:
                torch.set_num_threads(before)


def _clock(device: torch.device) -> Clock:
    if device.type == "cuda":

        def read() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return Clock(read, read)
    if os.name != "posix":  # Windows counts CPU time in ticks of 16 ms
        return Clock(time.perf_counter, time.perf_counter)
    return Clock(time.thread_time, time.perf_counter, os.sched_yield)


def _sample(run: Product, backend: Backend, clock: Clock) -> float:
    """Seconds of the work; the least of several where it is short."""
    began = now = clock.worked()
    least = math.inf
    while now - began < SHORTEST:
        run(backend)
        before, now = now, clock.worked()
        least = min(least, now - before)
    return least


def _alike(samples: list[float]) -> bool:
    least, *others = sorted(samples)
    return bool(others) and others[0] <= ALIKE * least


def _key(problem: Problem, backends: Iterable[Backend]) -> str:
    return f"{problem} by {', '.join(backend.name for backend in backends)}"


def _read() -> dict[str, Timing]:
    """All timings of the file that are such."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nested too deep, or no home directory
        logger.warning("The timings of backends cannot be read (%s); they are measured again.", error)
        return {}
    found = content.items() if isinstance(content, dict) else ()
    timings = {key: _as_timing(entry, key.partition(" by ")[2].split(", ")) for key, entry in found}
    return {key: timing for key, timing in timings.items() if timing is not None}


def _as_timing(entry: object, names: list[str]) -> Timing | None:
    """A timing of the backends `names` as `remember` writes it; `None` for anything else."""
    match entry:
        case {"seconds": dict(seconds), "when": float(when)} if seconds.keys() == set(names):
            numbers = [when, *seconds.values()]
            if all(isinstance(number, float) and 0 < number < math.inf for number in numbers):
                return Timing(seconds, when=when)
    return None


def _product(problem: Problem, tokens: int) -> Product:
    """A call that has a backend serve `problem` on made-up operands."""
    (out_features, in_features), (rows, columns) = problem.shape, problem.block_shape

    def made(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=problem.dtype, device=problem.device)

    input, values, bias = made(tokens, in_features), made(problem.nnzb, rows, columns), made(out_features)
    grid = out_features // rows, in_features // columns
    draw = torch.Generator().manual_seed(0)
    block_index = random_block_index(grid[0] * grid[1], problem.nnzb, draw, problem.device)
    layout = BlockLayout(block_index, problem.shape, problem.block_shape)
    if not problem.backward:
        return lambda backend: backend.dds(input, values, layout, bias, False)
    grad = made(tokens, out_features)
    return lambda backend: backend.backward(grad, input, values, layout, (True, True, True))
