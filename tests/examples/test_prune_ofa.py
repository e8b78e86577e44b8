"""Prune Once for All from one plan: what is read, refused, run and skipped, the report, and two small real studies."""

import gzip
import json
import random
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, run_script
from study.jobs import Job, logged_command, run_jobs
from study.prune_ofa import StageRun, plan_prune_ofa, read_prune_ofa_plan
from study.prune_ofa_report import (
    collect_results,
    format_results,
    format_smallest,
    plot_results,
    score_of,
    topology_checksum,
)
from toy import WORDS, toy_config, toy_model, toy_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_dynsparse import DynSparseBertForSequenceClassification, sparse_layers
from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.reports.facts import checkpoint_bytes


SCRIPT = EXAMPLES / "run_prune_ofa.py"
PLAN = """
defaults: {seed: 1}
teacher: {preset: tiny}
prune: {max_steps: 100}
task_teacher:
transfer: {num_train_epochs: 2}
quantize: {learning_rate: 1.0e-5}
tasks: {mrpc: {max_seq_length: 96, transfer: {num_train_epochs: 5}}, squad: }
variants: [{sparsity: 0.9, block_size: [1x4]}]
"""
DATA = {"text": {"train_file": "a.txt"}, "glue": {"glue_dir": "glue"}, "squad": {"dataset_name": "rajpurkar/squad"}}
S9 = "sparsity=0.9_block_size=1x4"


@pytest.fixture
def run_study(monkeypatch, tmp_path) -> Callable[[str, str], None]:
    """Run the script with a plan; it writes to `out`."""

    def run(plan: str, flags: str = "") -> None:
        file = tmp_path / "plan.yaml"
        file.write_text(plan)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        run_script(SCRIPT, f"--plan {file} --output_dir {tmp_path / 'out'} --threads 1 {flags}")

    return run


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return read_prune_ofa_plan(file)


# The plan


def test_every_run_has_the_flags_of_the_method_the_plan_and_what_it_builds_on(tmp_path):
    runs = {run.name: run for run in plan_prune_ofa(read(tmp_path, PLAN), Path("out"), DATA)}
    assert list(runs) == [
        "teacher",
        f"{S9}/prune",
        *("task_teacher/mrpc", "task_teacher/squad"),
        *(f"{S9}/transfer/mrpc", f"{S9}/transfer/squad"),
        *(f"{S9}/quantize/mrpc", f"{S9}/quantize/squad"),
    ]
    arguments = {name: run.arguments(Path("out")) for name, run in runs.items()}
    assert arguments["teacher"] == [
        *("--dense_baseline=True", "--seed=1", "--preset=tiny", "--train_file=a.txt"),
        "--output_dir=out/teacher",
    ]
    assert arguments[f"{S9}/prune"] == [
        *("--method=prune_ofa", "--learning_rate_rewinding=True", "--distillation_weight=0.5"),
        *("--distillation_temperature=2.0", "--distillation_positions=all", "--seed=1", "--max_steps=100"),
        *("--model_name_or_path=out/teacher", "--teacher=out/teacher", "--sparsity=0.9", "--block_size=1x4"),
        *("--train_file=a.txt", f"--output_dir=out/{S9}/prune"),
    ]
    assert arguments["task_teacher/mrpc"] == [
        *("--finetune_mode=dense", "--seed=1", "--max_seq_length=96", "--model_name_or_path=out/teacher"),
        *("--task_name=mrpc", "--glue_dir=glue", "--output_dir=out/task_teacher/mrpc"),
    ]
    assert arguments[f"{S9}/transfer/mrpc"] == [
        *("--finetune_mode=locked", "--distillation_weight=1.0", "--distillation_temperature=2.0", "--seed=1"),
        *("--num_train_epochs=5", "--max_seq_length=96", f"--model_name_or_path=out/{S9}/prune"),
        *("--teacher=out/task_teacher/mrpc", "--task_name=mrpc", "--glue_dir=glue"),
        f"--output_dir=out/{S9}/transfer/mrpc",
    ]
    assert arguments[f"{S9}/quantize/squad"] == [
        *("--finetune_mode=locked", "--quantization_aware=True", "--distillation_weight=1.0"),
        *("--distillation_temperature=2.0", "--seed=1", "--learning_rate=1e-05"),
        *(f"--model_name_or_path=out/{S9}/transfer/squad", "--teacher=out/task_teacher/squad"),
        *("--dataset_name=rajpurkar/squad", f"--output_dir=out/{S9}/quantize/squad"),
    ]
    assert {run.script for run in runs.values() if run.task == "squad"} == {"run_qa_dynsparse"}
    assert runs[f"{S9}/transfer/mrpc"].needs == (f"{S9}/prune", "task_teacher/mrpc")
    assert runs[f"{S9}/quantize/mrpc"].needs == (f"{S9}/transfer/mrpc", "task_teacher/mrpc")


