"""Extractive question answering: questions and contexts into windows of tokens, and logits of windows into answers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


NO_ANSWER = 0  # [CLS], the first token, stands for "not in this window"


def squad_training_features(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 384,
    doc_stride: int = 128,
) -> dict[str, list[Any]]:
    """
    Rows into training examples, for `Dataset.map(batched=True)`.

    A context that is too long becomes several windows, each behind the whole question, that share `doc_stride` tokens
    with their neighbours. A window learns the place of the first answer if it holds all of it, else `[CLS]`.

    Args:
        batch (`Mapping[str, Sequence]`): columns `question`, `context` and `answers`, as [`read_squad`] yields them.
        tokenizer ([`PreTrainedTokenizerBase`]): a fast one, which knows the characters that a token stands for.
        max_seq_length (`int`): most tokens of a window, question and special tokens included.
        doc_stride (`int`): tokens of context that two neighbouring windows share.

    Returns:
        `dict[str, list]`: one entry a window, not padded: `input_ids` and the tokenizer's other inputs, and
        `start_positions`, `end_positions`: the first and the last token of the answer.

    Raises:
        ValueError: if the tokenizer is not fast, or the window too small for its overlap.
    """
    inputs, rows, offsets = _encode(batch, tokenizer, max_seq_length, doc_stride)
    return {**inputs, **_label(offsets, [batch["answers"][row] for row in rows])}


def squad_evaluation_features(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 384,
    doc_stride: int = 128,
) -> dict[str, list[Any]]:
    """
    Rows into windows to find answers in; [`squad_training_features`] explains the arguments.

    Returns:
        `dict[str, list]`: as there, with labels if there are `answers`, so that a loss can be told. And `example_id`,
        the row's `id`, and `offset_mapping`: for each token its first character in the context and the one after its
        last, `[-1, -1]` for tokens that are not of the context.

    Raises:
        ValueError: as there.
    """
    inputs, rows, offsets = _encode(batch, tokenizer, max_seq_length, doc_stride)
    labels = _label(offsets, [batch["answers"][row] for row in rows]) if "answers" in batch else {}
    return {
        **inputs,
        **labels,
        "example_id": [batch["id"][row] for row in rows],
        "offset_mapping": [window.tolist() for window in offsets],
    }


def longest_question(tokenizer: PreTrainedTokenizerBase, max_seq_length: int, doc_stride: int) -> int:
    """
    The most tokens of a question, whose rest is cut off: half of what the overlap leaves, so that each window goes on
    by as much.

    Raises:
        ValueError: if the tokenizer is not fast, or the window too small for its overlap.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "`tokenizer` must be a fast one, which knows where a token stands in the text. "
            f"Got {type(tokenizer).__name__}. Convert it, or name another."
        )
    room = max_seq_length - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= doc_stride <= room - 2:
        raise ValueError(
            f"`doc_stride` must lie in [0, {room - 2}] for a `max_seq_length` of {max_seq_length}: there are special "
            f"tokens, a question and a token to go on by. Got {doc_stride}. Give a third of the length."
        )
    return (room - doc_stride) // 2


