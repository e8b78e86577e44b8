"""
However a batch of 32 is shared, between two processes or between steps of accumulation, the model is the same as of
one process; and processes notice when they do not agree.

`DYNSPARSE_STEPS=50 pytest tests/invariants/test_two_ranks.py` trains for fifty steps with five updates instead of
twenty with four.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launch import two_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from hf_dynsparse.training.context_gain import GAIN


pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("DYNSPARSE_STEPS", "20"))
UPDATES = max(4, STEPS // 10)

# What is trained.
MODELS = {
    "random": {"regrow_rule": "random", "eval_strategy": "steps", "eval_steps": 10},
    "gradient": {"regrow_rule": "gradient"},
    # Three of four blocks: a head without a block of its values gives its queries gradients that are rounding and
    # nothing else, and which of these is the largest is another on each kind of processor.
    "double": {
        **{"regrow_rule": "gradient", "prune_score": "fisher", "sparsity": 0.25},
        **{"dtype": "float64", "distance_bias": "1:0@0.7"},
    },
    # Three blocks a matrix: one rank holds one more. Some gradients are rounding and nothing else then.
    "odd": {
        **{"regrow_rule": "balanced", "prune_score": "weight_gradient", "regrow_std": 0.01},
        **{"dtype": "float64", "sparsity": 0.8, "group_lasso": 0.1},
    },
    # Six steps an epoch, the last with 19 rows.
    "uneven": {
        **{"prune_score": "weight_gradient", "regrow_rule": "rank_one", "dtype": "float64", "sparsity": 0.25},
        "rows": 5 * 32 + 19,
    },
    "easy first": {
        **{"packed": True, "dtype": "float64", "regrow_rule": "gradient"},
        **{"seq_length_schedule": "8:0.5,32", "mlm_probability_schedule": "0.3:0.15"},
    },
}
ACCUMULATED = {"batch": 4, "gradient_accumulation_steps": 4}
SAVED = {"save_strategy": "steps", "save_steps": 10}
# How two ranks share the work of one process: by DDP, ...
DDP = {
    "ddp": ("random", {}),
    "ddp, gradient": ("gradient", {}),
    "ddp in double": ("double", {}),
    "ddp, accumulated": ("double", ACCUMULATED),
    "ddp, easy first": ("easy first", ACCUMULATED),
    "ddp, 16 rows and 3": ("uneven", {"accelerator_config": {"even_batches": False}}),
}
# ... and on two nodes of one rank each, by FSDP2 all but the first.
NODES = {
    "two nodes": ("double", {}),
    "sharded": ("random", {"sharded": True}),
    "sharded, accumulated": ("double", {"sharded": True, **ACCUMULATED}),
    "sharded oddly": ("odd", {"sharded": True, **SAVED}),
    "sharded, resumed": ("odd", {"sharded": True, "resume": "sharded oddly/checkpoint-10"}),
    "sharded, from one process": ("odd", {"sharded": True, "resume": "one, odd/checkpoint-10"}),
}
EQUAL = {**DDP, **NODES}
# Not what one process does, but the same on both ranks.
TOGETHER = {
    # Whatever a rank finds fastest, and with rows of other lengths on each: the choices of the first serve all.
    "other timings": {"backend_of_rank": ["tiled", "native"], "dense_workspace": False, "kernel_tuning": "force"},
    # The second rank has no rows for its share of the last batch, and repeats others.
    "repeated rows": {"rows": 5 * 32 + 11, "prune_score": "saliency"},
    "best model": {"eval_strategy": "steps", "eval_steps": 10, "load_best_model_at_end": True},
}
# The first rank cannot write at step 10, the second has a loss of NaN in step 15. That there is a best model lets the
# ranks meet amid a save.
FAILING = {**TOGETHER["best model"], "save_strategy": "steps", "save_steps": 5, "eval_steps": 5}
FAILING |= {"metric_for_best_model": "loss", "full_disk_at": 10, "nan_loss_at": 15}
# The highest loss counts as the best, so that it is not the last.
TOGETHER["best model"] |= {**SAVED, "metric_for_best_model": "loss", "greater_is_better": True}
ANOTHER_TOPOLOGY = "All ranks must have the same topology. Got another one on rank(s) [1]"
OTHER_SETTINGS = "All ranks must update the topology alike. Got something else on rank(s) [1] than on rank 0; here "
MUTANTS: dict[str, dict[str, Any]] = {
    "other draws": {"other_draws": True},
    # Without updates only the check at the beginning can notice.
    "another first topology": {"topology_of_rank": 1, "num_topology_updates": 0},
    "another seed": {"settings_of_rank": {"seed": 8}},
    # Nothing that the ranks do at an update would meet.
    "another number of updates": {"settings_of_rank": {"num_topology_updates": UPDATES + 1}},
}

# Largest absolute difference allowed at the end, for values of order 0.02 to 1 (the loss: 5.5).
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

Outcome = dict[str, Any]
COMMON = {"steps": STEPS, "num_topology_updates": UPDATES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them write."""
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[[str], Outcome]:
    """What one process reaches, by model."""

    @cache
    def train(model: str) -> Outcome:
        saved = SAVED if model == "odd" else {}
        return worker.train(str(folder), f"one, {model}", batch=32, **COMMON, **MODELS[model], **saved)

    return train


