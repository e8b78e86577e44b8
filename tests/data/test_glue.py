"""GLUE: official files into the columns of the Hub, and scores worked out by hand."""

import pytest

from hf_dynsparse.data import GLUE_TASKS, glue_metrics, read_glue


# Two lines of each official file: header if it has one, and a row.
OFFICIAL = {
    "cola": ([], ["gj04", "0", "*", "The cat sleep."]),
    "mnli": (["index", "sentence1", "sentence2", "label1", "gold_label"], ["7", "One.", "Two.", "x", "neutral"]),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "12", "34", "One.", "Two."]),
    "qnli": (["index", "question", "sentence", "label"], ["7", "Why?", "So.", "not_entailment"]),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["1", "2", "3", "A?", "B?", "1"]),
    "rte": (["index", "sentence1", "sentence2", "label"], ["7", "One.", "Two.", "entailment"]),
    "sst2": (["sentence", "label"], ["a fine film ", "1"]),
    "stsb": (["index", "genre", "sentence1", "sentence2", "score"], ["0", "news", "One.", "Two.", "3.250"]),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["7", "One.", "Two.", "0"]),
}
EXPECTED = {
    "cola": {"sentence": "The cat sleep.", "label": 0},
    "mnli": {"premise": "One.", "hypothesis": "Two.", "label": 1},
    "mrpc": {"sentence1": "One.", "sentence2": "Two.", "label": 1},
    "qnli": {"question": "Why?", "sentence": "So.", "label": 1},
    "qqp": {"question1": "A?", "question2": "B?", "label": 1},
    "rte": {"sentence1": "One.", "sentence2": "Two.", "label": 0},
    "sst2": {"sentence": "a fine film", "label": 1},
    "stsb": {"sentence1": "One.", "sentence2": "Two.", "label": 3.25},
    "wnli": {"sentence1": "One.", "sentence2": "Two.", "label": 0},
}


def write(folder, task, *, file="train", rows=1, header=None, row=None):
    official_header, official_row = OFFICIAL[task]
    header, row = official_header if header is None else header, official_row if row is None else row
    path = folder / GLUE_TASKS[task].folder / f"{file}.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(line) + "\n" for line in ([header] if header else []) + [row] * rows))
    return path


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_official_files(tmp_path, task):
    write(tmp_path, task, rows=2)
    write(tmp_path, task, file="dev")
    splits = read_glue(tmp_path, task)
    assert set(splits) == {"train", "validation"}
    assert splits["train"][1] == {**EXPECTED[task], "idx": 1}
    assert list(getattr(splits["train"].features["label"], "names", ())) == list(GLUE_TASKS[task].labels)


def test_lines_end_at_newlines_only_and_quotes_are_letters(tmp_path):
    sentence = 'a "quote, a\x85 next line\u2028and \x1c more'
    write(tmp_path, "cola", row=["x", "1", "", sentence])
    assert read_glue(tmp_path, "cola")["train"][0]["sentence"] == sentence


def test_test_files_have_no_labels(tmp_path):
    write(tmp_path, "cola", file="dev")
    write(tmp_path, "cola", file="test", header=["index", "sentence"], row=["5", "Who knows."])
    row = read_glue(tmp_path, "cola")["test"][0]
    assert row == {"sentence": "Who knows.", "label": -1, "idx": 0}


def test_both_halves_of_mnli(tmp_path):
    for file in ("dev_matched", "dev_mismatched"):
        write(tmp_path, "mnli", file=file)
    assert set(read_glue(tmp_path, "mnli")) == {"validation_matched", "validation_mismatched"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"header": ["text", "label"]}, r"train.tsv must have the columns \['sentence', 'label'\]. Got \['text'"),
        ({"row": ["no tab here"]}, "at least 2 fields between tabs. Got 1 in line 2"),
        ({"row": ["fine", "great"]}, "train.tsv must be among negative, positive. Got 'great' in line 2"),
        ({"row": ["fine", ""]}, "train.tsv must be among negative, positive. Got '' in line 2"),
        ({"rows": 0}, "at least one row. Got .*train.tsv"),
    ],
)
def test_damaged_files(tmp_path, changes, error):
    write(tmp_path, "sst2", **changes)
    with pytest.raises(ValueError, match=error):
        read_glue(tmp_path, "sst2")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.tsv and dev.tsv in .*CoLA. Got none"):
        read_glue(tmp_path, "cola")


def test_metrics_by_hand() -> None:
    # Three true positives, one false positive, one false negative, one true negative.
    found, truth = [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]
    assert glue_metrics("mrpc", found, truth) == pytest.approx({"accuracy": 4 / 6, "f1": 6 / 8})
    # (3 * 1 - 1 * 1) over the root of 4 * 4 * 2 * 2
    assert glue_metrics("cola", found, truth) == pytest.approx({"matthews_correlation": 2 / 8})
    assert glue_metrics("mnli", [0, 1, 2, 2], [0, 1, 2, 1]) == {"accuracy": 0.75}
    # Deviations -1, 0, 1 and -2, -1, 3: a product of 5 over the root of 2 * 14. The ranks are the same.
    scores = glue_metrics("stsb", [1.0, 2.0, 3.0], [2.0, 3.0, 7.0])
    assert scores == pytest.approx({"pearson": 5 / 28**0.5, "spearmanr": 1.0})
