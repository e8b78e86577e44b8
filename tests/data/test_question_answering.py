"""Windows and labels written out by hand, answers against a search that tries everything."""

import math
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer

from hf_dynsparse.data.question_answering import (
    longest_question,
    squad_answers,
    squad_evaluation_features,
    squad_training_features,
)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "ran", "zero", "one", "two", "three", "four", "five"]
WORDS += ["six", "seven", "##ty", "."]
CONTEXT = "zero one two three four five six seven"


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def make_batch(*answers: tuple[str, int], context: str = CONTEXT, question: str = "who ran") -> dict[str, list[Any]]:
    """One question, its answers given with their places."""
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    answers = {"text": texts, "answer_start": starts}
    return {"id": ["q"], "context": [context], "question": [question], "answers": [answers]}


def spans(features: dict[str, list[Any]]) -> list[tuple[int, int]]:
    return list(zip(features["start_positions"], features["end_positions"], strict=True))


def test_windows_and_offsets(tokenizer: BertTokenizer) -> None:
    """[CLS] who ran [SEP] and five words of the context [SEP]; the next window repeats two of them."""
    features = squad_evaluation_features(make_batch(), tokenizer, max_seq_length=10, doc_stride=2)
    assert [tokenizer.decode(ids) for ids in features["input_ids"]] == [
        "[CLS] who ran [SEP] zero one two three four [SEP]",
        "[CLS] who ran [SEP] three four five six seven [SEP]",
    ]
    outside = [[-1, -1]]
    assert features["offset_mapping"] == [
        outside * 4 + [[0, 4], [5, 8], [9, 12], [13, 18], [19, 23]] + outside,
        outside * 4 + [[13, 18], [19, 23], [24, 28], [29, 32], [33, 38]] + outside,
    ]
    assert features["example_id"] == ["q", "q"]
    assert features["token_type_ids"] == [[0] * 4 + [1] * 6] * 2
    assert features["attention_mask"] == [[1] * 10] * 2


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("zero", 0)], [(4, 4), (0, 0)]),  # the first token of the context
        ([("four", 19)], [(8, 8), (5, 5)]),  # the last one of the first window, in both
        ([("two three", 9)], [(6, 7), (0, 0)]),  # cut by the second window
        ([("four five", 19)], [(0, 0), (5, 6)]),  # cut by the first
        ([("seven", 33)], [(0, 0), (8, 8)]),  # the last token of the context
        ([("two three four five", 9)], [(0, 0), (0, 0)]),  # cut by both
        ([("wo thr", 10)], [(6, 7), (0, 0)]),  # parts of words: the whole ones
        ([(" two ", 8)], [(6, 6), (0, 0)]),  # spaces are none of it
        ([("four ", 19)], [(8, 8), (5, 5)]),  # nor are they cut off
        ([(" three", 12)], [(7, 7), (4, 4)]),
        ([("six", 29), ("zero", 0)], [(0, 0), (7, 7)]),  # the first answer counts
        ([], [(0, 0), (0, 0)]),
    ],
)
def test_labels(tokenizer: BertTokenizer, answers: list[tuple[str, int]], expected: list[tuple[int, int]]) -> None:
    batch = make_batch(*answers)
    features = squad_training_features(batch, tokenizer, max_seq_length=10, doc_stride=2)
    assert spans(features) == expected
    assert spans(squad_evaluation_features(batch, tokenizer, 10, 2)) == expected
    assert features.keys() == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}


def test_labels_of_pieces_and_accents(tokenizer: BertTokenizer) -> None:
    """Places are counted in the text as it is: capitals, an accent and a word of two pieces."""
    context = "ZÉRO Sixty."
    features = squad_training_features(make_batch(("Sixty", 5), context=context), tokenizer)
    assert tokenizer.convert_ids_to_tokens(features["input_ids"][0])[4:] == ["zero", "six", "##ty", ".", "[SEP]"]
    assert spans(features) == [(5, 6)]