@pytest.fixture(scope="module")
def ranks(folder: Path, one: Callable[[str], Outcome]) -> Callable[[str], list[Outcome]]:
    """What each rank reached, by name of the run. Two launches for all."""

    @cache
    def launch(on_nodes: bool) -> None:
        names = NODES if on_nodes else [*DDP, *TOGETHER, *MUTANTS, "failing"]
        runs = {name: MODELS[model] | how for name, (model, how) in EQUAL.items()} | TOGETHER | MUTANTS
        runs["failing"] = FAILING
        plan = [{"name": name, **COMMON, **runs[name]} for name in names]
        if on_nodes:
            one("odd")  # leaves a checkpoint to go on from
        with two_ranks(folder, plan, nodes=2 if on_nodes else 1) as launcher:
            launcher.wait(timeout=280)  # what counts is what the ranks wrote: gloo may abort one that has finished

    def outcomes(name: str) -> list[Outcome]:
        launch(name in NODES)
        files = [folder / f"{name}-{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), (folder / "output.txt").read_text()[-4000:]
        return [torch.load(file) for file in files]

    return outcomes


def assert_equal_to_rounding(reached: Outcome, expected: Outcome, dtype: str) -> None:
    assert reached["metrics"]["topology_updates"] == UPDATES
    assert reached["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
    for part in ("index", "ever_active"):
        for layer, blocks in expected[part].items():
            assert torch.equal(reached[part][layer], blocks), (part, layer)
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (expected, reached)]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE[dtype, "loss"], rel=0)
    # A piece may be as likely as another, and one of them the right one.
    for score, off in ((GAIN, TOLERANCE[dtype, "loss"]), ("eval_accuracy", 0.02)):
        scores = [[entry[score] for entry in run["log"] if score in entry] for run in (expected, reached)]
        assert scores[1] == pytest.approx(scores[0], abs=off, rel=0)
    worst = {"loss": max(abs(a - b) for a, b in zip(*losses, strict=True))}
    for key, tensor in expected["model"].items():
        kind = "key.bias" if key.endswith("key.bias") else "parameter"
        difference = float((reached["model"][key] - tensor).abs().max())
        assert difference <= TOLERANCE[dtype, kind], (key, difference)
        worst[kind] = max(worst.get(kind, 0.0), difference)
    print(f"{STEPS} steps, {UPDATES} updates, {dtype}, largest differences: {worst}")  # noqa: T201


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_equal_one_process(
    ranks: Callable[[str], list[Outcome]], one: Callable[[str], Outcome], name: str
) -> None:
    model, how = EQUAL[name]
    two, expected = ranks(name), one(model)
    assert_equal_to_rounding(two[0], expected, MODELS[model].get("dtype", "float32"))

    # The test means something: the ranks held different rows, together those of the one process, ...
    shares = [per_step(rank["masked"], how.get("gradient_accumulation_steps", 1)) for rank in two]
    first = 10 if "resume" in how else 0
    steps = min(len(shares[0]), STEPS - first)
    assert [sum(pair) for pair in zip(*shares, strict=True)][:steps] == expected["masked"][first : first + steps]
    assert sum(a != b for a, b in zip(*shares, strict=True)) > steps // 2
    # ... and their part of the blocks.
    for layer, index in expected["index"].items():
        parts = [len(index) - len(index) // 2, len(index) // 2] if "sharded" in how else [len(index)] * 2
        assert [rank["local_blocks"][layer] for rank in two] == parts
    assert {rank["launch"]["GROUP_WORLD_SIZE"] for rank in two} == {"2" if name in NODES else "1"}


def per_step(numbers: list[int], accumulation: int) -> list[int]:
    """Sums over the micro-batches of each step."""
    return [sum(numbers[i : i + accumulation]) for i in range(0, len(numbers) - accumulation + 1, accumulation)]


@pytest.mark.parametrize("name", [*EQUAL, *TOGETHER])
def test_ranks_hold_the_same_bits(ranks: Callable[[str], list[Outcome]], name: str) -> None:
    first, second = ranks(name)
    for part in ("model", "moments", "ever_active"):
        assert first[part].keys() == second[part].keys()
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]), (part, key)


def test_eight_times_one_row_is_once_eight(tmp_path: Path) -> None:
    """Also where the last step of an epoch has five."""
    settings = {**COMMON, **MODELS["double"], "rows": 13 * 8 + 5}
    whole = worker.train(str(tmp_path), "1x8", batch=8, **settings)
    parts = worker.train(str(tmp_path), "8x1", batch=1, gradient_accumulation_steps=8, **settings)
    assert_equal_to_rounding(parts, whole, "float64")


