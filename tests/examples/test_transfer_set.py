"""Pairs of sentences for a teacher to label, made of small files."""

import gzip
import random
from importlib import import_module
from typing import Any

import pytest

from hf_dynsparse.data import GLUE_TASKS
from tests.data.test_glue import OFFICIAL
from tests.scripts import EXAMPLES, run_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "study"))
    return import_module("transfer_set")


def test_altered_sentences_keep_two_thirds_of_their_words(script: Any) -> None:
    words = [f"w{i}" for i in range(12)]
    for seed in range(200):
        changed = script.altered(" ".join(words), "other words", random.Random(seed)).split()
        assert 8 <= len(changed) <= 12
        assert len(set(changed) - set(words) - {"other", "words"}) == 0
        assert len(set(changed) & set(words)) >= 8
    assert script.altered("one", "other", random.Random(0)) in ("one", "other")


def test_pairs_have_the_columns_of_the_task_and_none_of_its_own(script: Any, tmp_path: Any) -> None:
    for task in ("qnli", "mnli"):
        about, (header, row) = GLUE_TASKS[task], OFFICIAL[task]
        folder = tmp_path / "glue" / about.folder
        folder.mkdir(parents=True)
        for file in ("train", "dev", "dev_matched", "dev_mismatched"):
            lines = [header]
            for number in range(6):
                cells = dict(zip(header, row, strict=True)) | {about.label: about.labels[number % 2]}
                cells |= {name: f"{task} {file} {name} has row {number}" for name in about.columns}
                lines.append(list(cells.values()))
            (folder / f"{file}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text("= Title =\n" + "It has five words here. This one has five too.\n" * 9)
    output = tmp_path / "pairs.tsv.gz"
    where = f"--glue_dir {tmp_path / 'glue'} --text {tmp_path / 'text.txt'} --count 80 --output {output}"
    run_script(EXAMPLES / "study" / "transfer_set.py", f"--task_name qnli {where}")
    with gzip.open(output, "rt") as file:
        columns, *pairs = (tuple(line.rstrip("\n").split("\t")) for line in file)
    assert columns == ("question", "sentence")
    assert len(pairs) == len(set(pairs)) > 40
    assert not any("dev" in part for pair in pairs for part in pair)
    own = {(f"qnli train question has row {i}", f"qnli train sentence has row {i}") for i in range(6)}
    assert not own & set(pairs)
    assert any(pair[0].startswith("mnli train sentence1") for pair in pairs)
