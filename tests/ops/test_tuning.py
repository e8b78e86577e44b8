"""How backends are timed: by a clock that the tests move, and for real on a machine that is busy."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest
import torch
from helpers import needs_kernels

from hf_dynsparse.ops import BACKENDS, Backend, Problem, reference, tuning
from hf_dynsparse.ops.tuning import time_backends  # before a fixture replaces it


CPU = torch.device("cpu")


class Machine:
    """
    A clock that moves when a backend runs.

    Args:
        work: seconds of each run of each backend: first the warm-up, then the samples; the last one for ever.
        wait: seconds that pass whenever others may go first.
    """

    def __init__(self, work: dict[str, list[float]], wait: float = 0.0) -> None:
        self.work = {name: chain(times, repeat(times[-1])) for name, times in work.items()}
        self.backends = [Backend(name, "", lambda *_: None, reference.dds, reference.sdd) for name in work]
        self.worked = self.passed = 0.0
        self.wait = wait
        self.runs = dict.fromkeys(work, 0)

    def run(self, backend: Backend) -> None:
        seconds = next(self.work[backend.name])
        self.runs[backend.name] += 1
        self.worked += seconds
        self.passed += seconds

    def give_way(self) -> None:
        self.passed += self.wait

    def compare(self) -> tuning.Timing:
        clock = tuning.Clock(lambda: self.worked, lambda: self.passed, self.give_way)
        return tuning.compare(self.run, self.backends, clock)


def about(seconds: float) -> object:
    return pytest.approx(seconds, rel=1e-6)


def test_samples_that_agree_are_enough() -> None:
    machine = Machine({"a": [9.0, 1.0], "b": [9.0, 1.2], "c": [9.0, 7.0]})
    timing = machine.compare()
    assert timing.seconds == {"a": about(1.0), "b": about(1.2), "c": about(7.0)}
    assert (timing.steady, timing.calm, timing.fastest) == (True, True, "a")
    assert set(machine.runs.values()) == {1 + 2}


def test_what_disturbs_some_samples_does_not_decide() -> None:
    machine = Machine({"a": [9.0, 100.0, 3.0, 50.0, 1.0, 20.0, 1.05], "b": [9.0, 1.2], "c": [9.0, 2.1]})
    timing = machine.compare()
    assert timing.seconds["a"] == about(1.0)
    assert (timing.steady, timing.fastest) == (True, "a")
    assert machine.runs == {"a": 1 + 6, "b": 1 + 6, "c": 1 + 2}  # the last is settled: too slow


def test_samples_that_never_agree_say_nothing() -> None:
    machine = Machine({"a": [9.0, *(1.2**-step for step in range(40))], "b": [9.0, 0.3]})
    timing = machine.compare()
    assert not timing.steady
    assert machine.runs["a"] == 1 + tuning.ROUNDS


@pytest.mark.parametrize(("wait", "calm"), [(0.0, True), (0.4, True), (0.6, False), (100.0, False)])
def test_waiting_for_others_is_noticed_and_not_timed(wait: float, calm: bool) -> None:
    timing = Machine({"a": [9.0, 1.0], "b": [9.0, 1.2]}, wait).compare()
    assert timing.seconds == {"a": about(1.0), "b": about(1.2)}
    assert (timing.steady, timing.calm) == (True, calm)


def test_short_work_is_repeated_within_a_sample() -> None:
    machine = Machine({"a": [9.0, *[5e-4, 4e-5, 3e-5] * 2, 3e-5]})
    timing = machine.compare()
    assert timing.seconds["a"] < 1e-4
    assert machine.runs["a"] > 6


def test_each_thread_has_its_share_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def product(problem: Problem, tokens: int) -> Callable[[Backend], None]:
        made.append((tokens, torch.get_num_threads()))
        return lambda backend: None

    monkeypatch.setattr(tuning, "_product", product)
    monkeypatch.setattr(tuning, "compare", lambda *_: tuning.Timing({}))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for tokens in (1, 64, 512, 2**20):
            problem = Problem.make(CPU, torch.float32, (4, 4), (8, 8), 2, tokens, False)
            time_backends(problem, [])
            tuning.glance(problem, [])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert made == [(1, 1)] * 2 + [(22, 1)] * 2 + [(171, 1)] * 2 + [(2048, 1), (256, 1)]


@pytest.mark.parametrize("backward", [False, True])
def test_real_backends_are_timed(backward: bool) -> None:
    problem = Problem.make(CPU, torch.float32, (16, 16), (64, 64), 4, 100, backward)
    served = [entry for entry in BACKENDS.values() if entry.why_not(CPU, torch.float32, (16, 16)) is None]
    with torch.inference_mode():
        timing = time_backends(problem, served)
        glance = tuning.glance(problem, served)
    for seconds in (timing.seconds, glance):
        assert list(seconds) == [entry.name for entry in served]
        assert all(time > 0 for time in seconds.values())


@pytest.fixture
def busy() -> Iterator[None]:
    """Every core has something else to do."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(os.cpu_count())]
    threads = torch.get_num_threads()
    try:
        for other in others:
            other.stdout.readline()
        torch.set_num_threads(2)
        yield
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.kill()
            other.wait()
            other.stdout.close()


@needs_kernels
@pytest.mark.skipif(os.name != "posix", reason="CPU time is counted in ticks of 16 ms")
@pytest.mark.usefixtures("busy")
def test_a_busy_machine_chooses_as_an_idle_one_and_keeps_nothing() -> None:
    # The layers of a small BERT at 0.9 sparsity: the compiled kernels take a third of the time of any other, or less.
    for shape, side in (((256, 256), 16), ((1024, 256), 4)):
        for backward in (False, True):
            nnzb = round(0.1 * shape[0] * shape[1] / side**2)
            problem = Problem.make(CPU, torch.float32, (side, side), shape, nnzb, 1024, backward)
            rivals = [
                entry
                for entry in list(BACKENDS.values())[:4]
                if entry.why_not(CPU, torch.float32, (side, side)) is None
            ]
            timing = time_backends(problem, rivals)
            assert timing.fastest == "native", timing
            assert not timing.calm, timing
