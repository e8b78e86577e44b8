"""Passes over the data: each has its own masks and goes on where it was left, whoever makes the batches."""

import copy
import gc
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainerState

from hf_dynsparse import DynSparseTrainer
from hf_dynsparse.data import DataCollatorForWholeWordMasking
from hf_dynsparse.training.callbacks.throughput import pass_and_step
from tests.toy import toy_arguments, toy_collator, toy_examples, toy_model


class Stream(IterableDataset):
    """Rows in order, shared out among workers; nobody knows how many."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        yield from self.rows if worker is None else self.rows[worker.id :: worker.num_workers]


class Watched(DynSparseTrainer):
    """Remembers the masks of every step, by the row: the words of a row, and where labels are."""

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> torch.Tensor:
        ids, labels = inputs["input_ids"], inputs["labels"]
        words = torch.where(labels == -100, ids, labels).tolist()
        masks = dict(zip(map(tuple, words), (labels != -100).tolist(), strict=True))
        vars(self).setdefault("masks", []).append(masks)
        return super().training_step(model, inputs, *rest, **kwargs)


def watched(folder: Path, data: Any, seed: int = 0, **settings: Any) -> Watched:
    """Passes of two steps, and dropout that draws from the global generator."""
    arguments = {"max_steps": 5, "num_topology_updates": 2, "seeded_dropout": False, **settings}
    return Watched(
        toy_model(seed, hidden_dropout_prob=0.1),
        toy_arguments(folder, **arguments),
        data_collator=toy_collator(),
        train_dataset=data,
        eval_dataset=toy_examples(4, seed=1),
    )


def assert_same_end(one: DynSparseTrainer, other: DynSparseTrainer) -> None:
    left, right = one.model.state_dict(), other.model.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    losses = [[{k: e[k] for k in e if "loss" in k} for e in t.state.log_history[:-1]] for t in (one, other)]
    assert losses[0] == losses[1]
    assert [e["epoch"] for e in one.state.log_history] == [e["epoch"] for e in other.state.log_history]


@pytest.fixture
def workers_end_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Persistent workers go with their loader; torch would wait five seconds for each that garbage collection ends."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    yield
    gc.collect()


@pytest.mark.usefixtures("workers_end_at_once")
@pytest.mark.parametrize(
    ("kind", "workers", "persistent"),
    [(list, 0, False), (Stream, 0, False), (list, 2, True), (Stream, 1, True), (Stream, 2, False)],
)
def test_passes_have_their_own_masks_and_resume_is_exact(
    tmp_path: Path, kind: type, workers: int, persistent: bool
) -> None:
    # Stopped in the middle of the second pass; a third one follows, for which persistent workers are started anew.
    settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    settings |= {"mlm_probability_schedule": "0.4:0.2"} if persistent else {}  # workers get another collator then
    straight = watched(tmp_path / "straight", kind(toy_examples(8)), save_strategy="steps", save_steps=3, **settings)
    straight.train()
    first, second = ({k: v for step in straight.masks[start : start + 2] for k, v in step.items()} for start in (0, 2))
    assert len(first) > 4
    assert first.keys() == second.keys()
    assert [row for row in first if first[row] == second[row]] == []
    resumed = watched(tmp_path / "resumed", kind(toy_examples(8)), seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.masks == straight.masks[3:]
    assert_same_end(straight, resumed)


@pytest.mark.parametrize(
    ("strategy", "stop"), [({"save_strategy": "steps", "save_steps": 2}, 4), ({"save_strategy": "epoch"}, 2)]
)
def test_a_stream_goes_on_from_the_end_of_a_pass(tmp_path: Path, strategy: dict[str, Any], stop: int) -> None:
    settings = {"eval_strategy": "epoch", **strategy}
    straight = watched(tmp_path / "straight", Stream(toy_examples(8)), **settings)
    straight.train()
    assert [e["epoch"] for e in straight.state.log_history if "eval_loss" in e][:2] == [1.0, 2.0]
    resumed = watched(tmp_path / "resumed", Stream(toy_examples(8)), seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert resumed.masks == straight.masks[stop:]
    assert_same_end(straight, resumed)


def test_accumulation_over_a_stream_resumes_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = watched(tmp_path / "straight", Stream(toy_examples(8)), **saving, **settings)
    straight.train()
    resumed = watched(tmp_path / "resumed", Stream(toy_examples(8)), seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.masks == straight.masks[6:]
    assert_same_end(straight, resumed)


@pytest.mark.usefixtures("workers_end_at_once")
def test_persistent_workers_that_evaluate_leave_the_generator_of_the_model_alone(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 1, "max_steps": 4}
    settings |= {"dataloader_persistent_workers": True, "save_strategy": "steps", "save_steps": 2}
    straight = watched(tmp_path / "straight", toy_examples(8), **settings)
    straight.train()
    resumed = watched(tmp_path / "resumed", toy_examples(8), seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same_end(straight, resumed)


@pytest.mark.usefixtures("workers_end_at_once")
def test_persistent_workers_evaluate_the_rows_that_are_given(tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = watched(tmp_path, toy_examples(8), **workers)
    few = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = toy_examples(8, seed=2)
    assert trainer.evaluate()["eval_loss"] != few
    assert trainer.evaluate(toy_examples(4, seed=1))["eval_loss"] == few


def test_evaluation_and_prediction_have_the_masks_of_the_first_epoch(tmp_path: Path) -> None:
    # Whatever the collator was used for before, and whichever collator the trainer has been given since.
    trainer = watched(tmp_path, toy_examples(8), max_steps=4, learning_rate=0.0, num_topology_updates=0)
    trainer.data_collator.set_epoch(5)
    start = trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    trainer.train()
    assert trainer.data_collator.epoch == 1
    assert (trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).metrics["test_loss"]) == start
    trainer.data_collator = toy_collator(seed=1)
    assert trainer.evaluate()["eval_loss"] != start[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_see_the_epoch_and_copies_have_their_own(workers: int) -> None:
    collator = toy_collator()
    settings = {"num_workers": workers, "persistent_workers": workers > 0, "batch_size": 4}
    loader = DataLoader(toy_examples(4), collate_fn=collator, **settings)
    masks = []
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        masks.append(next(iter(loader))["labels"].tolist())
    assert masks[0] == masks[2] != masks[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: ForkingPickler.loads(bytes(ForkingPickler.dumps(c)))])
def test_a_copy_is_one_of_its_own_and_what_a_worker_is_sent_is_not(copied: Any) -> None:
    collator = toy_collator()
    collator.set_epoch(2)
    other: DataCollatorForWholeWordMasking = copied(collator)
    assert other.epoch == 2
    assert other._epoch.is_shared()
    collator.set_epoch(3)
    assert other.epoch == (2 if copied is copy.deepcopy else 3)


@pytest.mark.parametrize(
    ("epoch", "step", "where"),
    [
        (0.3, 3, (0, 3)),  # in the first pass of a run of ten steps
        (1.2, 6, (1, 2)),  # in the second, after a first one of four
        (1.0, 4, (1, 0)),  # before the second
        (1.0, 10, (0, 10)),  # at the end of a run that has never come to the end of the data
        (2.1, 10, (2, 1)),  # at the end of one that has
    ],
)
def test_where_a_stream_was_left(epoch: float, step: int, where: tuple[int, int]) -> None:
    assert pass_and_step(TrainerState(epoch=epoch, global_step=step, max_steps=10)) == where
