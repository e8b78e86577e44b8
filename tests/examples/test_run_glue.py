"""run_glue_dynsparse.py and finetune_study.py as users run them, on tiny data made here."""

import json
import math
import random
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_dynsparse import sparse_layers
from hf_dynsparse.data import GLUE_TASKS, glue_metrics, read_glue
from hf_dynsparse.training.collapse import is_constant
from tests.data.test_glue import OFFICIAL
from tests.scripts import EXAMPLES, assert_same_weights, run_script
from tests.toy import WORDS, toy_model, toy_tokenizer, without_post_processor


TOY = (
    "--max_steps 3 --per_device_train_batch_size 8 --num_threads 1 --max_seq_length 24 --save_strategy no"
    " --eval_strategy no --disable_tqdm true --kernel_tuning off --logging_steps 1 --use_cpu true --report_to none"
)


def sentence(draw):
    return " ".join(draw.choice(WORDS[:44]) for _ in range(draw.randint(3, 12)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`start`, a sparse pre-trained model; `glue`, the nine tasks in official files; files of one's own."""
    folder = tmp_path_factory.mktemp("glue")
    draw = random.Random(0)
    toy_model().save_pretrained(folder / "start")
    toy_tokenizer().save_pretrained(folder / "start")
    toy_model(sparsity=0.0).save_pretrained(folder / "dense")
    toy_tokenizer().save_pretrained(folder / "dense")
    for task, about in GLUE_TASKS.items():
        header, row = OFFICIAL[task]
        path = folder / "glue" / about.folder
        path.mkdir(parents=True)
        dev = ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)
        for file, count in (("train", 24), *((name, 12) for name in dev)):
            lines = [header] if header else []
            for number in range(count):
                label = format(5 * draw.random(), ".2f") if not about.labels else str(number % len(about.labels))
                cells = dict(enumerate(row)) if not header else dict(zip(header, row, strict=True))
                cells |= {name: sentence(draw) for name in about.columns} | {about.label: label}
                lines.append(list(cells.values()))
            (path / f"{file}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    test = "index\tsentence1\tsentence2\n" + "".join(f"{i}\t{sentence(draw)}\t{sentence(draw)}\n" for i in range(5))
    (folder / "glue" / "STS-B" / "test.tsv").write_text(test)
    (folder / "glue" / "RTE" / "test.tsv").write_text(test)
    own = [{"text": sentence(draw), "label": draw.choice(["good", "bad", "so-so"])} for _ in range(20)]
    (folder / "own.json").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "own.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in own))
    (folder / "new.csv").write_text("number,said\n1,w1 w2\n2,w3\n")
    (folder / "transfer.csv").write_text("sentence\nw1 w2\nw3\n")
    (folder / "nolabel.csv").write_text("text,label\nw1 w2,good\nw3,\n")
    toy_tokenizer(more=("w44", "w45")).save_pretrained(folder / "large")
    without_post_processor(toy_tokenizer()).save_pretrained(folder / "bare")
    return folder


@pytest.fixture
def run(data, tmp_path):
    """Run the script in this process; gives back its output folder."""

    def run_toy(flags, output="out", start="start"):
        common = f"--model_name_or_path {data / start} --cache_dir {data / 'cache'} --output_dir {tmp_path / output}"
        run_script(EXAMPLES / "run_glue_dynsparse.py", f"{TOY} {common} {flags}")
        return tmp_path / output

    return run_toy


def predictions_of(folder, rows, tokenizer, columns):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = [[row[name] for row in rows] for name in columns]
    inputs = tokenizer(*text, max_length=24, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


# Two sets of sentences to evaluate, and numbers to predict. tests/data/test_classification.py reads every task.
@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_a_task(run, data, task):
    output = run(f"--task_name {task} --glue_dir {data / 'glue'} --do_predict {task == 'stsb'}")
    results = json.loads((output / "all_results.json").read_text())
    about, rows = GLUE_TASKS[task], read_glue(data / "glue", task)
    rows = rows["validation_matched" if task == "mnli" else "validation"]
    logits = predictions_of(output, rows, toy_tokenizer(), about.sentences)
    found = logits.argmax(-1) if about.labels else logits.squeeze(-1)
    for name, score in glue_metrics(task, found, rows["label"]).items():
        assert results[f"eval_{name}"] == pytest.approx(score, rel=1e-4), name
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["task"], summary["mode"], summary["sparsity"]) == (task, "locked", 0.75)
    assert set(about.metrics) <= set(summary["metrics"])
    assert summary["collapsed"] == ("eval_collapsed" in results) == is_constant(found, rows["label"])
    assert "collapsed" not in summary["metrics"]
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "dynsparse_bert"
    if about.labels:
        assert list(config["id2label"].values()) == list(about.labels)
    card = (output / "README.md").read_text()
    assert f"GLUE {task.upper()}" in card
    assert "block-sparse" in card
    assert ("eval_mm_loss" in results) == (task == "mnli")
    if task == "stsb":
        lines = (output / "predict_results_stsb.txt").read_text().splitlines()[1:]
        assert all(np.isfinite(float(line.split("\t")[1])) for line in lines)


@pytest.mark.parametrize(("mode", "sparsity"), [("dense", 0.0), ("dynamic", 0.75)])
def test_modes(run, data, mode, sparsity):
    output = run(f"--task_name sst2 --glue_dir {data / 'glue'} --finetune_mode {mode} --max_steps 12")
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["mode"], summary["sparsity"]) == (mode, sparsity)
    assert (summary["topology_updates"] > 0) == (mode == "dynamic")
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert bool(sparse_layers(loaded)) == (mode == "dynamic")


def test_a_dense_start_with_a_teacher(run, data):
    teacher = run(f"--task_name mrpc --glue_dir {data / 'glue'}", output="teacher", start="dense")
    flags = f"--task_name mrpc --glue_dir {data / 'glue'} --sparsity 0.5 --block_size 1x4 --teacher {teacher}"
    output = run(flags, start="dense")
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["sparsity"], summary["block_shapes"], summary["teacher"]) == (0.5, [[1, 4]], "teacher")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert all(entry["dynsparse/distillation_loss"] > -1e-6 for entry in log if "loss" in entry)  # but for rounding


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_a_teacher_labels_more_text(run, data, task, tmp_path):
    """Classes and numbers: a student that learns nothing else still learns what the teacher says of the new rows."""
    teacher = run(f"--task_name {task} --glue_dir {data / 'glue'}", output="teacher", start="dense")
    draw = random.Random(1)
    rows = "".join(f"{sentence(draw)}\t{sentence(draw)}\n" for _ in range(9))
    (tmp_path / "more.tsv").write_text(f"sentence1\tsentence2\n{rows}")
    flags = (
        f"--task_name {task} --glue_dir {data / 'glue'} --teacher {teacher} --transfer_file {tmp_path / 'more.tsv'}"
    )
    output = run(f"{flags} --max_steps -1 --num_train_epochs 1")
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 5  # 24 and 9 rows in batches of 8
    assert all(math.isfinite(entry["loss"]) for entry in state["log_history"] if "loss" in entry)