def test_without_pre_training_the_dense_model_is_pruned_on_each_task(tmp_path):
    plan = "{model_name_or_path: some/encoder, task_teacher: , gradual: {distillation_weight: null}, transfer: ,"
    plan += " tasks: [sst2], variants: [{sparsity: [0.85, 0.9]}]}"
    runs = {run.name: run for run in plan_prune_ofa(read(tmp_path, plan), Path("out"), DATA)}
    assert len(runs) == 5
    gradual = runs["sparsity=0.9/gradual/sst2"]
    assert gradual.needs == ("task_teacher/sst2",)
    assert gradual.arguments(Path("out")) == [
        *("--finetune_mode=gradual", "--learning_rate_rewinding=True", "--distillation_temperature=2.0"),
        *("--model_name_or_path=some/encoder", "--teacher=out/task_teacher/sst2", "--sparsity=0.9"),
        *("--task_name=sst2", "--glue_dir=glue", "--output_dir=out/sparsity=0.9/gradual/sst2"),
    ]
    transfer = runs["sparsity=0.85/transfer/sst2"]
    assert transfer.flags["model_name_or_path"] == "out/sparsity=0.85/gradual/sst2"
    assert "sparsity" not in transfer.flags


TASK = "task_teacher: {}, transfer: {}"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("tasks: [", "must be YAML"),
        ("[teacher]", "must be a table of stages"),
        ("{teecher: {}}", "may hold .*teacher, .*Got `teecher`"),
        ("{teacher: 5}", "`teacher` of the plan must be a table. Got 5"),
        ("{tasks: sst2}", "`tasks` of the plan must be a list or a table"),
        ("{prune: {}}", "must begin with a dense model: a stage `teacher`, or `model_name_or_path`"),
        ("{teacher: {}}", "must prune once.*Got neither"),
        (f"{{teacher: {{}}, prune: {{}}, gradual: {{}}, {TASK}}}", "must prune once.*Got prune and gradual"),
        ("{teacher: {}, prune: {}, quantize: {}}", "`quantize` needs stage `transfer`"),
        ("{teacher: {}, prune: {}, transfer: {}}", "`transfer` needs stage `task_teacher`"),
        ("{teacher: {}, prune: {}, tasks: [sst2]}", "`prune` needs stage `task_teacher`"),
        (f"{{teacher: {{}}, prune: {{}}, {TASK}}}", "`task_teacher` needs `tasks`"),
        (f"{{teacher: {{}}, prune: {{}}, {TASK}, tasks: [imdb]}}", "A task must be one of .*squad. Got 'imdb'"),
        (f"{{teacher: {{}}, prune: {{}}, {TASK}, tasks: {{sst2: 3}}}}", "flags of a task must be a table"),
        ("{teacher: {}, prune: {}, variants: [0.9]}", "A variant must be a table with a sparsity.*Got 0.9"),
        ("{teacher: {}, prune: {max_stepz: 5}}", "prune: .*max_stepz"),
        ("{teacher: {preset: huge}, prune: {}}", "teacher: `--preset` must be one of tiny"),
        ("{teacher: {}, prune: {method: magic}}", "prune: .*'magic'"),
        ("{teacher: {}, prune: {}, variants: [{sparsity: 1.5}]}", "prune: .*must lie in.*Got 1.5"),
        ("{teacher: {}, prune: {}, variants: [{sparsity: 0.9, block_size: 4xx}]}", "prune: .*Got '4xx'"),
        ("{teacher: {}, prune: {density_end: 1.0}}", "prune: .*a window from 0 to 500"),
        ("{teacher: {}, prune: {distillation_weight: 2}}", "`distillation_weight` must lie in"),
        (
            f"{{teacher: {{}}, prune: {{}}, {TASK}, tasks: {{qqp: {{num_threads: x}}}}}}",
            "task_teacher/qqp: .*'x'",
        ),
    ],
)
def test_a_wrong_plan_is_refused_before_any_work(run_study, tmp_path, plan, message):
    with pytest.raises(SystemExit, match=message):
        run_study(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stage gradual", "--stage must be of the plan. Got gradual"),
        ("--task sst2", "--task must be of the plan. Got sst2"),
        ("--stage transfer", f"{S9}/transfer/mrpc builds on {S9}/prune, which is not finished"),
        ("--stage quantize --task squad", "transfer/squad, which is not finished in .*Run that stage too, or first"),
        ("--task_train_file a.csv", "needs --task_train_file and --task_validation_file. Got --task_train_file only"),
        ("--task_train_file a.csv --task_validation_file a.csv", "task_teacher/own: .*must be an existing file"),
        ("--task_train_file {data}/a.csv --task_validation_file {data}/a.csv", "own: .*must have a column `label`"),
        ("--block_size 4", "--block_size is that of a --sparsity. Got it alone"),
        ("--calibration_samples 0", "--calibration_samples must be at least 1. Got 0"),
        ("--model_name_or_path {data}/sparse", "must be dense. Got .*sparse"),
        ("--train_file nowhere.txt", "teacher: `--train_file` must be an existing file"),
        ("--train_file {data}/latin1.txt", "teacher: .*latin1.txt: byte 0xe9 in line 1, which is not UTF-8"),
        ("--glue_dir nowhere", "task_teacher/mrpc: `mrpc` must have files such as train.tsv"),
        ("--glue_dir {data}", "task_teacher/mrpc: Labels of .*train.tsv must be among .* Got 'maybe' in line 2"),
        (
            "--glue_dir {data}/ok --squad_train_file {data}/a.json --squad_validation_file {data}/a.json",
            "squad: .*JSON",
        ),
    ],
)
def test_wrong_flags_are_refused_before_any_work(run_study, tmp_path, capsys, flags, message):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.json").write_text('[{"id"')
    (tmp_path / "a.csv").write_text("text\nOne.\n")
    toy_config().save_pretrained(tmp_path / "sparse")
    for folder, label in (("MRPC", "maybe"), ("ok/MRPC", "1")):
        (tmp_path / folder).mkdir(parents=True)
        for file in ("train", "dev"):
            (tmp_path / folder / f"{file}.tsv").write_text(
                f"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{label}\t1\t2\tOne.\tTwo.\n"
            )
    with pytest.raises(SystemExit) as error:
        run_study(PLAN, flags.format(data=tmp_path))
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_the_plans_that_come_with_the_package_are_right(run_study, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in ("mrpc", "stsb"):  # what a plan tells to make first
        with gzip.open(f"{task}_pairs.tsv.gz", "wt") as file:
            file.write("sentence1\tsentence2\nOne.\tTwo.\n")
    for plan in sorted((EXAMPLES / "prune_ofa").glob("*.yaml")):
        assert not re.search(r"[:\s]/\w", plan.read_text())  # no absolute path
        own = f"{own_files(data)} --model_name_or_path {data / 'encoder'}" if plan.name.startswith("own") else ""
        run_study(plan.read_text(), f"--dry_run {own}")
        commands = capsys.readouterr().out.splitlines()
        assert len(set(commands)) == len(commands) > 3


def own_files(data: Path) -> str:
    return f"--task_train_file {data / 'own.csv'} --task_validation_file {data / 'own.csv'} --label_column_name stars"


@pytest.mark.parametrize("text", [True, False])
def test_a_task_of_ones_own_needs_no_plan(monkeypatch, data, tmp_path, capsys, text):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    flags = f"--model_name_or_path {data / 'encoder'} {own_files(data)} --sparsity 0.8 --calibration_samples 16"
    flags += f" --train_file {data / 'text.txt'}" if text else ""
    run_script(SCRIPT, f"{flags} --output_dir {tmp_path / 'out'} --dry_run")
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == (5 if text else 4)
    (pruning,) = (command for command in commands if "--calibration_samples=16" in command)
    assert {"--sparsity=0.8", "--block_size=1"} < set(pruning)
    assert ("--static=True" if text else "--finetune_mode=locked") in pruning
    assert not any(flag.startswith("--learning_rate_rewinding") for flag in pruning)
    assert {f"--train_file={data / 'own.csv'}", "--label_column_name=stars"} < set(commands[-1])
    assert "--quantization_aware=True" in commands[-1]


def test_what_the_plan_says_of_ones_own_task_stays(tmp_path):
    (tmp_path / "plan.yaml").write_text(f"{{teacher: , prune: , {TASK}, tasks: {{own: {{seed: 3}}, sst2: }}}}")
    plan = read_prune_ofa_plan(tmp_path / "plan.yaml", own_task={"train_file": "a.csv", "validation_file": "b.csv"})
    assert plan["tasks"] == {"own": {"seed": 3, "train_file": "a.csv", "validation_file": "b.csv"}}


# Running


def test_without_a_plan_a_model_and_a_task_are_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit):
        run_script(SCRIPT, f"--output_dir {tmp_path / 'out'} --model_name_or_path some/encoder")
    assert "Without --plan there must be a dense model and a task" in capsys.readouterr().err


