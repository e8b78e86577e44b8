"""What every figure must stand beside: hardware, versions, seed."""

import platform

import torch
import transformers

from hf_dynsparse.summary import describe_hardware


def describe_machine(seed: int) -> str:
    """One line: processor or GPU, threads, versions, seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        f"{describe_hardware(device)}; python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; seed {seed}"
    )
