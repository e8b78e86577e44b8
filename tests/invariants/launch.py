"""Two gloo ranks of `worker.py` on this machine."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import worker


ACCELERATE_FILES = Path(__file__).parents[2] / "examples" / "accelerate"


@cache
def forking() -> Any:
    """
    Makes processes that are forked from one that has imported everything already, and that sees no GPU and no network.
    """
    # The server of Python 3.11 knows the path of its parent from the environment only.
    path = os.pathsep.join([str(Path(worker.__file__).parent), *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker"])
    with patch.dict(os.environ, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


class Ranks:
    """Processes that end together when one of them fails, as those of torchrun."""

    def __init__(self, processes: Sequence[Any]) -> None:
        self.processes = processes
        for process in processes:
            process.start()

    def poll(self) -> int | None:
        """`None` while one runs and none has failed; else the status of the first that failed, or 0."""
        codes = [process.exitcode for process in self.processes]
        return next(filter(None, codes), None if None in codes else 0)

    def wait(self, timeout: float) -> int:
        """
        The status: 0 if all ended well.

        Raises:
            TimeoutError: after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            if not connection.wait(running, deadline - time.monotonic()):
                raise TimeoutError(f"A rank still runs after {timeout} seconds.")
        self.terminate()
        return self.poll() or 0

    def terminate(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def two_ranks(folder: Path, runs: list[dict[str, Any]], nodes: int = 1) -> Iterator[Ranks]:
    """
    Begin `runs`, each the arguments of `worker.train`, on two ranks of one node or two, whose output goes to `folder`;
    end what still runs at the end. They find each other by the environment that torchrun would give them.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // nodes), "GROUP_WORLD_SIZE": str(nodes)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HOME": str(folder / "hf")}
    inner, outer = ("LOCAL_RANK", "GROUP_RANK") if nodes == 1 else ("GROUP_RANK", "LOCAL_RANK")
    process = forking().Process
    ranks = Ranks(
        [
            process(target=worker.run_rank, args=(str(folder), runs, {**group, "RANK": rank, inner: rank, outer: "0"}))
            for rank in "01"
        ]
    )
    try:
        yield ranks
    finally:
        ranks.terminate()