def finish(folder: Path, **numbers: Any) -> None:
    """As a run leaves its folder, but for the model."""
    folder.mkdir(parents=True)
    summary = {"metrics": {}, "epochs": 1.0, "steps": 5, "seconds": 2.0, "seed": 0, "learning_rate": 1e-4}
    summary |= {"hardware": "abacus", "versions": {"torch": "2"}, "sparsity": 0.0, **numbers}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_finished_runs_are_skipped_and_others_resume(run_study, tmp_path, capsys):
    for name in ("teacher", f"{S9}/prune", "task_teacher/mrpc"):
        finish(tmp_path / "out" / name)
    (tmp_path / "out/task_teacher/mrpc/summary.json").write_text('{"metrics": ')  # interrupted
    run_study(PLAN, "--dry_run --task mrpc --stage task_teacher transfer")
    first, second = capsys.readouterr().out.splitlines()
    python, script, *flags = shlex.split(second)
    assert (python, Path(script).name) == (sys.executable, "run_glue_dynsparse.py")
    assert f"--output_dir={tmp_path / 'out' / S9 / 'transfer/mrpc'}" in flags
    assert {"--resume_from_checkpoint=last", "--num_threads=1"} <= set(flags)
    assert "task_teacher/mrpc" in first


def test_a_finished_run_with_other_flags_is_pointed_out(run_study, tmp_path, capsys):
    finish(tmp_path / "out" / "teacher")
    run_study(PLAN, "--dry_run --stage teacher prune")
    (prune,) = capsys.readouterr().out.splitlines()
    assert "/prune" in prune
    (tmp_path / "out" / S9).mkdir()
    (tmp_path / "out" / S9 / "prune.log").write_text(f"$ {prune}\ntraining\n")
    finish(tmp_path / "out" / S9 / "prune")
    run_study(PLAN, "--dry_run --threads 2 --stage prune")
    assert capsys.readouterr().err == ""
    run_study(PLAN.replace("max_steps: 100", "max_steps: 90"), "--dry_run --stage prune")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{S9}/prune is kept, but had --max_steps=100, the plan has --max_steps=90. Delete" in captured.err


