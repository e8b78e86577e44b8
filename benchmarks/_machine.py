"""What every figure must stand beside: hardware, versions, seed."""

import platform
from pathlib import Path

import torch
import transformers


def describe_machine(seed: int) -> str:
    """One line: processor or GPU, threads, versions, seed."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    return (
        f"{device}, {torch.get_num_threads()} threads; python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; seed {seed}"
    )