def test_windows_that_cut_a_word(tokenizer: BertTokenizer) -> None:
    """Windows of five tokens, one of them shared: the second one starts, and the first one ends, within `sixty`."""
    before = make_batch(("xty", 15), context="zero one two sixty four")
    assert spans(squad_training_features(before, tokenizer, 10, 1)) == [(7, 8), (0, 0)]
    behind = make_batch(("sixt", 19), context="zero one two three sixty four")
    assert spans(squad_training_features(behind, tokenizer, 10, 1)) == [(0, 0), (4, 5)]


def test_rows_do_not_mix(tokenizer: BertTokenizer) -> None:
    first, second = make_batch(("one", 5)), make_batch(("ran", 4), context="who ran", question="one")
    batch = {name: first[name] + second[name] for name in first} | {"id": ["a", "b"]}
    features = squad_evaluation_features(batch, tokenizer, 10, 2)
    assert features["example_id"] == ["a", "a", "b"]
    assert spans(features) == [(5, 5), (0, 0), (4, 4)]


def test_without_answers_there_are_no_labels(tokenizer: BertTokenizer) -> None:
    batch = make_batch()
    del batch["answers"]
    assert not {"start_positions", "end_positions"} & squad_evaluation_features(batch, tokenizer).keys()


def test_long_question_leaves_room(tokenizer: BertTokenizer) -> None:
    """Of ten tokens three are special and two overlap: the question may have half of the other five."""
    assert longest_question(tokenizer, 10, 2) == 2
    features = squad_evaluation_features(make_batch(question="  ran who ran one"), tokenizer, 10, 2)
    assert {tokenizer.decode(ids[:4]) for ids in features["input_ids"]} == {"[CLS] ran who [SEP]"}
    seen = {tuple(place) for window in features["offset_mapping"] for place in window} - {(-1, -1)}
    assert len(seen) == 8  # every word of the context


@pytest.mark.parametrize("question", ["", "   "])
def test_empty_question_and_context(tokenizer: BertTokenizer, question: str) -> None:
    features = squad_evaluation_features(make_batch(context="", question=question), tokenizer, 10, 2)
    assert features["input_ids"] == [[2, 3, 3]]
    assert features["offset_mapping"] == [[[-1, -1]] * 3]
    answers = squad_answers([{"id": "q", "context": ""}], rows_of(features), np.zeros((1, 3)), np.zeros((1, 3)))
    assert (answers.best, answers.n_best, answers.null_odds) == ({"q": ""}, {"q": []}, {})


@pytest.mark.parametrize(("length", "stride"), [(10, 6), (10, 10), (10, 12), (10, -1), (4, 0)])
def test_windows_that_cannot_go_on(tokenizer: BertTokenizer, length: int, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"`doc_stride` must lie in .*Got {stride}\."):
        squad_training_features(make_batch(), tokenizer, length, stride)


def test_smallest_windows(tokenizer: BertTokenizer) -> None:
    features = squad_evaluation_features(make_batch(), tokenizer, max_seq_length=10, doc_stride=5)
    assert features["input_ids"][0] == [2, 5, 3, 7, 8, 9, 10, 11, 12, 3]
    assert len(features["input_ids"]) == 3


def test_slow_tokenizer_is_refused(tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertTokenizer, "is_fast", False)
    with pytest.raises(ValueError, match="`tokenizer` must be a fast one.*Got BertTokenizer"):
        squad_training_features(make_batch(), tokenizer)


ROW = {"id": "q", "context": CONTEXT}


