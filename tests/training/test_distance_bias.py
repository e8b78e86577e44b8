"""A distance bias that falls while a model trains: its schedule, and what checkpoints of such a run compute."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_batch, toy_model, toy_trainer
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from hf_dynsparse import DynSparseTrainer, DynSparseTrainingArguments
from hf_dynsparse.models.auto import load_pretrained
from hf_dynsparse.models.position_bias import strength_of
from hf_dynsparse.training.callbacks.distance_bias import fall, parse_distance_bias


STEPS = 10
# Checkpoints at 2, 4, ...; the fall begins after step 2.7 and ends at step 8.
FALLING = {"max_steps": STEPS, "distance_bias": "1:0@0.8", "save_strategy": "steps", "save_steps": 2}
FALLING |= {"eval_strategy": "steps", "eval_steps": 2}
SHORT: dict[str, Any] = {"max_steps": 2, "num_topology_updates": 0}


@pytest.mark.parametrize(
    ("text", "bias"),
    [("1:0@0.7", (1, 0, 0.7)), ("2", (2, 2, 1)), ("0.5:0.25@1", (0.5, 0.25, 1)), ("1:1@.5", (1, 1, 0.5))],
)
def test_what_a_schedule_says(text: str, bias: tuple[float, float, float]) -> None:
    schedule = parse_distance_bias(text)
    assert schedule == bias
    start, end, until = bias
    assert [schedule.strength(share) for share in (0, until / 3, until, 1)] == pytest.approx([start, start, end, end])


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "1:2@0.5", "1:0", "1:0@0", "1:0@1.5", "nan", "inf", "1@0.5"])
def test_wrong_schedules(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"must be START:END@SHARE.*Got '{text}'. Write 1:0@0.7"):
        DynSparseTrainingArguments(str(tmp_path), distance_bias=text)


def test_the_fall_is_smooth() -> None:
    assert [fall(way) for way in (0, 1 / 3, 1, 2)] == [1, pytest.approx(1), 0, 0]
    assert fall(2 / 3) == pytest.approx(7 / 63)  # (64 ** 0.5 - 1) / 63
    left = [fall(way / 100) for way in range(33, 101)]
    steps = [before - after for before, after in zip(left, left[1:], strict=False)]
    assert min(steps) > 0
    assert steps[-1] < 0.002


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**{k: v for k, v in toy_batch().items() if k != "labels"}).logits
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> DynSparseTrainer:
    """A run whose model attends: its first weights are large. Not to be changed."""
    folder = tmp_path_factory.mktemp("falling")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = toy_trainer(folder, toy_model(initializer_range=0.3), **FALLING, **best)
    trainer.train()
    trainer.save_model()
    return trainer


def test_a_checkpoint_computes_what_training_did(run: DynSparseTrainer, tmp_path: Path) -> None:
    log = {entry["step"]: entry for entry in run.state.log_history if "eval_loss" in entry}
    schedule = parse_distance_bias(FALLING["distance_bias"])
    for step in (2, 6, 8, STEPS):
        folder = Path(str(run.args.output_dir), f"checkpoint-{step}")
        config = json.loads((folder / "config.json").read_text())
        assert strength_of(config) == log[step]["dynsparse/distance_bias"] == schedule.strength(step / STEPS)
        assert ("position_bias_strength" in config) is (step < 8)
        if step != 8:
            other = toy_trainer(tmp_path, AutoModelForMaskedLM.from_pretrained(folder), num_topology_updates=0)
            assert other.evaluate()["eval_loss"] == log[step]["eval_loss"]
    assert 0 < schedule.strength(0.6) < 0.2


def test_what_is_left_is_a_stock_bert(run: DynSparseTrainer, tmp_path: Path) -> None:
    model: Any = run.model
    assert model.config.to_dict().keys() == toy_model().config.to_dict().keys() | {"dtype"}
    assert model.config._attn_implementation == "sdpa"
    dense = model.to_dense()
    assert type(dense) is BertForMaskedLM
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(BertForMaskedLM.from_pretrained(tmp_path)), outputs(model))


def test_a_better_model_with_a_bias_is_not_the_best(run: DynSparseTrainer) -> None:
    assert run.state.best_global_step in (8, STEPS)


@pytest.mark.parametrize("other", [{"distance_bias": None}, {"distance_bias": "1:0@0.9"}, {"max_steps": 20}])
def test_a_run_goes_on_as_it_began(run: DynSparseTrainer, tmp_path: Path, other: dict[str, Any]) -> None:
    trainer = toy_trainer(tmp_path, toy_model(initializer_range=0.3), **{**FALLING, **other})
    with pytest.raises(ValueError, match="must have the distance bias of its checkpoint.*at step 6.*Give the `distan"):
        trainer.train(str(Path(str(run.args.output_dir), "checkpoint-6")))


def test_one_that_stays_is_a_part_of_the_model(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path, toy_model(initializer_range=0.3), max_steps=2, num_topology_updates=0, distance_bias="1"
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert strength_of(loaded.config) == 1
    assert torch.equal(outputs(loaded), outputs(trainer.model))
    # Without the argument it is trained on as it is.
    again = toy_trainer(tmp_path / "again", loaded, **SHORT)
    again.train()
    assert strength_of(again.model.config) == 1


def test_a_run_that_has_ended_is_loaded_without_one(run: DynSparseTrainer, tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, toy_model(initializer_range=0.3), **FALLING)
    assert strength_of(trainer.model.config) == 1
    trainer.train(str(Path(str(run.args.output_dir), f"checkpoint-{STEPS}")))
    assert strength_of(trainer.model.config) == 0


def test_what_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for fixed slopes. Got a model with position_bias='t5'"):
        toy_trainer(tmp_path, toy_model(position_bias="t5"), distance_bias="1")
    with pytest.raises(ValueError, match="for a whole model of transformers.*Got Linear"):
        toy_trainer(tmp_path, torch.nn.Linear(2, 2), distance_bias="1")


def test_a_dense_stock_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = toy_trainer(tmp_path, toy_model(initializer_range=0.3).to_dense(), distance_bias="0.5")
    assert "A dense BertForMaskedLM is loaded by transformers alone" in caplog.text
    trainer.save_model()
    ours = load_pretrained(AutoModelForMaskedLM, str(tmp_path))
    assert torch.equal(outputs(ours), outputs(trainer.model))
    assert not torch.equal(outputs(AutoModelForMaskedLM.from_pretrained(tmp_path)), outputs(trainer.model))
