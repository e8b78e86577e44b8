"""
A density that changes: what is saved half-way loads and goes on bit for bit, FLOPs follow, and two ranks are one.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launch import two_ranks
from toy import toy_config, toy_model, toy_trainer
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer

from hf_dynsparse import TopologyCallback, flops_per_sequence, sparse_layers, sparsify_
from hf_dynsparse.blocks.sizes import count_active_blocks
from hf_dynsparse.models.auto import every_block
from hf_dynsparse.ops import choice, tuning


METHODS = {
    "gmp": {"method": "gmp", "density_end": 0.75, "num_topology_updates": 5},
    "granet": {"method": "granet", "num_topology_updates": 5},
    "ac_dc": {"method": "ac_dc", "density_schedule": "0:1,0.3:0,0.5:1,0.7:0", "num_topology_updates": 11},
    "mst": {"method": "mst", "density_schedule": "0:1,0.2:0.5,0.4:0,0.8:1", "num_topology_updates": 11},
    "snfs": {"method": "snfs", "num_topology_updates": 5},
    "ages": {"method": "gmp", "num_topology_updates": 5, "block_age_adam": True, "pruning_ratio": 0.3},
}
SAVED = {"save_strategy": "steps", "save_steps": 5}


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    moments = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, state in trainer.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {**trainer.model.state_dict(), **moments}


def density_of(config: Any) -> tuple[Any, ...]:
    return config.sparsity, config.nnzb, config.distribution


def sizes(model: Any) -> dict[str, int]:
    return {name: layer.nnzb for name, layer in sparse_layers(model).items()}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gmp"])  # "ages" holds all of it
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, method: str) -> None:
    whole = toy_trainer(tmp_path, **METHODS[method], **SAVED)
    whole.train()
    resumed = toy_trainer(tmp_path / "resumed", **METHODS[method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected, reached = state_of(whole), state_of(resumed)
    assert expected.keys() == reached.keys()
    assert all(torch.equal(tensor, reached[name]) for name, tensor in expected.items())
    assert whole.state.total_flos == resumed.state.total_flos
    assert whole.topology.metrics == resumed.topology.metrics
    assert density_of(whole.model.config) == density_of(resumed.model.config)
    assert not any(name.endswith("gradient_momentum") for name in expected)

    # Half-way checkpoints are models like any other, of the size that they had.
    half = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-5")
    said = {entry["step"]: entry["dynsparse/sparsity"] for entry in whole.state.log_history if "loss" in entry}
    counts = sizes(half)
    positions = sum(layer.num_blocks for layer in sparse_layers(half).values())
    assert 1 - sum(counts.values()) / positions == pytest.approx(said[5])
    assert half.config.sparsity == pytest.approx(said[5])
    assert half(torch.arange(8)[None]).logits.isfinite().all()


PRUNE_OFA = {
    "method": "prune_ofa",
    "num_topology_updates": None,
    "topology_update_every": 1,
    "final_sparsity": 0.75,
    "block_age_adam": True,
}


def test_a_dense_model_is_pruned_step_by_step(tmp_path: Path) -> None:
    """From all its blocks, which may return once pruned; a stop changes nothing."""
    every = every_block(toy_config(), 4)
    whole = toy_trainer(tmp_path, toy_model(**every), **PRUNE_OFA, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = toy_trainer(tmp_path / "resumed", toy_model(**every), **PRUNE_OFA)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected, reached = state_of(whole), state_of(resumed)
    assert expected.keys() == reached.keys()
    assert all(torch.equal(tensor, reached[name]) for name, tensor in expected.items())
    assert not any(name.endswith("hidden_values") for name in expected)
    blocks = {name: layer.num_blocks for name, layer in sparse_layers(whole.model).items()}
    places = []
    for step in range(1, 13):
        model, told = AutoModelForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}", output_loading_info=True)
        assert not told["unexpected_keys"]
        sparsity = 0.75 - 0.75 * max(0.0, 1 - step / 6) ** 3
        assert sizes(model) == {name: count_active_blocks(count, 1 - sparsity) for name, count in blocks.items()}
        places.append({(name, place) for name, x in sparse_layers(model).items() for place in x.block_index.tolist()})
    came = [len(after - before) for before, after in itertools.pairwise(places)]
    assert sum(came[:8]) > 0  # some return
    assert not any(came[8:])  # none after 0.8 of the run
    for trainer in (whole, resumed):
        assert density_of(trainer.model.config)[:2] == (0.75, None)
    other = toy_trainer(tmp_path / "other", **PRUNE_OFA)
    with pytest.raises(ValueError, match="with 16 active blocks, but the run of .* was given one with 64"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_configuration_and_flops_follow_the_density(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, **METHODS["gmp"], save_strategy="steps", save_steps=1)
    trainer.train()
    updates = (2, 4, 6, 8, 10)
    sparsity, flops, before = 0.0, 0, toy_model(sparsity=0.0).config
    for step in range(1, 13):
        config = AutoConfig.from_pretrained(tmp_path / f"checkpoint-{step}")
        flops += 4 * flops_per_sequence(before, 16)
        if step in updates:
            progress = 1.0 if step == 10 else min(1.0, step / 12 / 0.75)
            sparsity = 0.75 - 0.75 * (1 - progress) ** 3
        density = 1 - sparsity
        assert {*config.nnzb_per_layer().values()} == {count_active_blocks(n, density) for n in (64, 128)}
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["total_flos"] == flops
        before = config
    # At the end nothing is left to be said layer by layer.
    assert density_of(config)[:2] == (0.75, None)
    assert trainer.model.config.nnzb is None


def test_another_architecture_resumes_too(tmp_path: Path) -> None:
    """Whose configuration is written by `sparsify_`."""

    def trainer(folder: Path, **arguments: Any) -> Any:
        model = sparsify_(toy_model(sparsity=0.0).to_dense(), block_size=4, sparsity=0.75)
        return toy_trainer(folder, model, **METHODS["gmp"], **arguments)

    whole = trainer(tmp_path, **SAVED)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected, reached = state_of(whole), state_of(resumed)
    assert all(torch.equal(tensor, reached[name]) for name, tensor in expected.items())
    half = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-5")
    assert sum(sizes(half).values()) > sum(sizes(whole.model).values())


def test_the_best_model_is_one_of_the_final_density(tmp_path: Path) -> None:
    # The highest loss counts as the best: that of the first evaluation, but for the density.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = toy_trainer(
        tmp_path, **METHODS["gmp"], **best, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    step = trainer.state.best_global_step
    assert max(losses, key=losses.get) == 3
    assert step == max((9, 12), key=losses.get)
    saved = AutoModelForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}")
    assert sizes(trainer.model) == sizes(saved) == sizes(toy_model())
    assert trainer.model.config.nnzb is saved.config.nnzb is None
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_a_resumed_run_must_lead_to_the_same_size(tmp_path: Path) -> None:
    toy_trainer(tmp_path, **METHODS["gmp"], **SAVED).train()
    checkpoint = str(tmp_path / "checkpoint-5")
    other = toy_trainer(tmp_path / "other", toy_model(sparsity=0.5), **METHODS["gmp"])
    with pytest.raises(ValueError, match="with 32 active blocks, but the run of .* was given one with 16"):
        other.train(resume_from_checkpoint=checkpoint)
    changed = toy_trainer(tmp_path / "other", **{**METHODS["gmp"], "density_end": 0.5})
    with pytest.raises(ValueError, match=r"density_end: 0.5 \(checkpoint: 0.75\)"):
        changed.train(resume_from_checkpoint=checkpoint)


def test_the_stock_trainer_changes_density_in_one_process(tmp_path: Path) -> None:
    model, like = toy_model(), toy_trainer(tmp_path / "like", **METHODS["gmp"])
    stock = Trainer(
        model,
        like.args,
        data_collator=like.data_collator,
        train_dataset=like.train_dataset,
        callbacks=[TopologyCallback(like.args.topology_settings())],
    )
    stock.train()
    assert (model.config.sparsity, model.config.nnzb) == (0.75, None)
    assert {layer.sparsity for layer in sparse_layers(model).values()} == {0.75}


def test_new_sizes_are_timed_now_and_then_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def time_backends(problem: Any, backends: list[Any]) -> tuning.Timing:
        timed.append((problem.shape, problem.backward, problem.nnzb))
        return tuning.Timing({backend.name: float(len(timed) % 2 == i % 2) for i, backend in enumerate(backends)})

    monkeypatch.setattr(tuning, "time_backends", time_backends)
    trainer = toy_trainer(tmp_path, method="gmp", num_topology_updates=11, kernel_tuning="force", **SAVED)
    trainer.train()
    met = {(problem.shape, problem.backward, problem.nnzb) for problem in choice.plan.choices}
    assert 6 * 2 <= len(set(timed)) < len(met)  # three shapes of layers, both ways
    # A resumed run has all choices from its checkpoint, those for the update of that very step included.
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["KernelCallback"]["attributes"]["choices"]
    half = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-5")
    assert {*sizes(half).values()} <= {saved["nnzb"] for saved in kept}


EVERY_OTHER = {"num_topology_updates": None, "topology_update_every": 2}
# In double precision, where sums in another order make no difference that counts.
RUNS = {
    "pruned": {"method": "prune_ofa", "final_sparsity": 0.9, "num_topology_updates": 6},
    "cubic": {"method": "granet", "num_topology_updates": 4},
    "phases": {"method": "ac_dc", "density_schedule": "0:1,0.3:0,0.6:1,0.8:0", **EVERY_OTHER},
    "snfs": {"method": "snfs", "num_topology_updates": 4},
}
COMMON = {"steps": 12, "dtype": "float64", "save_strategy": "steps", "save_steps": 6}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    plan = [{"name": name, "batch": 16, **COMMON, **run} for name, run in RUNS.items()]
    plan.append({"name": "resumed", "batch": 16, "resume": "cubic/checkpoint-6", **COMMON, **RUNS["cubic"]})
    plan.append({"name": "sharded", "batch": 16, "sharded": True, **COMMON, **RUNS["cubic"]})
    with two_ranks(tmp_path, plan) as launcher:
        one = {name: worker.train(str(tmp_path), f"one, {name}", batch=32, **COMMON, **RUNS[name]) for name in RUNS}
        launcher.wait(timeout=280)
    outcomes = {run["name"]: [torch.load(tmp_path / f"{run['name']}-{rank}.pt") for rank in range(2)] for run in plan}
    for refused in outcomes["sharded"]:
        assert "needs `DynSparseTrainer`, in one process or DDP; another" in refused["error"]
    for name, expected in one.items():
        for reached in outcomes[name]:
            assert "error" not in reached, reached
            for layer, index in expected["index"].items():
                assert torch.equal(reached["index"][layer], index)
            for key, tensor in expected["model"].items():
                assert float((reached["model"][key] - tensor).abs().max()) < 1e-12, key
        for key, tensor in outcomes[name][0]["model"].items():
            assert torch.equal(tensor, outcomes[name][1]["model"][key])
    for key, tensor in outcomes["cubic"][0]["model"].items():
        assert torch.equal(outcomes["resumed"][0]["model"][key], tensor)