def rows_of(features: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def one_window(starts: dict[int, float], ends: dict[int, float], tokens: int = 8) -> tuple[Any, ...]:
    """Window, start and end logits: tokens 0 to 2 are [CLS] who [SEP], then the context, then padding to 20."""
    words = CONTEXT.split()[:tokens]
    places = [(CONTEXT.index(word), CONTEXT.index(word) + len(word)) for word in words]
    feature = {"example_id": "q", "offset_mapping": [(-1, -1)] * 3 + places + [(-1, -1)]}
    logits = []
    for given in (starts, ends):
        row = np.full((1, 20), -100.0, dtype=np.float32)
        row[0, : 4 + tokens] = 0.0
        row[0, list(given)] = list(given.values())
        logits.append(row)
    return [feature], *logits


def texts(answers: Any) -> list[str]:
    return [entry["text"] for entry in answers.n_best["q"]]


def test_n_best_order_and_probabilities() -> None:
    answers = squad_answers([ROW], *one_window({4: 3.0, 6: 2.0}, {5: 4.0, 6: 1.0}), n_best_size=4)
    assert answers.best == {"q": "one two"}
    assert [entry["start_logit"] + entry["end_logit"] for entry in answers.n_best["q"]] == [7, 4, 4, 4]
    # Of equal ones the first in the text.
    assert texts(answers) == ["one two", "zero one two", "one two three", "two"]
    assert answers.n_best["q"][0] == {
        "text": "one two",
        "answer_start": 5,
        "start_logit": 3.0,
        "end_logit": 4.0,
        "probability": pytest.approx(math.exp(3) / (math.exp(3) + 3)),
    }
    assert sum(entry["probability"] for entry in answers.n_best["q"]) == pytest.approx(1)
    assert answers.null_odds == {}


def test_equal_answers_stand_as_in_the_text() -> None:
    answers = squad_answers([ROW], *one_window({}, {}), n_best_size=30)
    words = CONTEXT.split()
    spans = [" ".join(words[first : last + 1]) for first in range(8) for last in range(first, 8)]
    assert texts(answers) == spans[:30]


@pytest.mark.parametrize(("limit", "best"), [(3, "one two three"), (2, "one two"), (1, "one")])
def test_max_answer_length(limit: int, best: str) -> None:
    window = one_window({4: 5.0}, {4: 1.0, 5: 2.0, 6: 3.0})
    assert squad_answers([ROW], *window, max_answer_length=limit).best == {"q": best}
    assert all(len(text.split()) <= limit for text in texts(squad_answers([ROW], *window, max_answer_length=limit)))


def test_answers_come_from_the_context_alone() -> None:
    """[CLS], question, [SEP] and padding have by far the largest logits, and an end before its start is none."""
    window = one_window(
        dict.fromkeys((0, 1, 2, 11, 15), 50.0) | {7: 3.0}, {0: 50.0, 1: 50.0, 2: 50.0, 11: 50.0, 3: 9.0}
    )
    answers = squad_answers([ROW], *window, n_best_size=100)
    assert answers.best == {"q": "zero"}
    assert answers.n_best["q"][0]["end_logit"] == 9.0
    assert max(entry["start_logit"] for entry in answers.n_best["q"]) == 3.0
    assert len(texts(answers)) == 8 * 9 / 2  # all spans of eight words, and no other


def test_windows_of_a_question() -> None:
    """The same span of two windows counts once, by the larger sum; the order of the windows does not matter."""
    (first,), start_1, end_1 = one_window({4: 2.0}, {4: 2.0})
    (second,), start_2, end_2 = one_window({4: 3.0}, {4: 3.0, 5: 1.0})
    start, end = np.concatenate([start_1, start_2]), np.concatenate([end_1, end_2])
    answers = squad_answers([ROW], [first, second], start, end, n_best_size=2)
    assert texts(answers) == ["one", "one two"]
    assert answers.n_best["q"][0]["start_logit"] == 3.0
    assert squad_answers([ROW], [second, first], start[::-1], end[::-1], n_best_size=2) == answers


def test_no_answer() -> None:
    """By the window least sure that there is none: the answer may stand in that one."""
    (first,), start_1, end_1 = one_window({0: 3.0, 4: 2.0}, {0: 3.0, 4: 2.5})
    (second,), start_2, end_2 = one_window({0: 9.0}, {0: 9.0})
    start, end = np.concatenate([start_1, start_2]), np.concatenate([end_1, end_2])
    for threshold, best in ((1.4, ""), (1.5, "one"), (None, "one")):
        answers = squad_answers([ROW], [first, second], start, end, n_best_size=3, null_threshold=threshold)
        assert answers.best == {"q": best}
        assert answers.null_odds == ({} if threshold is None else {"q": 1.5})
    answers = squad_answers([ROW], [first, second], start, end, n_best_size=3, null_threshold=0.0)
    assert texts(answers) == ["", "one", "zero one", "one two"]
    assert answers.n_best["q"][0]["answer_start"] == -1
    assert sum(entry["probability"] for entry in answers.n_best["q"]) == pytest.approx(1)


def search(row: Any, windows: Any, start: Any, end: Any, count: int, longest: int) -> list[tuple[float, str]]:
    """Every span of every window, in plain Python."""
    best: dict[tuple[int, int], float] = {}
    for number, window in enumerate(windows):
        places = window["offset_mapping"]
        for first in range(len(places)):
            for last in range(first, min(first + longest, len(places))):
                if window["example_id"] == row["id"] and places[first][0] >= 0 and places[last][0] >= 0:
                    span = places[first][0], places[last][1]
                    total = float(start[number][first]) + float(end[number][last])
                    best[span] = max(total, best.get(span, -math.inf))
    ranked = sorted(best.items(), key=lambda item: -item[1])[:count]
    return [(total, row["context"][slice(*span)]) for span, total in ranked]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "longest"), [(1, 3), (7, 2), (500, 5)])