def test_a_finished_run_that_builds_on_what_was_run_again_is_pointed_out(run_study, tmp_path, capsys):
    for name in ("teacher", f"{S9}/prune"):
        finish(tmp_path / "out" / name)
    run_study(PLAN, "--dry_run --stage prune")
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "out/teacher")
    run_study(PLAN, "--dry_run --stage prune")
    assert f"{S9}/prune is kept, but teacher was run again since" in capsys.readouterr().err
    finish(tmp_path / "out/teacher")
    run_study(PLAN, "--dry_run --stage prune")
    assert f"{S9}/prune is kept, but teacher was run again since" in capsys.readouterr().err


def test_what_builds_on_a_failed_run_is_not_begun(tmp_path):
    def is_finished(folder: Path) -> bool:
        return (folder / "done").exists()

    def program(name: str, text: str) -> list[str]:
        return [sys.executable, "-c", f"import pathlib; p = pathlib.Path(r'{tmp_path}', '{name}'); {text}"]

    done = "p.mkdir(); (p / 'done').touch()"
    waves = [
        [
            Job("good", program("good", done)),
            Job("bad", program("bad", "print('no luck')")),
        ],
        [
            Job("one", program("one", done), ("good",)),
            Job("two", program("two", done), ("good", "bad")),
        ],
    ]
    failed = run_jobs(waves, tmp_path, is_finished, jobs=2)
    assert failed == ["bad: no luck", "two: needs bad, which is not finished"]
    assert is_finished(tmp_path / "one")
    assert logged_command(tmp_path / "bad") == waves[0][1].command
    assert not (tmp_path / "two").exists()