def test_a_sharded_run_resumes_bit_for_bit(ranks: Callable[[str], list[Outcome]]) -> None:
    for resumed, undisturbed in zip(ranks("sharded, resumed"), ranks("sharded oddly"), strict=True):
        for part in ("model", "index", "moments", "ever_active"):
            for key, tensor in undisturbed[part].items():
                assert torch.equal(resumed[part][key], tensor), (part, key)
        assert resumed["log"] == undisturbed["log"]


def test_one_process_goes_on_from_a_sharded_run(
    ranks: Callable[[str], list[Outcome]], one: Callable[[str], Outcome], folder: Path
) -> None:
    ranks("sharded oddly")
    source = "sharded oddly/checkpoint-10"
    reached = worker.train(str(folder), "from shards", batch=32, resume=source, **COMMON, **MODELS["odd"])
    assert_equal_to_rounding(reached, one("odd"), "float64")


def test_shards_are_saved_as_one_process_saves(
    ranks: Callable[[str], list[Outcome]], one: Callable[[str], Outcome], folder: Path
) -> None:
    one("odd")
    ranks("sharded oddly")
    theirs, ours = (folder / run / f"checkpoint-{STEPS}" for run in ("one, odd", "sharded oddly"))
    files = [{file.name for file in checkpoint.iterdir()} for checkpoint in (theirs, ours)]
    assert {name for name in files[0] if "rng_state" not in name} == {
        name for name in files[1] if "rng_state" not in name
    }
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    with (
        safe_open(ours / "model.safetensors", "pt") as saved,
        safe_open(theirs / "model.safetensors", "pt") as expected,
    ):
        assert saved.metadata().keys() == expected.metadata().keys() >= {"format", "crc32"}
    expected, saved = (load_file(checkpoint / "model.safetensors") for checkpoint in (theirs, ours))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-13)
    moments = [torch.load(checkpoint / "optimizer.pt") for checkpoint in (theirs, ours)]
    assert moments[0]["param_groups"] == moments[1]["param_groups"]
    torch.testing.assert_close(
        moments[1]["state"], moments[0]["state"], rtol=0, atol=TOLERANCE["float64", "parameter"]
    )


def test_all_ranks_load_the_best_model(ranks: Callable[[str], list[Outcome]], folder: Path) -> None:
    (best,) = {rank["best"] for rank in ranks("best model")}
    assert Path(best).parent == folder / "best model"
    losses = {entry["step"]: entry["eval_loss"] for entry in ranks("best model")[0]["log"] if "eval_loss" in entry}
    assert Path(best).name == f"checkpoint-{max(losses, key=losses.get)}"
    assert max(losses, key=losses.get) < STEPS, "the last model is the best: nothing had to be loaded"


@pytest.mark.parametrize("name", ["other timings"])
def test_ranks_that_time_otherwise_use_the_same_backends(ranks: Callable[[str], list[Outcome]], name: str) -> None:
    first, second = (outcome["backends"] for outcome in ranks(name))
    assert len(first.keys() & second.keys()) >= 6  # three shapes of layers, both ways
    assert {*first.values(), *second.values()} == {"tiled"}


def test_a_rank_without_rows_repeats_others(
    ranks: Callable[[str], list[Outcome]], one: Callable[..., Outcome]
) -> None:
    for outcome in ranks("repeated rows"):
        assert "error" not in outcome
        assert outcome["metrics"]["topology_updates"] == UPDATES
        assert outcome["log"][-1]["step"] == STEPS


@pytest.mark.parametrize("name", MUTANTS)
def test_ranks_that_disagree_stop(ranks: Callable[[str], list[Outcome]], name: str) -> None:
    for outcome in ranks(name):
        error = outcome.get("error", "trained to the end")
        expected = OTHER_SETTINGS if "settings_of_rank" in MUTANTS[name] else ANOTHER_TOPOLOGY
        assert error.startswith(f"RuntimeError: {expected}")


def test_no_rank_waits_for_one_that_has_failed(ranks: Callable[[str], list[Outcome]], folder: Path) -> None:
    for outcome in ranks("failing"):
        assert outcome["error"].startswith("FloatingPointError: Loss and gradients must be finite.")
        assert "in step 15. Weights and topology are as after the step before; the last checkpoint" in outcome["error"]
        assert f"{folder}/failing/checkpoint-5" in outcome["error"]
    said = (folder / "output.txt").read_text()
    assert f"Got OSError: [Errno 28] No space left while saving checkpoint-10 in {folder}/failing" in said
    assert {path.name for path in (folder / "failing").iterdir() if path.is_dir()} == {"checkpoint-5"}
