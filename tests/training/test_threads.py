"""Threads of a process: the user's word goes before a launcher's."""

import argparse

import pytest
import torch

from hf_dynsparse.training.scripts import prepare_process
from hf_dynsparse.training.threads import user_has_set


ONE, MKL = {"OMP_NUM_THREADS": "1"}, {"MKL_NUM_THREADS": "1"}
ACCELERATE, TORCHRUN = {"ACCELERATE_MIXED_PRECISION": "no"}, {"TORCHELASTIC_RUN_ID": "none"}
LAUNCHER = "HOME=/root\0accelerate\0launch\0run.py"


@pytest.mark.parametrize(
    ("environment", "parent", "expected"),
    [
        ({}, "HOME=/root\0bash", False),
        (ONE, "HOME=/root\0bash", True),
        (MKL, "HOME=/root\0bash", True),
        ({"OMP_NUM_THREADS": "2"}, "", True),
        (ACCELERATE | ONE, LAUNCHER, False),
        (TORCHRUN | ONE, LAUNCHER, False),
        (ACCELERATE | ONE, "OMP_NUM_THREADS=1\0" + LAUNCHER, True),
        (TORCHRUN | ONE, "OMP_NUM_THREADS=1\0" + LAUNCHER, True),
        (ACCELERATE | ONE, LAUNCHER + "\0--num_cpu_threads_per_process\x001", True),
        (ACCELERATE | {"OMP_NUM_THREADS": "4"}, LAUNCHER, True),
        (ACCELERATE | ONE | MKL, LAUNCHER, True),
        # A program of the user's that a launcher has started, and that starts another.
        (ACCELERATE | ONE, "ACCELERATE_MIXED_PRECISION=no\0OMP_NUM_THREADS=1\0bash", True),
        (ACCELERATE | ONE, "", True),  # cannot be told
    ],
)
def test_who_has_set_them(environment: dict[str, str], parent: str, expected: bool) -> None:
    assert user_has_set(environment, parent) is expected


@pytest.mark.parametrize(
    ("variable", "flag", "expected"), [("3", None, 3), ("3", 1, 1), (None, None, 2), (None, 5, 5)]
)
def test_scripts(variable: str | None, flag: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dynsparse.training.threads.usable_cores", lambda: list(range(4)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("hf_dynsparse.training.scripts.prepare_console", lambda *_: None)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("hf_dynsparse.training.scripts.can_keep", lambda: True)
    args = {"num_threads": flag, "should_log": False, "device": torch.device("cpu"), "world_size": 2, "seed": 0}
    args |= {"keep_freed_memory": None if flag is None else False}
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # as when a process starts with it
    try:
        prepare_process(given := argparse.Namespace(**args), "test")
        assert torch.get_num_threads() == expected
        assert given.keep_freed_memory == (flag is None)
    finally:
        torch.set_num_threads(before)