def test_search_is_complete(tokenizer: BertTokenizer, seed: int, count: int, longest: int) -> None:
    draw = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    contexts = [" ".join(draw.choice(WORDS[5:13], size)) for size in (1, 12, 40)]
    batch = {"id": names, "context": contexts, "question": ["who", "who ran", "ran"]}
    windows = rows_of(squad_evaluation_features(batch, tokenizer, 16, 4))
    start, end = draw.normal(size=(2, len(windows), 16)).astype(np.float32)
    rows = [{"id": name, "context": context} for name, context in zip(names, contexts, strict=True)]
    answers = squad_answers(rows, windows, start, end, n_best_size=count, max_answer_length=longest)
    for row in rows:
        expected = search(row, windows, start, end, count, longest)
        found = answers.n_best[row["id"]]
        assert [entry["text"] for entry in found] == [text for _, text in expected]
        totals = [entry["start_logit"] + entry["end_logit"] for entry in found]
        assert totals == pytest.approx([total for total, _ in expected])
        assert answers.best[row["id"]] == expected[0][1]
        for entry in found:
            assert row["context"][entry["answer_start"] :].startswith(entry["text"])


def test_logits_of_perfect_labels_give_the_answers_back(tokenizer: BertTokenizer) -> None:
    """From rows to windows to labels to logits to answers: what goes in comes out."""
    words = ("zero", "two three", "six seven", "five")
    batches = [make_batch((word, CONTEXT.index(word))) | {"id": [word]} for word in words]
    batch = {name: [part[name][0] for part in batches] for name in batches[0]}
    features = squad_evaluation_features(batch, tokenizer, 10, 3)
    start = np.array([np.eye(10)[place] * (1 + (place > 0)) for place in features["start_positions"]])
    end = np.array([np.eye(10)[place] * (1 + (place > 0)) for place in features["end_positions"]])
    rows = [{"id": word, "context": CONTEXT} for word in words]
    windows = rows_of({name: features[name] for name in ("example_id", "offset_mapping")})
    assert squad_answers(rows, windows, start, end).best == {word: word for word in words}


def test_logits_must_fit() -> None:
    windows, start, end = one_window({}, {})
    with pytest.raises(ValueError, match="Each of 1 windows must have logits. Got 0 starts and 1 ends"):
        squad_answers([ROW], windows, start[:0], end)
    for limits in ({"n_best_size": 0}, {"max_answer_length": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            squad_answers([ROW], windows, start, end, **limits)
