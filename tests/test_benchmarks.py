"""The benchmarks as a user runs them, on tiny models: their rows, what they refuse, and the report of the rows."""

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from toy import toy_model, toy_tokenizer

import hf_dynsparse.ops
from hf_dynsparse import DynSparseBertForSequenceClassification
from hf_dynsparse.models.bert.configuration_dynsparse_bert import PRESETS


TINY = {
    "bench_linear": "--out_in 64x32 32x64 --tokens 48 --sparsity 0.5 0.75 --block_size 4 1x4",
    "bench_step": "--preset tiny --vocab_size 300 --batch_size 2 --seq_len 16 --block_size 8",
    "bench_check": "--out_in 32x64 --tokens 1 8 --block_size 4 1x4",
    "bench_inference": "--preset tiny --vocab_size 300 --batches 1x16 2x8 --block_size 8",
}
SHARED = "--threads 1 --repeats 2 --kernel_tuning off"
EVERYWHERE = {"device", "threads", "keep_freed_memory", "dtype", "sparsity", "block_size", "backend"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a file of the benchmarks as its neighbours do; the threads are put back."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr("_timing.SHORTEST", 0.0)  # nobody reads these times
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def run(load: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a benchmark in this process, `run(name, flags)`, and read its JSON."""

    def run_benchmark(name: str, flags: str = "") -> dict[str, Any]:
        file = tmp_path / f"{name}.json"
        load(name).main(shlex.split(f"{TINY[name]} {SHARED} {flags} --json {file}"))
        return json.loads(file.read_text())

    return run_benchmark


def test_linear_compares_every_arm_with_dense(run, capsys):
    content = run("bench_linear")
    rows = content["rows"]
    assert len(rows) == 2 * 2 * 3  # shapes, sparsities, arms
    assert {row["block_size"] for row in rows} == {None, 4, "1x4"}
    assert {row["backend"] for row in rows if row["block_size"] is None} == {"masked dense"}
    for row in rows:
        assert row.keys() >= EVERYWHERE | {"out", "in", "tokens"}
        assert min(row["forward_ratio"], row["backward_ratio"], row["total_ratio"]) > 0
        lowest, highest = sorted([row["forward_ratio"], row["backward_ratio"]])
        assert 0.3 * lowest <= row["total_ratio"] <= 3 * highest
    assert content["machine"]["clock"] == "CPU time of the process"
    assert content["machine"]["versions"].keys() >= {"python", "torch", "hf_dynsparse"}
    printed = capsys.readouterr().out
    assert content["machine"]["instruction_set"] in printed
    assert "64x32" in printed


def test_linear_forward_only_in_bfloat16_by_one_backend(run):
    rows = run("bench_linear", "--dtype bfloat16 --forward_only --backend reference --tokens 1")["rows"]
    assert {row["backward_ratio"] for row in rows} == {row["total_ratio"] for row in rows} == {None}
    assert {row["backend"] for row in rows} == {"masked dense", "reference"}
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_step_tells_the_dense_twin_from_stock(run, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr("_cli.keep_freed_memory", lambda: kept.append(True) or True)
    rows = run("bench_step", "--dropout 0.1 --keep_freed_memory")["rows"]
    assert [row["kind"] for row in rows] == ["dense", "stock", "masked dense", "sparse"]
    assert all(row.keys() >= EVERYWHERE | {"preset", "batch", "seq_len", "vocab", "seconds"} for row in rows)
    assert rows[0]["ratio_dense"] == rows[1]["ratio_stock"] == 1
    assert {row["dropout"] for row in rows} == {0.1}
    assert rows[2]["flops_ratio"] == 1 > rows[3]["flops_ratio"]
    assert kept == [True]
    assert "over stock" in capsys.readouterr().out


def test_step_measures_the_memory_of_each_side(run):
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux")
    rows = run("bench_step", "--memory --dtype bfloat16")["rows"]
    assert all(2**20 < row["peak_memory_bytes"] < 2**30 for row in rows)


def test_step_at_equal_flops(run, monkeypatch):
    for large, little in {"base": "mini", "small": "tiny"}.items():
        monkeypatch.setitem(PRESETS, large, PRESETS[little])
    dense, sparse, *biased = run("bench_step", "--equal_flops --position_bias alibi")["rows"]
    assert [(row["kind"], row["position_bias"]) for row in biased] == [("dense", "alibi"), ("sparse", "alibi")]
    assert sparse["ratio_without_bias"] == 1 != biased[1]["ratio_without_bias"]
    assert (dense["preset"], sparse["preset"], sparse["dense_preset"]) == ("small", "base", "small")
    assert sparse["flops_ratio"] == sparse["flops_per_sequence"] / dense["flops_per_sequence"]
    assert sparse["tokens_per_second"] == pytest.approx(32 / sparse["seconds"])


def test_inference_stands_beside_low_precision(run):
    rows = run("bench_inference")["rows"]
    assert {(row["batch"], row["seq_len"]) for row in rows} == {(1, 16), (2, 8)}
    sides = {(row["kind"], row["dtype"]) for row in rows}
    assert sides >= {("stock", "float32"), ("stock", "bfloat16"), ("sparse", "float32"), ("sparse", "int8")}
    assert all(row.keys() >= EVERYWHERE | {"preset", "seconds", "ratio_stock"} for row in rows)
    limits = {"float32": 1e-5, "int8": 0.3}
    assert all(row["relative_error"] < limits[row["dtype"]] for row in rows if row["kind"] == "sparse")


def test_choices_of_an_idle_and_a_loaded_machine_stand_side_by_side(load, tmp_path, capsys):
    file = tmp_path / "choice.json"
    flags = "--presets --out_in 64x32 --tokens 64 --block_size 16 4 --threads 1 --json"
    load("bench_choice").main([*flags.split(), str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["block_size"], row["backward"]) for row in rows] == [(16, False), (16, True), (4, False), (4, True)]
    assert all(row["agree"] == (row["idle_backend"] == row["loaded_backend"]) for row in rows)
    assert min(row[f"{turn}_seconds"] for row in rows for turn in ("idle", "loaded")) > 0
    assert f"{sum(row['agree'] for row in rows)} of 4 choices agree" in capsys.readouterr().out


def test_the_check_of_operands_is_timed_in_turn_with_its_absence(run, load, monkeypatch):
    rows = run("bench_check")["rows"]
    assert len(rows) == 2 * 2 * 2  # block sizes, tokens, directions
    for row in rows:
        assert row["check_ratio"] == row["checked_seconds"] / row["unchecked_seconds"] > 0
        assert row["other_ratio"] is None
    sources = []

    def measure_there(args, source):
        sources.append(source)
        return [dict(row, checked_seconds=row["checked_seconds"] * len(sources)) for row in rows]

    monkeypatch.setattr(load("bench_check"), "measure_there", measure_there)
    beside = run("bench_check", "--other old --turns 3")["rows"]
    assert [source.name for source in sources] == ["src", "old"] * 3
    assert [row["other_ratio"] for row in beside] == [3 / 4] * len(rows)  # the median of 1/2, 3/4 and 5/6


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_result_is_not_timed(run, monkeypatch, tmp_path, name):
    right = hf_dynsparse.ops.block_sparse_linear
    monkeypatch.setattr("hf_dynsparse.nn.linear.block_sparse_linear", lambda *operands: 1.01 * right(*operands))
    with pytest.raises(SystemExit, match="no timing is reported for a wrong result"):
        run(name)
    assert not list(tmp_path.glob("*.json"))


def test_a_wrong_gradient_is_not_timed(run, monkeypatch):
    right = hf_dynsparse.ops.block_sparse_linear

    def forward_is_right(input, *operands):
        output = right(input, *operands)
        return 1.01 * output - 0.01 * output.detach()

    monkeypatch.setattr("hf_dynsparse.nn.linear.block_sparse_linear", forward_is_right)
    for name in ("bench_linear", "bench_step"):
        with pytest.raises(SystemExit, match="relative error"):
            run(name)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("bench_linear", "--block_size 5", "must divide"),
        ("bench_linear", "--peers --dtype bfloat16", "compares in float32"),
        ("bench_linear", "--peers", r"Could not import sparselab .* pip install torch=="),
        ("bench_step", "--block_size 5", "must divide"),
        ("bench_step", "--memory --device meta", "needs Linux and --device cpu"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_line(run, monkeypatch, name, flags, message):
    monkeypatch.setitem(sys.modules, "sparselab", None)  # not installed
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match=message):
        run(name, flags)


@pytest.mark.parametrize("flags", ["--repeats 0", "--out_in 64", "--block_size 4xx"])
def test_wrong_flags_are_explained(run, capsys, flags):
    with pytest.raises(SystemExit):
        run("bench_linear", flags)
    assert "Got" in capsys.readouterr().err


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a sparse one, one that is no classifier, and sentences for them."""
    folder = tmp_path_factory.mktemp("classifiers")
    for name, options in {
        "dense": {"sparsity": 0.0, "cls": DynSparseBertForSequenceClassification},
        "sparse": {"cls": DynSparseBertForSequenceClassification},
        "language": {},
        "larger": {"vocab_size": 80, "cls": DynSparseBertForSequenceClassification},
    }.items():
        toy_model(**options).save_pretrained(folder / name)
        toy_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("w1 w2 w3\n\nw4\nw5 w6 w7 w8 w9\n" + "w1 " * 50 + "\nw2 w3\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "glue" / "MRPC").mkdir(parents=True)
    rows = "".join(f"{number % 2}\t1\t2\tw{number} w3\tw4\n" for number in range(6))
    (folder / "glue/MRPC/dev.tsv").write_text(f"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{rows}")
    return folder


def test_sentences_compares_saved_models(load, classifiers, tmp_path, capsys):
    models = f"--models a={classifiers / 'dense'} b={classifiers / 'sparse'} c={classifiers / 'dense'}"
    source = f"--file {classifiers / 'text.txt'} --batches 1 3 --max_seq_length 16 --json {tmp_path / 'bench.json'}"
    load("bench_sentences").main(shlex.split(f"{models} {source} {SHARED}"))
    content = json.loads((tmp_path / "bench.json").read_text())
    rows = content["rows"]
    assert [(row["batch"], row["model"]) for row in rows] == [(size, name) for size in (1, 3) for name in "abc"]
    for row in rows:
        assert row.keys() >= EVERYWHERE
        assert (row["sentences"], row["tokens"]) == (5, 5 + 3 + 7 + 16 + 4)  # with [CLS] and [SEP], the longest cut
        assert row["seconds"] > 0
        assert (row["sparsity"], row["block_size"]) == ((0.75, "4x4") if row["model"] == "b" else (0.0, None))
    assert rows[0]["ratio_first"] == rows[0]["same_predictions"] == rows[2]["same_predictions"] == 1
    assert rows[1]["layer_bytes"] < 0.5 * rows[0]["layer_bytes"]
    assert content["machine"]["versions"]["torch"] in capsys.readouterr().out
    load("report").main([str(tmp_path / "bench.json"), "--output_dir", str(tmp_path / "report")])
    assert "same answers" in (tmp_path / "report/bench.md").read_text()


def test_calibrated_scores_every_method(load, tmp_path, capsys):
    toy_model(sparsity=0.0).to_dense().base_model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{n * k % 44}" for k in range(1, 20)) for n in range(9)))
    (tmp_path / "STS-B").mkdir()
    pairs = "".join(f"w{number} w3\tw{number // 2} w4\t{number / 2}\n" for number in range(6))
    (tmp_path / "STS-B" / "dev.tsv").write_text(f"sentence1\tsentence2\tscore\n{pairs}")
    flags = f"--model {tmp_path} --glue {tmp_path} --text {tmp_path / 'text.txt'} --max_seq_length 16"
    few = f"--sparsities 0.5 --block_sizes 4 --methods norm surgeon --json {tmp_path / 'bench.json'}"
    load("bench_calibrated").main(shlex.split(f"{flags} {few} --dense_statistics {SHARED}"))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "norm", "surgeon"]
    assert all(-100 <= row["score"] <= 100 for row in rows)
    assert rows[2]["seconds"] > 0
    load("report").main([str(tmp_path / "bench.json"), "--output_dir", str(tmp_path / "report")])
    assert "| surgeon" in (tmp_path / "report/bench.md").read_text()
    assert rows[1]["encoder_bytes"] < 0.6 * rows[0]["encoder_bytes"]
    assert (tmp_path / "report/bench.png").stat().st_size > 10_000


def test_sentences_are_the_same_in_every_batch(load, classifiers):
    sentences = load("bench_sentences")
    model = sentences.load_classifier(classifiers / "sparse")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(50)  # so that sentences differ
    tokenizer = toy_tokenizer()
    text = [f"w{number} w{2 * number}" + " w3" * number for number in range(12)]
    single = [tokenizer(one, return_tensors="pt") for one in text]
    padded = [tokenizer(text[start : start + 5], padding=True, return_tensors="pt") for start in (0, 5, 10)]
    with torch.no_grad():
        margins = torch.cat([model(**one).logits.diff() for one in single])
        model.classifier.bias[1] -= margins.mean()  # so that both answers occur
    found = sentences.predict(model, single)
    assert found.tolist() == sentences.predict(model, padded).tolist()
    assert len(set(found.tolist())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--models {0}/dense --file {0}/text.txt", "takes NAME=FOLDER, such as dense=runs/dense"),
        (
            "--models a={0}/language --file {0}/text.txt",
            "must be classifiers of sentences. Got DynSparseBertForMaskedLM",
        ),
        ("--models a={0}/dense b={0}/larger --file {0}/text.txt", "one vocabulary and the same labels"),
        ("--models a={0}/dense --file {0}/empty.txt", "at least one sentence. Got none"),
        ("--models a={0}/dense --task_name mrpc", "needs a `--glue_dir`"),
        ("--models a={0}/dense --task_name mrpc --glue_dir {0}/nowhere", "nowhere"),
    ],
)
def test_sentences_that_cannot_be_compared(load, classifiers, flags, message):
    with pytest.raises(SystemExit, match=message):
        load("bench_sentences").main(shlex.split(f"{flags.format(classifiers)} {SHARED}"))


def test_quick_yields_to_other_flags(load, monkeypatch):
    seen = []
    cli, linear = load("_cli"), load("bench_linear")
    monkeypatch.setattr(linear, "measure", lambda args: seen.append(args) or [])
    linear.main(["--quick", "--tokens", "8", "--threads", "1"])
    assert (seen[0].tokens, seen[0].sparsity, seen[0].out_in) == ([8], [0.9], [(768, 768), (3072, 768)])
    assert [cli.label(cli.block_size(text)) for text in ("16", "1x4")] == [16, "1x4"]


def test_arms_take_turns(load):
    timing = load("_timing")
    order = []
    now = iter(range(1000))
    clock = timing.Clock("a tick at every look", lambda: float(next(now)))
    arms = {"dense": (lambda: order.append("dense"),), "own": (lambda: order.append("own"),)}
    samples = timing.time_in_turn(arms, clock, repeats=3)
    assert order == ["dense", "own"] * (timing.WARM_UP + 3)
    assert samples == {"dense": [[1.0]] * 3, "own": [[1.0]] * 3}
    own, dense = [[1.0, 2.0], [3.0, 9.0], [2.0, 2.0]], [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    assert timing.median_ratio(own, dense) == 1.0
    assert timing.median_ratio(own, dense, 0, 1) == 1.0
    assert timing.median_seconds(own, 1) == 2.0


def test_report_writes_tables_and_a_picture(run, load, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.json" for name in TINY}
    contents = {name: run(name) for name in TINY}
    load("report").main([*map(str, files.values()), "--output_dir", str(tmp_path / "report")])
    texts = {name: (tmp_path / "report" / f"{name}.md").read_text() for name in TINY}
    for name, content in contents.items():
        assert content["command"] in texts[name]
        assert content["machine"]["instruction_set"] in texts[name]
    row = contents["bench_linear"]["rows"][1]
    assert f"**{row['total_ratio']:.3f}**" in texts["bench_linear"]
    assert "| B=4 | B=1x4 |" in texts["bench_linear"]
    assert "tiny masked dense s=0.9" in texts["bench_step"]
    assert (tmp_path / "report" / "bench_linear.png").read_bytes().startswith(b"\x89PNG")
    files["bench_step"].write_text("{}")
    with pytest.raises(SystemExit):
        load("report").main([str(files["bench_step"]), "--output_dir", str(tmp_path)])
    assert "Write it with --json" in capsys.readouterr().err