@pytest.mark.parametrize(
    ("flags", "taught"), [("", True), ("--teacher none", False), ("--finetune_mode gradual", True)]
)
def test_a_model_of_the_task_is_its_own_teacher(run, data, flags, taught):
    """What is made sparse; a model of another task has nothing to say."""
    where = f"--glue_dir {data / 'glue'} --max_steps 8"
    dense = run(f"--task_name sst2 {where}", output="teacher", start="dense")
    output = run(f"--task_name sst2 {where} --sparsity 0.5 --block_size 4 {flags}", start=dense)
    summary = json.loads((output / "summary.json").read_text())
    assert summary.get("teacher") == ("teacher" if taught else None)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert all(("dynsparse/distillation_layers_loss" in entry) == taught for entry in log if "loss" in entry)


def test_a_model_of_another_task_is_no_teacher(run, data):
    where = f"--glue_dir {data / 'glue'} --ignore_mismatched_sizes true"
    dense = run(f"--task_name mnli {where}", output="teacher", start="dense")
    output = run(f"--task_name sst2 {where} --sparsity 0.5 --block_size 4", start=dense)
    assert json.loads((output / "summary.json").read_text()).get("teacher") is None


def test_a_calibrated_start(run, data, tmp_path):
    """It is nearer to the dense model than the largest blocks are, and a resumed run does not calibrate again."""
    flags = f"--task_name sst2 --glue_dir {data / 'glue'} --sparsity 0.5 --block_size 4 --learning_rate 1e-6"
    flags += " --save_strategy steps --save_steps 1 --save_total_limit 5 --max_steps 2"
    largest, fitted = (run(f"{flags} --calibration_samples {n}", f"first-{n}", "dense") for n in (0, 20))
    inputs = toy_tokenizer()(" ".join(WORDS[:20]), return_tensors="pt")
    with torch.no_grad():
        models = [AutoModel.from_pretrained(folder).eval() for folder in (data / "dense", largest, fitted)]
        wanted, *found = (model(**inputs)[0] for model in models)
    assert (found[1] - wanted).norm() < (found[0] - wanted).norm()
    assert "matter most to 20 training examples" in (fitted / "README.md").read_text()
    shutil.copytree(fitted / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    resumed = run(f"{flags} --calibration_samples 20 --resume_from_checkpoint last", "part", "dense")
    assert_same_weights(fitted, resumed)


def test_gradual(run, data):
    """A dense checkpoint is pruned while it is fine-tuned; a stop changes nothing."""
    flags = f"--task_name sst2 --glue_dir {data / 'glue'} --finetune_mode gradual --sparsity 0.75 --block_size 1x4"
    flags += " --max_steps 8 --save_strategy steps --save_steps 3"
    whole = run(f"{flags} --save_total_limit 5", output="whole", start="dense")
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["mode"], summary["sparsity"], summary["topology_updates"]) == ("gradual", 0.75, 6)
    assert "began as every block of the checkpoint" in (whole / "README.md").read_text()
    config = json.loads((whole / "config.json").read_text())
    assert (config["sparsity"], config["nnzb"], config["block_size"]) == (0.75, None, [1, 4])
    shutil.copytree(whole / "checkpoint-3", whole.parent / "part" / "checkpoint-3")
    resumed = run(f"{flags} --resume_from_checkpoint last", output="part", start="dense")
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    others = {
        "--block_size 4": "A resumed run must have the model",
        "--prune_score l2": "'l2' (checkpoint: 'l1')",
    }
    for other, message in others.items():
        with pytest.raises(SystemExit, match=re.escape(message)):
            run(f"{flags} {other} --resume_from_checkpoint last", output="part", start="dense")


