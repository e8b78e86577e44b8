"""What a run shows, and what it keeps from a person who has nothing to fear."""

import logging
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dynsparse.training import console
from hf_dynsparse.training.callbacks.console import ConsoleCallback, describe, show_lines_


STATE = TrainerState(global_step=12, max_steps=2_000, is_world_process_zero=True)
OF_RUN = {"dynsparse/tokens_per_second": 3189.4, "dynsparse/sparsity": 0.9, "dynsparse/flops": 4e8, "epoch": 0.1}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"loss": 6.48999, "grad_norm": 2.4, "learning_rate": 0.0056568, **OF_RUN, "own": 3, "left": "2 h"},
            "loss 6.49  rate 0.00566  3,189 tokens/s  2 h left  sparsity 90.0%  own 3",
        ),
        (
            {"loss": 1.0, "dynsparse/coverage": 0.25, "dynsparse/newborn_share": 0.125},
            "loss 1  coverage 25.0%  newborn 12%",
        ),
        (
            {"eval_loss": 5.7, "eval_context_gain": -0.2, "eval_runtime": 0.1, **OF_RUN},
            "evaluation: loss 5.7, context gain -0.2",
        ),
        (
            {"eval_accuracy": 0.5, "eval_collapsed": 1.0, "eval_runtime": 0.1},
            "evaluation: accuracy 0.5, one answer to everything",
        ),
        ({"eval_mm_accuracy": 0.5, "eval_mm_runtime": 0.1, **OF_RUN}, "eval_mm: accuracy 0.5"),
        ({"train_runtime": 7200.0, "train_loss": 6.0, "total_flos": 1e9, "epoch": 1.0}, "trained in 2 h, mean loss 6"),
        ({"early_bird/distance": 0.1234567}, "early_bird/distance 0.1235"),
    ],
)
def test_an_entry_is_one_line(logs: dict[str, Any], line: str) -> None:
    assert describe(logs, STATE) == f"step 12/2,000  {line}"


@pytest.mark.parametrize(("logging_steps", "told"), [(0.02, list(range(5, 101, 5))), (1, list(range(1, 101)))])
def test_a_share_of_the_run_is_not_a_flood(
    logging_steps: float, told: list[int], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = TrainingArguments(str(tmp_path), logging_steps=logging_steps, disable_tqdm=True, use_cpu=True)
    state, control = TrainerState(max_steps=100, is_world_process_zero=True), TrainerControl()
    callback = ConsoleCallback()
    callback.on_train_begin(args, state, control)
    for state.global_step in range(1, 101):
        callback.on_log(args, state, control, {"loss": 1.0})
        for _ in range(2):  # said once
            callback.on_log(args, state, control, {"eval_loss": 1.0, "eval_runtime": 1.0})
    callback.on_train_end(args, state, control)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines if "evaluation" not in line] == told
    assert sum("evaluation" in line for line in lines) == 100


def test_it_takes_the_place_of_what_prints_dictionaries() -> None:
    callbacks: list[Any] = [PrinterCallback(), TrainerControl(), ProgressCallback()]
    show_lines_(callbacks)
    assert [type(callback) for callback in callbacks] == [PrinterCallback, TrainerControl, ConsoleCallback]


def said(name: str, keep: Any, text: str) -> list[str]:
    """What is left of a record of transformers."""
    record = logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)
    return [record.getMessage()] if keep(record) else []


def test_shares_of_a_resumed_run_do_not_differ_from_steps() -> None:
    begin = "Warning: The following arguments do not match the ones in the checkpoint: "
    share = "\n\tlogging_steps: 0.02 (from args) != 2 (from trainer_state.json)"
    batch = "\n\tper_device_train_batch_size: 4 (from args) != 8 (from trainer_state.json)"
    assert said("a", console.without_shares, begin + share) == []
    assert said("a", console.without_shares, begin + share + batch) == [begin + batch]
    assert said("a", console.without_shares, "another") == ["another"]


def test_another_head_is_one_line() -> None:
    def table(*rows: str) -> str:
        return "\n".join(["Model LOAD REPORT from: x", "Key  | Status  | ", "-----+--------+-", *rows, "", "Notes:"])

    head = (
        "classifier.weight | \x1b[31mMISSING\x1b[0m | ",
        "classifier.bias | MISSING | ",
        "cls.a.bias | UNEXPECTED | ",
    )
    assert said("a", console.with_short_report, table(*head)) == [
        "fresh weights: classifier; left out of the checkpoint: cls"
    ]
    for row in ("bert.encoder.layer.{0, 1}.dense.weight | MISSING | ", "classifier.weight | MISMATCH | sizes"):
        assert said("a", console.with_short_report, table(*head, row)) == [table(*head, row)]


def test_another_process_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    assert console.leave_to_first() == ""
    monkeypatch.setenv("RANK", "1")
    assert console.leave_to_first() == "rank 1: "
    assert waited == [console.AFTER_FIRST]
