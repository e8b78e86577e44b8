"""The question answering example as a user runs it; what it reports is computed again here, by other means."""

import gzip
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, assert_same_weights, run_script
from toy import TOY_SIZES, toy_model, without_post_processor
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForMaskedLM, ByT5Tokenizer

from hf_dynsparse import DynSparseBertForMaskedLM, sparse_layers
from hf_dynsparse.data import train_wordpiece_tokenizer


datasets = pytest.importorskip("datasets")

SCRIPT = EXAMPLES / "run_qa_dynsparse.py"
LENGTH, STRIDE, LONGEST = 32, 8, 5
TOY = (
    f"--max_seq_length {LENGTH} --doc_stride {STRIDE} --max_answer_length {LONGEST} --n_best_size 3 --max_steps 4"
    " --eval_strategy no --save_strategy steps --save_steps 2 --save_total_limit 2 --logging_steps 1 --num_threads 1"
    " --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 1e-3 --disable_tqdm true"
    " --report_to none --kernel_tuning off"
)
# As the script of `evaluate`, by other means: it must import one module a line to be loaded.
METRIC = """
import re

import datasets
import evaluate


def words(text):
    return [w for w in re.sub(r"[!-/:-@\\\\[-`{-~]", "", text.lower()).split() if w not in ("a", "an", "the")]


def f1(ours, theirs):
    shared = sum(min(ours.count(w), theirs.count(w)) for w in set(ours))
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


class Metric(evaluate.Metric):
    def _info(self):
        text, doubt = datasets.Value("string"), {"no_answer_probability": datasets.Value("float32")}
        answers = datasets.features.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        prediction = {"id": text, "prediction_text": text, **(doubt if "v2" in __file__ else {})}
        features = datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        given = {p["id"]: words(p["prediction_text"]) for p in predictions}
        pairs = [(given[r["id"]], [words(t) for t in r["answers"]["text"]] or [[]]) for r in references]
        exact = [max(float(ours == theirs) for theirs in golds) for ours, golds in pairs]
        f1s = [max(f1(ours, theirs) for theirs in golds) for ours, golds in pairs]
        if "v2" in __file__:
            f1s = [max(pair) for pair in zip(exact, f1s)]
            has = [golds != [[]] for _, golds in pairs]
            scores = {"best_exact": 100.0, "best_exact_thresh": 0.0}
            for name, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
                those = [i for i, kind in enumerate(has) if kind in kinds]
                scores[name + "exact"] = 100.0 * sum(exact[i] for i in those) / len(those)
                scores[name + "f1"] = 100.0 * sum(f1s[i] for i in those) / len(those)
                scores[name + "total"] = len(those)
            return scores
        return {"exact_match": 100.0 * sum(exact) / len(exact), "f1": 100.0 * sum(f1s) / len(f1s)}
"""