def test_failures_are_listed_and_the_rest_is_reported(run_study, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match="8 of 8 runs failed(?s:.*)teacher: no output(?s:.*)prune: needs teacher"):
        run_study(PLAN)
    assert "Nothing to report" in capfd.readouterr().out


# The report


def classifier(seed: int = 0, **overrides: Any) -> Any:
    return toy_model(seed, DynSparseBertForSequenceClassification, **overrides)


@pytest.fixture
def models(tmp_path) -> tuple[list[StageRun], Path]:
    """A dense model, a sparse one, and one that has the same blocks in another order."""
    runs = []
    sparse, shuffled = classifier(), classifier()
    for layer in sparse_layers(shuffled).values():
        layer.block_index.copy_(layer.block_index.flip(0))
    made = {"task_teacher": (classifier(sparsity=0.0), 0.8), "transfer": (sparse, 0.75), "quantize": (shuffled, 0.7)}
    for stage, (model, accuracy) in made.items():
        variant = None if stage == "task_teacher" else S9
        flags = {"model_name_or_path": tmp_path / "transfer"} if stage == "quantize" else {}
        run = StageRun(stage, "run_glue_dynsparse", stage, flags, task="sst2", variant=variant)
        finish(tmp_path / stage, metrics={"accuracy": accuracy}, sparsity=0.75 if variant else 0.0)
        model.save_pretrained(tmp_path / stage)
        runs.append(run)
    return runs, tmp_path


def test_the_report_compares_scores_bytes_and_patterns(models):
    runs, output = models
    dense, pruned, quantized = collect_results(runs, output)
    assert [row["model"] for row in (dense, pruned, quantized)] == ["dense", "pruned", "pruned + int8"]
    assert [row["score"] for row in (dense, pruned, quantized)] == pytest.approx([80, 75, 70])
    assert quantized["lost"] == pytest.approx(10)
    assert pruned["encoder_bytes"] == checkpoint_bytes(output / "transfer", ".encoder.")
    assert pruned["smaller"] == dense["encoder_bytes"] / pruned["encoder_bytes"]
    assert pruned["checkpoint_smaller"] == checkpoint_bytes(output / "task_teacher") / pruned["checkpoint_bytes"]
    (last,) = format_smallest([dense, pruned, quantized], output).splitlines()
    assert last.startswith(f"{output / 'quantize'}: pruned + int8, 70.00, +10.00 lost; encoder 0.0")
    assert f"whole file {quantized['checkpoint_bytes'] / 1e6:.2f} MB (" in last
    assert dense["checksum"] is None
    assert pruned["checksum"] == quantized["checksum"]  # the order of the slots does not matter
    assert (dense["locked"], pruned["locked"], quantized["locked"]) == (None, None, True)
    table = format_results([dense, pruned, quantized])
    assert "| pruned + int8 s=0.9 B=1x4 | 70.00 | +10.00 |" in table
    assert f"{quantized['checksum']} locked" in table
    assert "seed: 0; hardware: abacus; versions: torch 2" in table
    plot_results([dense, pruned, quantized], output / "scores.png")
    assert (output / "scores.png").stat().st_size > 10_000


def test_scores():
    assert score_of("own", {"accuracy": 0.5, "loss": 2.0}) == 50
    assert score_of("own", {"mse": 0.25}) == -0.25  # more is better
    assert score_of("squad", {"f1": 80.0}) == 80


def test_a_pattern_that_moved_is_seen(models):
    runs, output = models
    changed = load_model(output / "quantize")
    layer = sparse_layers(changed)["bert.encoder.layer.1.output.dense"]
    free = set(range(layer.num_blocks)) - set(layer.block_index.tolist())
    layer.block_index[3] = min(free)
    changed.save_pretrained(output / "quantize")
    results = collect_results(runs, output)
    assert results[-1]["locked"] is False
    assert "CHANGED" in format_results(results)


