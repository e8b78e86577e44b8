"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import pytest
import torch

from hf_dynsparse import configure_kernels
from hf_dynsparse.ops import tuning


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start: threads that wait for a core spin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only; memory that nobody wrote is NaN, so that using it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """
    Whatever its settings say, nothing depends on timings unless it asks for them, the fixtures of a module included:
    scattered samples leave the choice to the rule. Nothing is read from the user's disk or kept there.
    """
    timings = tmp_path_factory.getbasetemp() / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "cache_file", lambda: timings)
        patch.setattr(tuning, "time_backends", lambda *_: tuning.Timing({}, steady=False))
        yield


@pytest.fixture(autouse=True)
def kernels_by_rule() -> Iterator[None]:
    """No choice of a test is left to the next."""
    configure_kernels(tuning="off", dense_workspace=True)
    yield
    configure_kernels(tuning="off", dense_workspace=True)