def _encode(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, doc_stride: int
) -> tuple[dict[str, list[Any]], list[int], list[np.ndarray]]:
    """Inputs, and for each window its row in the batch and its offsets `[tokens, 2]`, -1 outside the context."""
    questions = _shorten(batch["question"], tokenizer, longest_question(tokenizer, max_seq_length, doc_stride))
    encoding = tokenizer(
        questions,
        list(batch["context"]),
        truncation="only_second",
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = encoding.pop("overflow_to_sample_mapping")
    offsets = []
    for window, places in enumerate(encoding.pop("offset_mapping")):
        is_context = np.array([part == 1 for part in encoding.sequence_ids(window)])
        offsets.append(np.where(is_context[:, None], np.array(places), -1))
    return dict(encoding), rows, offsets


def _shorten(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """The questions without spaces in front, cut after so many tokens."""
    questions = [question.lstrip() for question in questions]
    kept = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
    )["offset_mapping"]
    return [text[: places[-1][1]] if places else "" for text, places in zip(questions, kept, strict=True)]


def _label(offsets: Sequence[np.ndarray], answers: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[int]]:
    """Where each window has the first answer to its question."""
    spans = []
    for places, answer in zip(offsets, answers, strict=True):
        span = (NO_ANSWER, NO_ANSWER)
        if answer["text"]:
            text, start = answer["text"][0], answer["answer_start"][0]
            end = start + len(text.rstrip())
            span = _find_tokens(places, start + len(text) - len(text.lstrip()), end)
        spans.append(span)
    return {"start_positions": [first for first, _ in spans], "end_positions": [last for _, last in spans]}


def _find_tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters `start` to `end`; `[CLS]` if some of them lie outside the window."""
    (context,) = np.nonzero(offsets[:, 0] >= 0)
    if not len(context) or offsets[context[0], 0] > start or offsets[context[-1], 1] < end:
        return NO_ANSWER, NO_ANSWER
    (tokens,) = np.nonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (NO_ANSWER, NO_ANSWER)


@dataclass(frozen=True)
class SquadAnswers:
    """
    What a model answers, by the question's id.

    Attributes:
        best (`dict[str, str]`): the answer; empty for none.
        n_best (`dict[str, list[dict]]`): the best answers, the likeliest first: `text`, `answer_start` (its first
            character; -1 for no answer), `start_logit`, `end_logit`, and `probability`, its share among them.
        null_odds (`dict[str, float]`): by how much the logits of no answer exceed those of the best one; empty if
            there must be an answer.
    """

    best: dict[str, str] = field(default_factory=dict)
    n_best: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    null_odds: dict[str, float] = field(default_factory=dict)


def squad_answers(
    rows: Iterable[Mapping[str, Any]],
    features: Iterable[Mapping[str, Any]],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> SquadAnswers:
    """
    Turn the logits of windows into answers to questions.

    An answer is a span of context tokens in one window; the best one has the largest sum of start and end logit. Spans
    that two windows share count once, by the larger sum. The search is complete: it does not stop at the likeliest
    starts and ends.

    Args:
        rows (`Iterable[Mapping]`): the questions: `id` and `context`.
        features (`Iterable[Mapping]`): their windows as [`squad_evaluation_features`] makes them: `example_id` and
            `offset_mapping`.
        start_logits, end_logits (`np.ndarray` of shape `(windows, tokens)`): in the order of `features`; what stands
            behind the last token of a window is not looked at.
        n_best_size (`int`): most answers to keep for a question.
        max_answer_length (`int`): most tokens of an answer.
        null_threshold (`float`, *optional*): allow no answer (SQuAD 2.0): given where the sum at `[CLS]`, in the
            window where it is smallest, exceeds that of the best answer by more than this.

    Raises:
        ValueError: if logits and windows differ in number, or a limit is not positive.
    """
    if n_best_size < 1 or max_answer_length < 1:
        raise ValueError(
            f"`n_best_size` and `max_answer_length` must be positive. Got {n_best_size} and {max_answer_length}."
        )
    windows: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, feature in enumerate(features):
        windows[feature["example_id"]].append((number, np.asarray(feature["offset_mapping"])))
    count = sum(map(len, windows.values()))
    if not count == len(start_logits) == len(end_logits):
        raise ValueError(
            f"Each of {count} windows must have logits. Got {len(start_logits)} starts and {len(end_logits)} ends."
        )
    answers = SquadAnswers()
    for row in rows:
        spans: dict[tuple[int, int], dict[str, Any]] = {}
        nulls = []
        for window, offsets in windows[row["id"]]:
            start, end = (np.asarray(logits[window], dtype=np.float64) for logits in (start_logits, end_logits))
            nulls.append(_entry("", -1, start[NO_ANSWER], end[NO_ANSWER]))
            for first, last in _best_spans(offsets, start, end, n_best_size, max_answer_length):
                place = int(offsets[first, 0]), int(offsets[last, 1])
                entry = _entry(row["context"][slice(*place)], place[0], start[first], end[last])
                if entry["text"] and (place not in spans or _logit_sum(entry) > _logit_sum(spans[place])):
                    spans[place] = entry
        ranked = sorted(spans.values(), key=_logit_sum, reverse=True)[:n_best_size]
        best = ranked[0]["text"] if ranked else ""
        if null_threshold is not None and nulls:
            null = min(nulls, key=_logit_sum)
            if ranked:
                odds = answers.null_odds[row["id"]] = _logit_sum(null) - _logit_sum(ranked[0])
                best = "" if odds > null_threshold else best
            ranked = sorted([*ranked, null], key=_logit_sum, reverse=True)
        answers.best[row["id"]] = best
        answers.n_best[row["id"]] = _with_probabilities(ranked)
    return answers


def _best_spans(
    offsets: np.ndarray, start: np.ndarray, end: np.ndarray, count: int, max_length: int
) -> Iterator[tuple[int, int]]:
    """First and last token of a window's spans with the largest sums, falling; of equal ones the first in the text."""
    (context,) = np.nonzero(offsets[:, 0] >= 0)  # one stretch
    if not len(context):
        return
    beyond = np.full(max_length - 1, -np.inf)
    ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([end[context], beyond]), max_length)
    sums = (start[context][:, None] + ends).ravel()  # [first token * tokens after it]
    least = np.partition(sums, -count)[-count] if len(sums) > count else -np.inf
    (candidates,) = np.nonzero((sums >= least) & (sums > -np.inf))
    for place in candidates[np.argsort(-sums[candidates], kind="stable")][:count]:
        first, more = divmod(int(place), max_length)
        yield int(context[first]), int(context[first]) + more


def _entry(text: str, answer_start: int, start_logit: float, end_logit: float) -> dict[str, Any]:
    logits = {"start_logit": float(start_logit), "end_logit": float(end_logit)}
    return {"text": text, "answer_start": answer_start, **logits}


def _logit_sum(entry: Mapping[str, Any]) -> float:
    return entry["start_logit"] + entry["end_logit"]


def _with_probabilities(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums = np.array([_logit_sum(entry) for entry in entries])
    shares = np.exp(sums - sums.max(initial=-np.inf))
    shares /= shares.sum()
    return [{**entry, "probability": share} for entry, share in zip(entries, shares.tolist(), strict=True)]