def test_what_is_not_finished_is_left_out(models):
    runs, output = models
    (pruned,) = collect_results(runs[1:2], output)
    assert (pruned["lost"], pruned["smaller"]) == (None, None)
    assert "| 75.00 | - |" in format_results([pruned])


# Two small real studies


TOY = "{report_to: none, use_cpu: true, kernel_tuning: 'off', logging_steps: 5, seed: 0}"
TOY_PLANS = {
    "prune": f"""
defaults: {TOY}
teacher: {{preset: tiny, config_overrides: "hidden_size=32,intermediate_size=64", vocab_size: 200, max_seq_length: 16,
  max_steps: 4, per_device_train_batch_size: 4, max_eval_samples: 8}}
prune: {{max_seq_length: 16, max_steps: 10, per_device_train_batch_size: 4, max_eval_samples: 8,
  topology_update_every: 2}}
task_teacher: {{max_steps: 3}}
transfer: {{max_steps: 4}}
quantize: {{max_steps: 3}}
tasks: {{sst2: {{max_seq_length: 16, per_device_train_batch_size: 8}}}}
variants: [{{sparsity: 0.75, block_size: 1}}]
""",
    "gradual": f"""
defaults: {TOY}
task_teacher: {{max_steps: 3}}
gradual: {{max_steps: 10, topology_update_every: 2}}
transfer: {{max_steps: 3}}
quantize: {{max_steps: 3}}
tasks: {{own: {{max_seq_length: 16, per_device_train_batch_size: 8}}}}
variants: [{{sparsity: 0.75, block_size: 1x4}}]
""",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Text, a task, and an encoder without a head."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS[:44]) for _ in range(draw.randint(4, 9)))

    (folder / "text.txt").write_text("".join(f"{sentence()} .\n" for _ in range(200)))
    (folder / "glue/SST-2").mkdir(parents=True)
    for file, count in (("train", 24), ("dev", 12)):
        rows = "".join(f"{sentence()}\t{number % 2}\n" for number in range(count))
        (folder / "glue/SST-2" / f"{file}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (folder / "own.csv").write_text("text,stars\n" + "".join(f"{sentence()},{'ab'[i % 2]}\n" for i in range(24)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(folder / "encoder")
    toy_tokenizer().save_pretrained(folder / "encoder")
    return folder


@pytest.mark.parametrize("way", TOY_PLANS)
def test_all_stages(run_study, data, tmp_path, capsys, way):
    """The commands of a plan, run in this process, in its order; then the report."""
    start = f"--train_file {data / 'text.txt'}" if way == "prune" else f"--model_name_or_path {data / 'encoder'}"
    flags = f"{start} {'--glue_dir ' + str(data / 'glue') if way == 'prune' else own_files(data)}"
    run_study(TOY_PLANS[way], f"{flags} --dry_run")
    for command in capsys.readouterr().out.splitlines():
        _, script, *rest = shlex.split(command)
        run_script(Path(script), shlex.join(rest))
    capsys.readouterr()
    run_study(TOY_PLANS[way], flags)  # nothing is missing
    table = capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text() in table
    dense, pruned, quantized = json.loads((tmp_path / "out/results.json").read_text())
    variant = pruned["variant"]
    assert type(load_model(tmp_path / "out" / dense["folder"])) in (
        BertForSequenceClassification,
        DynSparseBertForSequenceClassification,
    )
    assert dense["sparsity"] == 0
    assert pruned["sparsity"] == quantized["sparsity"] == 0.75
    before = topology_checksum(tmp_path / "out" / variant / ("prune" if way == "prune" else "gradual/own"))
    assert before == pruned["checksum"] == quantized["checksum"]
    assert (dense["locked"], pruned["locked"], quantized["locked"]) == (None, True, True)
    assert quantized["encoder_bytes"] < 0.5 * pruned["encoder_bytes"] < dense["encoder_bytes"]
    assert (tmp_path / "out/scores.png").is_file()
    # Word embeddings are int8 by default: four bytes become one.
    words = "embeddings.word_embeddings."
    sizes = [checkpoint_bytes(tmp_path / "out" / row["folder"], words) for row in (dense, quantized)]
    assert sizes[1] == sizes[0] / 4 + 4
    assert "whole file" in table
    assert "int8" in (tmp_path / "out" / quantized["folder"] / "README.md").read_text()
