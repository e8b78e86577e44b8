"""SQuAD: its files into rows, checks of the rows, and the official scores (arXiv:1606.05250, arXiv:1806.03822)."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from .files import DataError, fingerprint_of, open_bytes, reading
from .rows import shown


SQUAD_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
COLUMNS = "id, title, context, question and answers"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def read_squad(path: str | Path) -> Iterator[dict[str, Any]]:
    """
    Read questions from JSON, plain or compressed (`.gz`), in any of these forms: the official layout
    (`data[].paragraphs[].qas[]`), a list of rows, a list of rows under `data`, or one row a line.

    Yields:
        `dict`: a row of `SQUAD_FEATURES`, as on the Hub: `id`, `title`, `context`, `question`, and `answers` with two
        lists, `text` and `answer_start` (characters into the context), empty where the file gives none.

    Raises:
        ValueError: if the file is no JSON, holds no question, or one that lacks a part.
    """
    with reading(str(path)), open_bytes(str(path)) as file:
        text = file.read().decode("utf-8-sig")
        try:
            entries = _parse(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"A file of questions must hold JSON. Got {path}: {error}. Is it cut?") from error
    empty = True
    for number, entry in enumerate(entries):
        try:
            rows = _rows(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"Every entry of {path} must have {COLUMNS}, or the official layout data[].paragraphs[].qas[]. Got "
                f"entry {number} without ({type(error).__name__}: {error}). Correct it, or leave it out."
            ) from error
        empty = empty and not rows
        yield from rows
    if empty:
        raise DataError(f"A file of questions must hold at least one. Got {path}, which holds none.")


def read_squad_file(path: str, cache_dir: str | None = None) -> Dataset:
    """
    The rows of [`read_squad`], kept in the cache until the file changes.

    Raises:
        ValueError: as there, or for parts of another type.
    """
    with reading(path):
        return Dataset.from_generator(
            read_squad,
            SQUAD_FEATURES,
            cache_dir,
            gen_kwargs={"path": path},
            fingerprint=fingerprint_of(path),
        )


def _parse(text: str) -> list[dict[str, Any]]:
    """The entries of one JSON document, or of one document a line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        # Not `splitlines`: texts may hold other line separators.
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]
    entries = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError(f"expected a list of entries, found {type(entries).__name__}")
    return entries