def test_predictions(run, data):
    output = run(f"--task_name rte --glue_dir {data / 'glue'} --do_predict true")
    lines = (output / "predict_results_rte.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    only = run(f"--task_name rte --glue_dir {data / 'glue'} --do_train false --do_predict true", output="again")
    assert (only / "predict_results_rte.txt").exists()
    assert not (only / "model.safetensors").exists()


def test_files_of_ones_own(run, data):
    output = run(f"--train_file {data / 'own.json'} --validation_file {data / 'own.json'}")
    config = json.loads((output / "config.json").read_text())
    assert list(config["id2label"].values()) == ["bad", "good", "so-so"]
    assert 0 <= json.loads((output / "summary.json").read_text())["metrics"]["accuracy"] <= 1
    only = "--do_train false --do_eval false --do_predict true --text_column_name said"
    run(f"{only} --test_file {data / 'new.csv'}", output="new", start=output)
    lines = (output.parent / "new" / "predict_results_test.txt").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} <= {"bad", "good", "so-so"}
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--task_name sst3", "must be one of cola, mnli"),
        ("--task_name sst2 --glue_dir {data}/glue --block_size 4", "needs a `sparsity`"),
        ("--task_name sst2 --glue_dir {data}/glue --sparsity 0.5", "which is sparse or quantized already"),
        ("--task_name sst2 --glue_dir {data}/glue --block_size 4xx", "Got '4xx'"),
        ("--task_name sst2 --glue_dir {data}/glue --calibration_samples 9", "Got 9 with no --sparsity"),
        ("--sparsity 0.5 --finetune_mode gradual --calibration_samples 9", "Got 9 with --finetune_mode gradual"),
        ("--sparsity 0.5 --do_train false --calibration_samples 9", "Got 9 with --do_train false"),
        ("--task_name sst2 --glue_dir {data}/glue --finetune_mode gradual", "Got sparsity=None"),
        ("--sparsity 0.5 --finetune_mode gradual --method set", "Got 0.5 with density_schedule='constant'"),
        ("--task_name sst2 --glue_dir {data}/glue --finetune_mode locked --num_topology_updates 3", "dynamic"),
        ("--task_name sst2 --glue_dir {data}/glue --transfer_file {data}/transfer.csv", "Got no teacher"),
        ("--task_name sst2 --transfer_file {data}/own.csv --do_train false", "Got --do_train false"),
        ("--train_file {data}/own.csv", "`--do_eval` needs a `--validation_file`"),
        ("--task_name mrpc --glue_dir {data}/glue --teacher {data}/dense", "which lacks"),
        (
            "--train_file {data}/nolabel.csv --do_eval false",
            "nolabel.csv must have a `label`, one of good. Got no",
        ),
        ("--task_name sst2 --glue_dir {data}/glue --max_seq_length 40", "The model has 32: give --max_seq_length"),
        (
            "--task_name sst2 --glue_dir {data}/glue --tokenizer_name {data}/large",
            "Got 65 as the highest of",
        ),
        (
            "--task_name sst2 --glue_dir {data}/glue --tokenizer_name {data}/bare",
            "{data}/bare, which leaves out [CLS]",
        ),
    ],
)
def test_errors_come_before_any_work(run, data, tmp_path, flags, error):
    with pytest.raises(SystemExit) as stopped:
        run(flags.format(data=data))
    message = str(stopped.value)
    assert message.startswith("run_glue_dynsparse.py: error: ")
    assert error.format(data=data) in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_written_over(run, data):
    flags = f"--task_name sst2 --glue_dir {data / 'glue'}"
    run(flags)
    with pytest.raises(SystemExit, match="must not hold another run"):
        run(flags)


