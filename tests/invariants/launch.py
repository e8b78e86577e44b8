"""Two gloo ranks of `worker.py` on this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import worker

import hf_dynsparse


ACCELERATE_FILES = Path(__file__).parents[2] / "examples" / "accelerate"


@contextmanager
def two_ranks(folder: Path, runs: list[dict[str, Any]]) -> Iterator[list[subprocess.Popen]]:
    """
    Begin `runs`, each the arguments of `worker.train`, on two ranks under torchrun, whose output goes to `folder`; end
    what still runs at the end.
    """
    # Standalone: the ranks meet on a free port.
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "0"]
    with _launched(folder, runs, [torchrun]) as launchers:
        yield launchers


@contextmanager
def two_nodes(folder: Path, runs: list[dict[str, Any]]) -> Iterator[list[subprocess.Popen]]:
    """The same by two calls of `accelerate launch`, as on two machines, that meet at the loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launch = ["accelerate.commands.launch", "--config_file", str(ACCELERATE_FILES / "two_nodes.yaml")]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    with _launched(folder, runs, [[*launch, "--machine_rank", rank] for rank in "01"]) as launchers:
        yield launchers


@contextmanager
def _launched(
    folder: Path, runs: list[dict[str, Any]], launches: Sequence[list[str]]
) -> Iterator[list[subprocess.Popen]]:
    plan = folder / "runs.json"
    plan.write_text(json.dumps(runs))
    with open(folder / "output.txt", "ab") as output:
        launchers = [
            subprocess.Popen(
                [sys.executable, "-m", *launch, worker.__file__, str(folder), str(plan)],
                env=environment(folder),
                stdout=output,
                stderr=output,
            )
            for launch in launches
        ]
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.terminate()
        for launcher in launchers:
            launcher.wait()


def environment(folder: Path) -> dict[str, str]:
    """Of processes that import this package from its source, see no GPU and no network, and write to `folder` only."""
    source = str(Path(hf_dynsparse.__file__).parents[1])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder / "hf"),  # where timings of kernels are kept
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