def make_articles(seed: int, count: int, unanswerable: float = 0.0) -> dict[str, Any]:
    """The official layout: contexts of one to three windows; an answer is what follows the word of the question."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 5))) for _ in range(60)]
    articles = []
    for article in range(count):
        words = [draw.choice(vocabulary) for _ in range(draw.choice((6, 20, 45)))]
        context = f"The {' '.join(words)}."
        questions = []
        for number in range(2):
            place = draw.randrange(len(words) - 3)
            start = len(" ".join(["The", *words[: place + 1]])) + 1
            texts = [" ".join(words[place + 1 : place + stop]) for stop in (2, 3)]
            answers = [{"text": text, "answer_start": start} for text in texts]
            answers = [] if draw.random() < unanswerable else answers
            questions.append(
                {"id": f"{seed}-{article}-{number}", "question": f"What? {words[place]}", "answers": answers}
            )
        articles.append({"title": f"T{article}", "paragraphs": [{"context": context, "qas": questions}]})
    return {"version": "1.1", "data": articles}


def flat(articles: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": question["id"],
            "title": article["title"],
            "context": passage["context"],
            "question": question["question"],
            "answers": {name: [answer[name] for answer in question["answers"]] for name in ("text", "answer_start")},
        }
        for article in articles["data"]
        for passage in article["paragraphs"]
        for question in passage["qas"]
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in every form, models to start from, and metric scripts."""
    folder = tmp_path_factory.mktemp("qa")
    train, valid, negative = make_articles(0, 12), make_articles(1, 8), make_articles(2, 12, unanswerable=0.5)
    for name, articles in (("train", train), ("valid", valid), ("negative", negative)):
        (folder / f"{name}.json").write_text(json.dumps(articles))
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in flat(train))
    (folder / "hub").mkdir()
    for split, articles in (("train", train), ("validation", valid)):
        datasets.Dataset.from_list(flat(articles)).to_parquet(folder / "hub" / f"{split}.parquet")
    unanswered = [{name: row[name] for name in ("id", "context", "question")} for row in flat(valid)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, unanswered)))
    (folder / "misplaced.json").write_text(
        (folder / "train.json").read_text().replace('"answer_start": ', '"answer_start": 1')
    )
    (folder / "empty.json").write_text('{"data": []}')
    (folder / "broken.json").write_text('{"data": [')
    (folder / "cut.json.gz").write_bytes(gzip.compress(random.Random(0).randbytes(99).hex().encode())[:-20])
    (folder / "latin1.json").write_bytes(b'{"id": "caf\xe9"}')
    (folder / "figures.jsonl").write_text('{"id": "1", "context": "a", "question": 7}')
    (folder / "train.csv").write_text("id,context,question,answers\n")
    datasets.Dataset.from_list([{"id": "1", "text": "no question"}]).to_parquet(folder / "columns.parquet")

    tokenizer = train_wordpiece_tokenizer([row["context"] + row["question"] for row in flat(train)], vocab_size=200)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {name: TOY_SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
        dense = BertForMaskedLM(
            BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=32, **size)
        )
    sparse = toy_model(cls=DynSparseBertForMaskedLM, vocab_size=len(tokenizer))
    for name, model in (("sparse", sparse), ("dense", dense)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    large = train_wordpiece_tokenizer([row["context"] + row["question"] for row in flat(train)], vocab_size=260)
    large.add_tokens([f"more{i}" for i in range(200)])
    large.save_pretrained(folder / "large")
    without_post_processor(tokenizer).save_pretrained(folder / "bare")
    ByT5Tokenizer().save_pretrained(folder / "slow")
    for name in ("squad", "squad_v2"):
        (folder / name).mkdir()
        (folder / name / f"{name}.py").write_text(METRIC)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Callable[..., Path]:
    """Run the script in this process: `run(output_dir, flags)`."""

    def run_toy(output: Path, flags: str = "", files: str = "--train_file {data}/train.json") -> Path:
        given = f"--model_name_or_path {data}/sparse {files} --cache_dir {data}/cache --output_dir {output} {flags}"
        if files.startswith("--train_file"):
            given += " --validation_file {data}/valid.json" if "--validation_file" not in flags else ""
        run_script(SCRIPT, f"{TOY} {given.format(data=data)}", HF_HUB_OFFLINE="1")
        return output

    return run_toy


@pytest.fixture(scope="module")
def finished(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be changed."""
    return run(tmp_path_factory.mktemp("finished") / "out")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


Window = tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]


def answer_again(folder: Path, rows: list[dict[str, Any]]) -> Iterator[list[Window]]:
    """For each question the windows: characters of its context tokens and all logits, one window at a time."""
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for row in rows:
        question = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        context = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
        room = LENGTH - 3 - len(question)
        windows = []
        for start in range(0, max(1, len(context["input_ids"]) - STRIDE), room - STRIDE):
            chunk = context["input_ids"][start : start + room]
            head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
            ids = torch.tensor([[*head, *chunk, tokenizer.sep_token_id]])
            types = torch.tensor([[0] * len(head) + [1] * (len(chunk) + 1)])
            with torch.no_grad():
                out = model(input_ids=ids, token_type_ids=types)
            windows.append((context["offset_mapping"][start : start + room], out.start_logits[0], out.end_logits[0]))
        yield windows


def totals(row: dict[str, Any], windows: list[Window]) -> dict[tuple[int, str], float]:
    """The best sum of logits of every span that may be an answer: its first character and its text."""
    best: dict[tuple[int, str], float] = {}
    for places, start, end in windows:
        head = len(start) - 1 - len(places)
        for first in range(len(places)):
            for last in range(first, min(first + LONGEST, len(places))):
                span = places[first][0], row["context"][places[first][0] : places[last][1]]
                best[span] = max(best.get(span, -math.inf), float(start[head + first] + end[head + last]))
    return best


def score(predictions: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exact match and F1, best over the answers."""

    def normal(text: str) -> list[str]:
        return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ("a", "an", "the")]

    exact, f1 = [], []
    for row in rows:
        ours, golds = normal(predictions[row["id"]]), [normal(text) for text in row["answers"]["text"]]
        shared = [sum(min(ours.count(word), gold.count(word)) for word in set(gold)) for gold in golds]
        exact.append(any(ours == gold for gold in golds))
        f1.append(max(2 * both / (len(ours) + len(gold)) for both, gold in zip(shared, golds, strict=True)))
    return {"exact_match": 100 * sum(exact) / len(rows), "f1": 100 * sum(f1) / len(rows)}


def test_answers_and_scores(finished: Path, data: Path) -> None:
    rows = flat(read(data / "valid.json"))
    predictions, n_best = read(finished / "eval_predictions.json"), read(finished / "eval_nbest_predictions.json")
    assert list(predictions) == list(n_best) == [row["id"] for row in rows]
    number_of_windows = []
    for row, windows in zip(rows, answer_again(finished, rows), strict=True):
        number_of_windows.append(len(windows))
        expected = totals(row, windows)
        found = n_best[row["id"]]
        assert found[0]["text"] == predictions[row["id"]]
        # Padding changes the last bits, so answers as good as equal may change places.
        sums = [entry["start_logit"] + entry["end_logit"] for entry in found]
        assert sums == pytest.approx(sorted(expected.values(), reverse=True)[:3], abs=1e-4)
        assert sums == pytest.approx([expected[entry["answer_start"], entry["text"]] for entry in found], abs=1e-4)
        assert sum(entry["probability"] for entry in found) == pytest.approx(1)
    assert min(number_of_windows) == 1
    assert max(number_of_windows) > 2
    expected = score(predictions, rows)
    results = read(finished / "eval_results.json")
    assert {name: results[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert 0 < expected["f1"] < 100
    assert not list(finished.glob("*null_odds*"))
    assert not list(finished.glob("predict*"))


def test_what_is_written(finished: Path) -> None:
    everything, summary = read(finished / "all_results.json"), read(finished / "summary.json")
    assert {"train_loss", "eval_loss", "eval_f1", "eval_exact_match", "epoch"} <= everything.keys()
    assert summary["metrics"] == {name: everything[f"eval_{name}"] for name in ("loss", "exact_match", "f1")}
    assert (summary["mode"], summary["sparsity"], summary["steps"], summary["task"]) == ("locked", 0.75, 4, "train")
    assert 2 < summary["metrics"]["loss"] < 5
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert "on `train.json`" in card
    assert "- dynsparse" in card
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    model, info = AutoModelForQuestionAnswering.from_pretrained(finished, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(sparse_layers(model)) == 12


def test_evaluation_alone_by_the_script_of_a_metric(
    run: Callable[..., Path], finished: Path, data: Path, tmp_path: Path
) -> None:
    """The scores of `evaluate` are ours; the loss is the mean over windows of that at the answer's ends, or [CLS]."""
    again = run(
        tmp_path / "out",
        f"--model_name_or_path {finished} --do_train false --metric_path {data}/squad --per_device_eval_batch_size 1",
    )
    results, before = read(again / "eval_results.json"), read(finished / "eval_results.json")
    for name in ("eval_exact_match", "eval_f1"):
        assert results[name] == pytest.approx(before[name])
    assert read(again / "eval_predictions.json") == read(finished / "eval_predictions.json")
    assert not (again / "model.safetensors").exists()

    rows, losses = flat(read(data / "valid.json")), []
    for row, windows in zip(rows, answer_again(finished, rows), strict=True):
        first = row["answers"]["answer_start"][0]
        last = first + len(row["answers"]["text"][0])
        for places, start, end in windows:
            head = len(start) - 1 - len(places)
            inside = places[0][0] <= first and last <= places[-1][1]
            places = [*[(-1, -1)] * head, *places]
            labels = [i for i, (a, b) in enumerate(places) if a < last and first < b] if inside else [0]
            ends = zip((start, end), (labels[0], labels[-1]), strict=True)
            losses.append(sum(float(-logits.log_softmax(0)[label]) for logits, label in ends) / 2)
    assert results["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_prediction_alone(run: Callable[..., Path], finished: Path, data: Path, tmp_path: Path) -> None:
    flags = f"--model_name_or_path {finished} --do_train false --do_eval false --do_predict --max_predict_samples 10"
    out = run(tmp_path / "out", flags, "--test_file {data}/questions.jsonl")
    expected = read(finished / "eval_predictions.json")
    assert read(out / "predict_predictions.json") == dict(list(expected.items())[:10])
    assert {path.name for path in out.iterdir()} == {"predict_predictions.json", "predict_nbest_predictions.json"}


def test_resume(run: Callable[..., Path], finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished / "checkpoint-2", again / "checkpoint-2")
    run(again, "--resume_from_checkpoint last")
    assert_same_weights(again, finished)
    assert read(again / "eval_predictions.json") == read(finished / "eval_predictions.json")
    for name in ("metrics", "steps", "flops"):
        assert read(again / "summary.json")[name] == read(finished / "summary.json")[name]


def test_no_answers(run: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Scored here and by the script of a metric, with a threshold that leaves half of the questions without answer."""
    flags = "--version_2_with_negative --validation_file {data}/negative.json"
    first = run(tmp_path / "first", flags)
    odds = read(first / "eval_null_odds.json")
    threshold = sorted(odds.values())[11]
    flags += f" --model_name_or_path {first} --do_train false --null_score_diff_threshold={threshold}"
    ours = run(tmp_path / "ours", flags)
    theirs = run(tmp_path / "theirs", f"{flags} --metric_path {data}/squad_v2")
    for folder, limit in ((first, 0.0), (ours, threshold)):
        predictions = read(folder / "eval_predictions.json")
        assert odds.keys() == predictions.keys()
        assert [text == "" for text in predictions.values()] == [odds[name] > limit for name in predictions]
    assert sum(text == "" for text in predictions.values()) == 12
    assert read(ours / "eval_null_odds.json") == odds
    assert all(
        "" in [entry["text"] for entry in found] for found in read(ours / "eval_nbest_predictions.json").values()
    )

    found, expected = read(ours / "eval_results.json"), read(theirs / "eval_results.json")
    scores = [name for name in found if re.search("exact|f1|total", name)]
    assert len(scores) == 9
    assert {name: found[name] for name in scores} == pytest.approx({name: expected[name] for name in scores})
    assert 0 < found["eval_NoAns_exact"] < 100
    assert not any("best" in name for name in expected)


# Flags, files, and what the summary must say then.
CASES = {
    "dense": (
        "--finetune_mode dense --do_predict --test_file {data}/negative.json",
        "--train_file {data}/train.jsonl.gz",
        {"mode": "dense", "sparsity": 0.0},
    ),
    "dynamic": (
        "--finetune_mode dynamic --num_topology_updates 2 --pad_to_max_length",
        "--dataset_name {data}/hub --max_train_samples 20",
        {"mode": "dynamic", "sparsity": 0.75, "topology_updates": 2, "task": "hub"},
    ),
    "sparsified, with a teacher": (
        "--model_name_or_path {data}/dense --sparsity 0.5 --block_size 8 --calibration_samples 20 --teacher {finished}"
        " --eval_strategy steps --eval_steps 2 --max_eval_samples 6 --load_best_model_at_end"
        " --metric_for_best_model f1",
        "--train_file {data}/train.json",
        {
            "sparsity": 0.5,
            "block_shapes": [[8, 8]],
            "teacher": "out",
            "pattern": "the blocks that matter most to 20 training examples",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(run: Callable[..., Path], data: Path, finished: Path, tmp_path: Path, case: str) -> None:
    flags, files, expected = CASES[case]
    out = run(tmp_path / "out", flags.format(data=data, finished=finished), files)
    summary = read(out / "summary.json")
    assert {name: summary[name] for name in expected} == expected
    predictions = read(out / "eval_predictions.json")
    rows = flat(read(data / "valid.json"))[: len(predictions)]
    assert len(rows) == (6 if "max_eval" in flags else 16)
    assert {name: summary["metrics"][name] for name in ("exact_match", "f1")} == pytest.approx(
        score(predictions, rows)
    )


# Flags that cannot work, and words that the one line must hold: the argument and what it was given.
BAD = {
    "no model": ("--model_name_or_path {data}/nothing", ("nothing",)),
    "no data": ("", ("--dataset_name", "--train_file"), ""),
    "data twice": ("--dataset_name {data}/hub", ("--dataset_name", "files")),
    "no such file": ("--train_file {data}/nothing.json", ("train_file", "nothing.json")),
    "wrong ending": ("--train_file {data}/train.csv", ("train_file", "train.csv", ".jsonl")),
    "broken file": ("--train_file {data}/broken.json", ("broken.json", "JSON")),
    "empty file": ("--train_file {data}/empty.json", ("empty.json", "none")),
    "misplaced answers": ("--train_file {data}/misplaced.json", ("answer_start", "0-0-0")),
    "no columns": ("--train_file {data}/columns.parquet", ("columns", "question", "text")),
    "no answers": ("--validation_file {data}/negative.json", ("--version_2_with_negative", "2-")),
    "no validation": ("", ("--do_eval", "--validation_file"), "--dataset_name '' --train_file {data}/train.json"),
    "no test": ("--do_predict", ("--do_predict", "--test_file")),
    "no test split": ("--do_predict", ("test", "validation"), "--dataset_name {data}/hub"),
    "nothing to do": ("--do_train false --do_eval false", ("--do_train",)),
    "long windows": ("--max_seq_length 64", ("--max_seq_length", "64", "32")),
    "overlap": ("--doc_stride 32", ("doc_stride", "32")),
    "almost overlap": ("--doc_stride 28", ("doc_stride", "28", "27")),
    "n best": ("--n_best_size 0", ("--n_best_size", "0")),
    "answer length": ("--max_answer_length 0", ("--max_answer_length", "0")),
    "slow tokenizer": ("--tokenizer_name {data}/slow", ("fast", "ByT5Tokenizer")),
    "block size alone": ("--block_size 8", ("block_size", "sparsity")),
    "sparse already": ("--sparsity 0.5", ("sparsity", "0.5")),
    "updates without the mode": ("--num_topology_updates 2", ("finetune_mode", "locked")),
    "no checkpoint": ("--resume_from_checkpoint {data}", ("resume_from_checkpoint", "{data}")),
    "another mode": (
        "--resume_from_checkpoint {finished}/checkpoint-2 --finetune_mode dense",
        ("checkpoint-2", "mode"),
    ),
    "another model": (
        "--resume_from_checkpoint {finished}/checkpoint-2 --model_name_or_path {data}/dense --sparsity 0.5",
        ("checkpoint-2", "query.values", "same sparsity"),
    ),
    "teacher without a head": ("--teacher {data}/dense", ("teacher", "qa_outputs")),
    "cut gz": ("--train_file {data}/cut.json.gz", ("cut.json.gz", "gzip that is cut")),
    "invalid UTF-8": ("--train_file {data}/latin1.json", ("latin1.json", "0xe9 in line 1", "UTF-8")),
    "numbers for text": ("--train_file {data}/figures.jsonl", ("entry 0", "question", "int 7")),
    "no post-processor": ("--tokenizer_name {data}/bare", ("bare", "[CLS]", "post-processor")),
    "another vocabulary": ("--tokenizer_name {data}/large", ("large", "vocabulary of the model")),
    "no such metric": ("--metric_path {data}/hub", ("hub",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    run: Callable[..., Path], data: Path, finished: Path, tmp_path: Path, case: str
) -> None:
    flags, wanted, *files = BAD[case]
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "out", flags.format(data=data, finished=finished), *files)
    line = exit.value.code
    assert isinstance(line, str)
    assert line.startswith("run_qa_dynsparse.py: error: ")
    assert "\n" not in line
    for word in wanted:
        assert word.format(data=data) in line, line
    assert not (tmp_path / "out").exists()


def test_output_folder_of_another_run(run: Callable[..., Path], finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit, match=r"output_dir.*--resume_from_checkpoint last"):
        run(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