@pytest.mark.slow
class InThisProcess:
    """In the place of `subprocess.Popen`: a script that is run at once, without its imports."""

    pid = 0

    def __init__(self, command, **streams):
        run_script(Path(command[1]), shlex.join(command[2:]))

    def wait(self):
        """It has ended."""


def test_a_study(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("study.jobs.subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))
    script = EXAMPLES / "finetune_study.py"
    command = (
        f"{script} --output_dir {tmp_path} --glue_dir {data / 'glue'} --start own={data / 'dense'} --tasks sst2"
        f" --sparsities 0.5 --block_sizes 1x4 --teacher --picture {tmp_path / 'study.png'}"
        f" --flags '{TOY} --cache_dir {data / 'cache'}'"
    )
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    runpy.run_path(str(script), run_name="__main__")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["arm"] for result in results} == {"own", "own-s0.5-b1x4", "own-s0.5-b1x4-teacher"}
    assert {result["teacher"] for result in results} == {None, "seed-0"}
    for result in results:
        assert result["score"] == pytest.approx(100 * result["metrics"]["accuracy"])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "study.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    runpy.run_path(str(script), run_name="__main__")  # finished runs are not run again
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}


def test_a_study_from_dense_runs(data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    study = runpy.run_path(str(EXAMPLES / "finetune_study.py"))
    command = (
        f"study --output_dir {tmp_path} --start own={data / 'dense'} --tasks sst2 --sparsities 0.5 --from_dense_run"
    )
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--from_dense_run"])
    (dense,), (pruned,) = study["plan"](study["parse_arguments"]())
    run = str(tmp_path / dense.folder)
    assert (dense.arm, dense.flags) == ("own", ("--model_name_or_path", str(data / "dense")))
    flags = ("--model_name_or_path", run, "--sparsity", "0.5", "--block_size", "16", "--teacher", run)
    assert (pruned.arm, pruned.flags) == ("own-s0.5-b16-teacher", flags)
