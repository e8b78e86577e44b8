"""Two gloo ranks of `worker.py` on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import worker

import hf_dynsparse


@contextmanager
def two_ranks(folder: Path, runs: list[dict[str, Any]]) -> Iterator[subprocess.Popen]:
    """
    Begin `runs`, each the arguments of `worker.train`, on two ranks under torchrun, whose output goes to `folder`; end
    what still runs at the end.
    """
    plan = folder / "runs.json"
    plan.write_text(json.dumps(runs))
    source = str(Path(hf_dynsparse.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder / "hf"),  # where timings of kernels are kept
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Standalone: the ranks meet on a free port.
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "0"]
    command = [sys.executable, "-m", *torchrun, worker.__file__, str(folder), str(plan)]
    with open(folder / "output.txt", "ab") as output:
        launcher = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield launcher
    finally:
        launcher.terminate()
        launcher.wait()
