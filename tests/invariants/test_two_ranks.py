"""Two processes that share a batch of 32 train the same model as one process, and notice when they do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launch import two_ranks


pytestmark = pytest.mark.slow

EQUAL = {
    "random": {"regrow_rule": "random", "dtype": "float32"},
    "gradient": {"regrow_rule": "gradient", "dtype": "float32"},
    "gradient in double": {"regrow_rule": "gradient", "dtype": "float64"},
}
# Whatever a rank finds fastest, and with rows of other lengths on each: the choices of the first serve all.
BACKENDS = {
    "other timings": {"backend_of_rank": ["tiled", "native"], "dense_workspace": False, "kernel_tuning": "force"}
}
MUTANTS = {
    "another seed": {"seed_of_rank": 1},
    # Without updates only the check at the beginning can notice.
    "another first topology": {"topology_of_rank": 1, "num_topology_updates": 0},
}

# Largest absolute difference allowed after 20 steps, for values of order 0.02 to 1 (the loss: 5.5).
TOLERANCE = {
    # The log adds losses up in single precision, whatever the model: a few units in the last place of 5.5.
    ("float32", "loss"): 2e-6,
    ("float64", "loss"): 2e-6,
    # Sums over 32 rows in another order; each step carries the difference on, times the learning rate of 5e-3.
    ("float32", "parameter"): 2e-6,
    ("float64", "parameter"): 1e-13,
    # A key's bias cancels in the softmax: its gradient is rounding and nothing else, and Adam divides by its size.
    # Only `adam_epsilon` keeps a step from being as long as the learning rate.
    ("float32", "key.bias"): 1e-6,
    ("float64", "key.bias"): 1e-13,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By name of the run, what each rank reached. One launch for all: most of its time is imports."""
    folder = tmp_path_factory.mktemp("two_ranks")
    runs = {**EQUAL, **BACKENDS, **MUTANTS}
    with two_ranks(folder, [{"name": name, **run} for name, run in runs.items()]) as launcher:
        launcher.wait(timeout=280)  # what counts is what the ranks wrote: gloo may abort a process that has finished
    files = {name: [folder / f"{name}-{rank}.pt" for rank in range(2)] for name in runs}
    assert all(file.exists() for pair in files.values() for file in pair), (folder / "output.txt").read_text()[-4000:]
    return {name: [torch.load(file) for file in pair] for name, pair in files.items()}


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_equal_one_process(ranks: dict[str, list[Any]], name: str, tmp_path: Path) -> None:
    one = worker.train(str(tmp_path), name, batch=32, **EQUAL[name])
    two = ranks[name][0]
    dtype = EQUAL[name]["dtype"]
    assert two["metrics"]["topology_updates"] == 4
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9)

    # The test means something: the ranks held different shares, and together what the one process held.
    shares = [ranks[name][rank]["masked"] for rank in range(2)]
    assert [sum(pair) for pair in zip(*shares, strict=True)] == one["masked"]
    assert sum(a != b for a, b in zip(*shares, strict=True)) > 10

    for layer, index in one["index"].items():
        assert torch.equal(two["index"][layer], index), layer
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (one, two)]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE[dtype, "loss"], rel=0)
    for key, tensor in one["model"].items():
        kind = "key.bias" if key.endswith("key.bias") else "parameter"
        difference = float((two["model"][key] - tensor).abs().max())
        assert difference <= TOLERANCE[dtype, kind], (key, difference)


@pytest.mark.parametrize("name", [*EQUAL, *BACKENDS])
def test_ranks_hold_the_same_bits(ranks: dict[str, list[Any]], name: str) -> None:
    first, second = ranks[name]
    for part in ("model", "moments", "ever_active"):
        assert first[part].keys() == second[part].keys()
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]), (part, key)


@pytest.mark.parametrize("name", BACKENDS)
def test_ranks_that_time_otherwise_use_the_same_backends(ranks: dict[str, list[Any]], name: str) -> None:
    first, second = (outcome["backends"] for outcome in ranks[name])
    assert len(first.keys() & second.keys()) >= 6  # three shapes of layers, both ways
    assert {*first.values(), *second.values()} == {"tiled"}


@pytest.mark.parametrize("name", MUTANTS)
def test_ranks_that_disagree_stop(ranks: dict[str, list[Any]], name: str) -> None:
    for outcome in ranks[name]:
        error = outcome.get("error", "trained to the end")
        assert error.startswith("RuntimeError: All ranks must have the same topology. Got another one on rank(s) [1]")
