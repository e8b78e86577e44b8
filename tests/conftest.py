"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import pytest
import torch

from hf_dynsparse import configure_kernels
from hf_dynsparse.ops import tuning


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only; memory that nobody wrote is NaN, so that using it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_by_rule(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test depends on timings unless it asks for them, and none leaves any behind."""
    timings = tmp_path_factory.getbasetemp() / "kernels.json"
    monkeypatch.setattr(tuning, "cache_file", lambda: timings)
    # Nor does a run whose settings say otherwise: scattered timings leave it to the rule.
    monkeypatch.setattr(tuning, "time_backends", lambda *_: tuning.Timing({}, steady=False))
    configure_kernels(tuning="off", dense_workspace=True)
    yield
    configure_kernels(tuning="off", dense_workspace=True)
