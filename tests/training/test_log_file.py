"""`log.jsonl` against the log of the Trainer."""

import json
import logging
import shutil

import pytest
from toy import toy_trainer

from hf_dynsparse.reports.facts import LOG_FILE, read_facts
from hf_dynsparse.training.callbacks.log_file import LogFile


def train(folder, resume=None, **arguments):
    trainer = toy_trainer(folder, eval_strategy="steps", eval_steps=4, logging_steps=2, **arguments)
    trainer.add_callback(LogFile())
    trainer.evaluate()  # before training: not of the run
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    return trainer


def lines_of(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(folder, save_strategy="steps", save_steps=4)


def test_the_file_is_the_log(finished):
    folder, trainer = finished
    assert lines_of(folder) == trainer.state.log_history
    assert {"loss", "dynsparse/coverage", "dynsparse/tokens_per_second", "step"} < lines_of(folder)[0].keys()


def test_a_resumed_run_goes_on_from_its_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-12")
    trainer = train(tmp_path, str(tmp_path / "checkpoint-8"), save_strategy="no")
    assert lines_of(tmp_path) == trainer.state.log_history
    again, first = (
        [[entry.get(name) for name in ("step", "loss", "eval_loss")] for entry in lines_of(folder)]
        for folder in (tmp_path, finished[0])
    )
    assert again == first


def test_a_line_without_end_is_not_read(finished, tmp_path):
    lines = (finished[0] / LOG_FILE).read_text(encoding="utf-8")
    (tmp_path / LOG_FILE).write_text(lines[: len(lines) - 5], encoding="utf-8")
    facts = read_facts(tmp_path)
    assert facts["history"] == finished[1].state.log_history[:-1]
    assert facts["steps"] == 12


def test_a_full_disk_costs_lines(tmp_path, caplog):
    (tmp_path / LOG_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, max_steps=4)
    assert trainer.state.global_step == 4
    assert [record.name for record in caplog.records if "ends here" in record.message] == [LogFile.__module__]
