"""Estimates against what is then saved, counted, trained and printed in the paper."""

import json

import pytest
import torch
from helpers import generator
from toy import toy_batch, toy_config, toy_model

from hf_dynsparse import DynSparseBertConfig, TopologyUpdater, estimate_run, sparse_layers
from hf_dynsparse.reports.estimate import expected_coverage
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.topology import dof_coverage


# arXiv:2108.06277, tables of the appendix: printed digits.
@pytest.mark.parametrize(
    ("preset", "sparsity", "flops"),
    [("mini", 0.0, "2.617e+09"), ("small", 0.0, "1.007e+10"), ("medium", 0.9, "2.738e+09"), ("base", 0.9, "8.33e+09")],
)
def test_flops_of_the_paper(preset, sparsity, flops):
    estimate = estimate_run(DynSparseBertConfig.preset(preset, sparsity=sparsity, block_size=1))
    assert f"{estimate.flops:.{len(flops) - 6}e}" == flops


@pytest.mark.parametrize(
    ("preset", "rate"), [("mini", 5.12e-3), ("small", 2.56e-3), ("medium", 1.28e-3), ("base", 1.28e-3), ("tiny", None)]
)
def test_learning_rates_of_the_paper(preset, rate):
    estimate = estimate_run(DynSparseBertConfig.preset(preset, sparsity=0.9))
    assert round(estimate.learning_rate_factor, 2) == 6.40
    assert estimate.learning_rate == (None if rate is None else pytest.approx(rate, rel=1e-3))


def test_a_learning_rate_that_is_given():
    estimate = estimate_run(toy_config(sparsity=0.9), dense_learning_rate=1e-3)
    assert estimate.learning_rate == pytest.approx(6.40e-3, rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [{"block_size": 1}, {"block_size": 4}, {"block_size": (1, 4), "distribution": "erk"}, {"sparsity": 0.0}],
    ids=str,
)
def test_sizes_are_those_of_the_model(overrides, tmp_path):
    model = toy_model(**overrides)
    estimate = estimate_run(model.config)
    model.save_pretrained(tmp_path / "sparse")
    assert estimate.model.checkpoint_bytes == checkpoint_bytes(tmp_path / "sparse")
    indices = [layer.block_index for layer in sparse_layers(model).values()]
    assert estimate.encoder.index_bytes == sum(4 * index.numel() for index in indices)

    dense = model.to_dense()
    dense.save_pretrained(tmp_path / "dense")
    assert estimate.dense_model.checkpoint_bytes == checkpoint_bytes(tmp_path / "dense")
    matrices = [module.weight for module in dense.bert.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert estimate.dense_encoder.parameters == sum(matrix.numel() for matrix in matrices)

    optimizer = torch.optim.AdamW(model.parameters())
    model(**toy_batch()).loss.backward()
    held = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in held)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert estimate.model.moment_bytes == sum(4 * moment.numel() for moment in moments)
    held += [*model.parameters(), *moments, *indices]
    assert estimate.model.training_bytes == sum(4 * tensor.numel() for tensor in held)


def test_coverage_by_hand():
    # One of four blocks is active, and replaced twice: by one of the other three, or of all four.
    assert expected_coverage(1, 4, 0) == 0.25
    assert expected_coverage(1, 4, 1, 1.0, "constant") == pytest.approx(1 - 3 / 4 * 2 / 3)
    assert expected_coverage(1, 4, 2, 1.0, "constant") == pytest.approx(1 - 3 / 4 * (2 / 3) ** 2)
    assert expected_coverage(1, 4, 2, 1.0, "constant", readmit=True) == pytest.approx(1 - 3 / 4 * (3 / 4) ** 2)
    assert expected_coverage(4, 4, 3) == 1.0
    assert expected_coverage(3, 4, 1, 1.0) == 1.0  # three are pruned, but one position is free


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("readmit", [False, True], ids=["barred", "readmit"])
def test_coverage_is_what_a_run_reaches(schedule, readmit):
    model = toy_model(hidden_size=64, intermediate_size=128, block_size=1, sparsity=0.9)
    optimizer = torch.optim.SGD(model.parameters())
    settings = {"pruning_ratio": 0.5, "pruning_schedule": schedule, "readmit": readmit}
    updater = TopologyUpdater(model, optimizer, total_steps=100, num_topology_updates=20, **settings)
    for step in range(1, 101):
        if step in updater.update_steps:
            for layer in sparse_layers(model).values():  # as if training had made old and new weights alike
                torch.nn.init.normal_(layer.values, generator=generator(step))
        updater.step(step)
    estimate = estimate_run(model.config, max_steps=100, num_topology_updates=20, **settings)
    # 98,304 positions, of which each is covered or not: a standard deviation below 0.002.
    assert dof_coverage(sparse_layers(model).values()) == pytest.approx(estimate.coverage, abs=0.006)
    assert 0.3 < estimate.coverage < 0.9


def test_as_many_updates_as_the_trainer_makes():
    assert estimate_run(toy_config()).num_topology_updates == 80
    assert estimate_run(toy_config(), max_steps=2100).num_topology_updates == 20
    static = estimate_run(toy_config(sparsity=0.75), num_topology_updates=0)
    assert static.coverage == 0.25
    assert estimate_run(toy_config(sparsity=0.0)).coverage == 1.0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_steps": 10, "num_topology_updates": 20}, r"`num_topology_updates` must lie in \[0, 9\]"),
        ({"pruning_ratio": 1.5}, "`pruning_ratio` is the share of active blocks"),
        ({"pruning_schedule": "steps"}, "`pruning_schedule` must be one of"),
    ],
)
def test_what_cannot_be_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        estimate_run(toy_config(), **settings)


def test_the_run_is_what_its_steps_take():
    config = DynSparseBertConfig.preset("medium", sparsity=0.9, block_size=1)
    estimate = estimate_run(config, seq_len=128, max_steps=10_000, batch_size=32)
    saved = json.loads(json.dumps(estimate.to_dict()))
    assert saved["sparse"]["training_flops"] == 320_000 * saved["sparse"]["flops_per_sequence"]
    assert saved["dense"]["encoder_parameters"] == 8 * (4 * 512 * 512 + 2 * 512 * 2048)
    assert "training_flops" not in estimate_run(config, max_steps=1000).to_dict()["sparse"]
    rows = {line[:28].strip(): line[28:].split() for line in str(estimate).splitlines()}
    assert rows["FLOPs per sequence"] == ["2.738e+09", "2.013e+10", "0.136"]
    assert rows["encoder parameters"] == ["2,516,576", "25,165,824", "0.100"]
    assert "DOF coverage 91.0% to be expected after 80 topology updates" in str(estimate)
    assert str(estimate).endswith("learning rate 6.40 times that of the dense model: 0.00128")
