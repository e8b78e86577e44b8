"""CPU threads of a process: what the user asked for, or a share of the cores."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch


# What PyTorch goes by when it starts.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# `accelerate launch` and `torchrun` leave one of these with the processes that they start.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
LAUNCHER_FLAG = "--num_cpu_threads_per_process"


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def default_threads(processes: int) -> int:
    """
    Threads of each of `processes` processes on this machine where no flag says so: as many as PyTorch has by
    `OMP_NUM_THREADS` or `MKL_NUM_THREADS`, if the user has set one; else a share of the cores.
    """
    if user_has_set(os.environ, _of_process(os.getppid())):
        return torch.get_num_threads()
    return max(1, len(usable_cores()) // processes)


def user_has_set(environment: Mapping[str, str], parent: str) -> bool:
    """
    Whether the number of threads in `environment` is the user's. Launchers hand their processes `OMP_NUM_THREADS=1`
    where the user has said nothing, which would leave all other cores idle.

    Args:
        environment (`Mapping[str, str]`): of this process.
        parent (`str`): environment and command line of the process that started this one, empty if they cannot be
            read; what a launcher found is taken for the user's then.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    by_launcher = parent and any(name in environment and f"{name}=" not in parent for name in LAUNCHED)
    if given != {"OMP_NUM_THREADS": "1"} or not by_launcher:
        return bool(given)
    return "OMP_NUM_THREADS=" in parent or LAUNCHER_FLAG in parent


def _of_process(number: int) -> str:
    folder = Path("/proc", str(number))
    try:
        return (folder / "environ").read_text(errors="replace") + (folder / "cmdline").read_text(errors="replace")
    except OSError:  # not on Linux
        return ""
