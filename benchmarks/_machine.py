"""What every figure must stand beside: hardware, versions, seed."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_dynsparse
from hf_dynsparse.reports.facts import describe_hardware


# Units that make dense bfloat16 much faster than dense float32, and so move the target.
LOW_PRECISION = ("avx512_bf16", "amx_bf16", "amx_int8")


def read_machine(device: torch.device, seed: int) -> dict[str, Any]:
    """Processor or GPU with threads, instruction set, versions, seed, and how busy the machine was before."""
    return {
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_dynsparse": hf_dynsparse.__version__,
        },
        "seed": seed,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def instruction_set() -> str:
    """The one PyTorch's own kernels use, with the low-precision units of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split()) if cpuinfo.is_file() else set()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(unit for unit in LOW_PRECISION if unit in flags)])


def one_line(machine: dict[str, Any]) -> str:
    """`read_machine` as a line to print."""
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    return f"{machine['hardware']}; {machine['instruction_set']}; {versions}; seed {machine['seed']}"


def describe_machine(seed: int) -> str:
    """One line: processor or GPU, threads, instruction set, versions, seed."""
    return one_line(read_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed))
