"""How long each backend takes for a product: timed on made-up operands, remembered on disk."""

import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..files import write_atomically
from ..layout import random_block_index
from . import native
from .backends import Backend, Problem


logger = logging.getLogger(__name__)

Product = Callable[[Backend], object]

# More tokens take longer, not another backend.
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}

ROUNDS = 3

# A backend that took this much longer than the fastest in the first round is not timed again.
HOPELESS = 1.5


def time_backends(problem: Problem, backends: Iterable[Backend]) -> dict[str, float]:
    """Median seconds of each backend for `problem`, in turn on the same operands."""
    backends = list(backends)
    tokens = min(problem.tokens, MOST_TOKENS.get(problem.device.type, problem.tokens))
    # Whatever mode the caller is in: inference tensors have no version, so nothing derived from them is kept.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        return _time_in_turn(problem.device, _product(problem, tokens), backends)


def _time_in_turn(device: torch.device, run: Product, backends: list[Backend]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for backend in backends:
        run(backend)  # warm-up: derived orders, scratch memory, compiled kernels
        seconds[backend.name] = [_seconds(device, run, backend)]
    fastest = min(times[0] for times in seconds.values())
    rivals = [backend for backend in backends if seconds[backend.name][0] <= HOPELESS * fastest]
    for _ in range(ROUNDS if len(rivals) > 1 else 0):
        for backend in rivals:
            seconds[backend.name].append(_seconds(device, run, backend))
    return {name: statistics.median(times) for name, times in seconds.items()}


def remembered(problem: Problem) -> dict[str, float] | None:
    """What the disk knows of `problem`."""
    found = _read().get(str(problem))
    return found if isinstance(found, dict) else None


def remember(problem: Problem, seconds: dict[str, float]) -> None:
    """Keep the timing of `problem` on disk, for this machine and these versions."""
    path = cache_file()
    try:
        # Read again: another process may have written since.
        write_atomically(path, json.dumps({**_read(), str(problem): seconds}, indent=1))
    except OSError as error:
        logger.warning("Timings of backends cannot be kept in %s (%s); each process measures its own.", path, error)


def cache_file() -> Path:
    """Where the timings of this machine and these versions are kept: in `~/.cache`."""
    return Path.home() / ".cache" / "hf_dynsparse" / f"kernels-{_fingerprint()}.json"


def processor_name() -> str:
    """What the processor calls itself."""
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


def _read() -> dict[str, object]:
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("The timings in %s cannot be read (%s); they are measured again.", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def _product(problem: Problem, tokens: int) -> Product:
    """A call that has a backend serve `problem` on made-up operands."""
    (out_features, in_features), (rows, columns) = problem.shape, problem.block_shape

    def made(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=problem.dtype, device=problem.device)

    input, values, bias = made(tokens, in_features), made(problem.nnzb, rows, columns), made(out_features)
    grid = out_features // rows, in_features // columns
    draw = torch.Generator().manual_seed(0)
    block_index = random_block_index(grid[0] * grid[1], problem.nnzb, draw, problem.device)
    if not problem.backward:
        return lambda backend: backend.dds(input, values, block_index, bias, problem.shape, False)
    grad = made(tokens, out_features)
    return lambda backend: backend.backward(grad, input, values, block_index, problem.shape, (True, True, True))


def _seconds(device: torch.device, run: Product, backend: Backend) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run(backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