def _rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions of an article, or the one of a flat row."""
    if "paragraphs" not in entry:
        return [_row(entry, entry, entry)]
    return [_row(entry, passage, question) for passage in entry["paragraphs"] for question in passage["qas"]]


def _row(article: Mapping[str, Any], passage: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
    answers = question.get("answers") or []
    fields = ("text", "answer_start")
    return {
        "id": str(question["id"]),
        "title": article.get("title") or "",
        "context": _string(passage, "context"),
        "question": _string(question, "question"),
        "answers": {
            name: list(answers[name]) if isinstance(answers, Mapping) else [answer[name] for answer in answers]
            for name in fields
        },
    }


def _string(part: Mapping[str, Any], name: str) -> str:
    """A part that `datasets` would take for a string whatever it is."""
    if not isinstance(part[name], str):
        raise TypeError(f"{name} must be a string, not {shown(part[name])}")
    return part[name]


def check_squad_rows(
    rows: Iterable[Mapping[str, Any]], name: str, *, needs_answers: bool = True, may_lack_answers: bool = False
) -> None:
    """
    Refuse rows that cannot be trained on or evaluated.

    Args:
        rows (`Iterable[Mapping]`): as [`read_squad`] yields them.
        name (`str`): what to call them in an error, such as `"train"`.
        needs_answers (`bool`): if not, the questions are only to be answered, and nothing is asked of `answers`.
        may_lack_answers (`bool`): whether single questions may have no answer (SQuAD 2.0).

    Raises:
        ValueError: if there is no row, a column is missing, an id occurs twice, or an answer is missing or misplaced.
    """
    wanted = ("id", "context", "question", *(["answers"] if needs_answers else []))
    seen: set[str] = set()
    for row in rows:
        missing = [column for column in wanted if row.get(column) is None]
        if missing:
            raise DataError(
                f"The {name} rows must have the columns {COLUMNS}. Got row {len(seen)} without {', '.join(missing)}, "
                f"with {', '.join(row)}. Rename the columns, or leave the row out."
            )
        for column in ("context", "question"):
            if not isinstance(row[column], str) or (column == "context" and not row[column].strip()):
                raise DataError(
                    f"The {column} of the {name} rows must be a string, and a context hold text. Got "
                    f"{shown(row[column])} for {row['id']!r}. Correct it, or leave the row out."
                )
        if row["id"] in seen:
            raise DataError(f"The {name} rows must have different ids. Got {row['id']!r} twice. Number them anew.")
        seen.add(row["id"])
        if needs_answers:
            _check_answers(row, name, may_lack_answers)
    if not seen:
        raise DataError(f"The {name} rows must hold at least one question. Got none. Check the file, or its split.")


def _check_answers(row: Mapping[str, Any], name: str, may_lack_answers: bool) -> None:
    answers = row["answers"] if isinstance(row["answers"], Mapping) else {}
    texts, starts = (_list_of(kind, answers.get(key)) for key, kind in (("text", str), ("answer_start", int)))
    if texts is None or starts is None or len(texts) != len(starts):
        raise DataError(
            f"`answers` of the {name} rows must be two lists of one length, `text` of strings and `answer_start` of "
            f"whole numbers. Got {shown(row['answers'])} for {row['id']!r}. Correct it, or leave the row out."
        )
    if not texts and not may_lack_answers:
        raise DataError(
            f"Every question of the {name} rows must have an answer. Got none for {row['id']!r}. "
            "For questions that may have none (SQuAD 2.0) give --version_2_with_negative."
        )
    for text, start in zip(texts, starts, strict=True):
        found = row["context"][start : start + len(text)] if start >= 0 else ""
        if found != text or not text.strip():
            raise DataError(
                f"An answer of the {name} rows must stand in its context at `answer_start`, counted in characters. "
                f"Got {text!r} for {row['id']!r}, but the context has {found!r} there. Correct it, or leave it out."
            )


def _list_of(kind: type, values: Any) -> list[Any] | None:
    return values if isinstance(values, list) and all(isinstance(value, kind) for value in values) else None


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces: what SQuAD compares."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are the same when normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the normalised words; 0 if none is shared, be both empty."""
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def squad_metrics(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """
    The scores of SQuAD 1.1, as `evaluate.load("squad")` computes them: the best over the answers to each question.

    Args:
        predictions (`Sequence[Mapping]`): `id` and `prediction_text`.
        references (`Sequence[Mapping]`): `id` and `answers`, at least one in its list `text`.

    Returns:
        `dict[str, float]`: `exact_match` and `f1`, in percent.

    Raises:
        ValueError: if there is no reference, or one without a prediction.
    """
    pairs = _pair(predictions, references)
    return {"exact_match": _percent(_best(exact_match, pairs)), "f1": _percent(_best(token_f1, pairs))}


def squad_v2_metrics(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """
    The scores of SQuAD 2.0, as `evaluate.load("squad_v2")` computes them, but for the best thresholds.

    Args:
        predictions (`Sequence[Mapping]`): `id` and `prediction_text`, empty for no answer.
        references (`Sequence[Mapping]`): `id` and `answers`; where its list `text` is empty, no answer is right.

    Returns:
        `dict[str, float]`: `exact` and `f1` in percent and `total`, the number of questions; the same behind `HasAns_`
        and `NoAns_` for those with and without answers, if there are any.

    Raises:
        ValueError: if there is no reference, or one without a prediction.
    """
    pairs = _pair(predictions, references)
    answerable = [bool(answers) for _, answers in pairs]
    # An answer of articles and punctuation alone is none.
    pairs = [(text, [answer for answer in answers if normalize_answer(answer)] or [""]) for text, answers in pairs]
    exact = _best(exact_match, pairs)
    f1 = _best(lambda text, answer: max(exact_match(text, answer), token_f1(text, answer)), pairs)
    metrics: dict[str, float] = {}
    for prefix, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        chosen = [number for number, kind in enumerate(answerable) if kind in kinds]
        if chosen:
            metrics[f"{prefix}exact"] = _percent([exact[number] for number in chosen])
            metrics[f"{prefix}f1"] = _percent([f1[number] for number in chosen])
            metrics[f"{prefix}total"] = len(chosen)
    return metrics


def _pair(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """What was answered to each question, and its answers."""
    answered = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
    missing = [str(reference["id"]) for reference in references if reference["id"] not in answered]
    if missing or not references:
        raise ValueError(
            "There must be references, each with a prediction. "
            f"Got {len(references)}, {len(missing)} of them without: {', '.join(missing[:3])}."
        )
    return [(answered[reference["id"]], list(reference["answers"]["text"])) for reference in references]


def _best(score: Callable[[str, str], float], pairs: Iterable[tuple[str, list[str]]]) -> list[float]:
    return [max(score(prediction, answer) for answer in answers) for prediction, answers in pairs]


def _percent(shares: Sequence[float]) -> float:
    return 100.0 * sum(shares) / len(shares)
