"""Training scripts as a user runs them, in this process, and the environment of those in another."""

import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_dynsparse


EXAMPLES = Path(__file__).parents[1] / "examples"


def run_script(script: Path, flags: str, **environment: str) -> None:
    """Run it with `flags` as its command line; argv, environment, imports and PyTorch's threads are put back."""
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module in (path.stem for path in EXAMPLES.glob("*.py")):
                patch.setitem(sys.modules, module, None)  # what it imports is forgotten
                del sys.modules[module]
            patch.setattr("sys.argv", shlex.split(f"{script} {flags}"))
            patch.setattr("hf_dynsparse.training.scripts.can_keep", lambda: False)  # it cannot be put back
            for name, value in environment.items():
                patch.setenv(name, value)
            runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def assert_same_weights(first: Path, second: Path) -> None:
    """Bit for bit, of two folders with a model."""
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def clean_environment(folder: Path) -> dict[str, str]:
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
