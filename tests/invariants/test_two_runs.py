"""
Two runs in one folder: one is refused, and what the other saves is its own.

`DYNSPARSE_ROUNDS=20 pytest tests/invariants/test_two_runs.py` tries it twenty times instead of twice.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from test_kill import assert_same_bits, last_step, starting


ROUNDS = int(os.environ.get("DYNSPARSE_ROUNDS", "2"))
STEPS = 7
SEEDS = (7, 8)  # of the two runs, which learn different things


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    return starting(worker.train_or_tell)


@pytest.fixture(scope="module")
def alone(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each reaches in a folder of its own, `run-<seed>`."""
    folder = tmp_path_factory.mktemp("alone")
    for process in [start(folder, f"run-{seed}", result=f"result-{seed}", seed=seed, steps=STEPS) for seed in SEEDS]:
        process.join()
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("attempt", range(ROUNDS))
def test_the_second_run_is_refused(start: Callable[..., Any], alone: Path, tmp_path: Path, attempt: int) -> None:
    """At once in even rounds, else at a random moment of the first run, amid a save or not."""
    draw, shared = random.Random(attempt), tmp_path / "shared"
    processes = []
    for seed, other in zip(SEEDS, reversed(SEEDS), strict=True):
        # Whichever has the folder goes on until the other has been told: a short run could be over before.
        told = f"result-{other}.pt"
        processes.append(start(tmp_path, "shared", result=f"result-{seed}", seed=seed, steps=STEPS, wait_for=told))
        if attempt % 2 and seed == SEEDS[0]:
            step = draw.randrange(1, STEPS - 3)
            while not shared.exists() or last_step(shared) < step:
                assert processes[0].is_alive()
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
    for process in processes:
        process.join()
        assert process.exitcode == 0

    reached = {seed: torch.load(tmp_path / f"result-{seed}.pt") for seed in SEEDS}
    (refused,) = [seed for seed in SEEDS if "error" in reached[seed]]
    (going,) = [seed for seed in SEEDS if "error" not in reached[seed]]
    # Between taking the lock and signing it, its holder has no name yet: only who comes at the same time meets that.
    holders = [f"process {reached[going]['pid']} on ", *(["another process. "] if attempt % 2 == 0 else [])]
    assert any(f"Got {shared}, held by {holder}" in reached[refused]["error"] for holder in holders)
    assert attempt % 2 == 0 or going == SEEDS[0]
    assert_same_bits(reached[going], torch.load(alone / f"result-{going}.pt"))
    # Not one file is of the other.
    last = (STEPS - 1, STEPS)
    for step in last:
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            ours, theirs = (folder / f"checkpoint-{step}" / file for folder in (shared, alone / f"run-{going}"))
            assert ours.read_bytes() == theirs.read_bytes(), (step, file)
    assert {path.name for path in shared.iterdir()} == {
        "pid-0",
        *(f"checkpoint-{step}" for step in (STEPS - 1, STEPS)),
    }
