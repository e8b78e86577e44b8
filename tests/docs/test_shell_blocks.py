"""
The shell of README.md and docs/, run: the commands of a page one after the other, in this process and in one folder,
with toys in the place of models and data (`STAND_INS`), and flags that make a run short (`shorter`). What … stands for
is what the last command of the same script said. `NOT_OURS` says which programs are left out, `NOT_RUN` which commands
of ours, and why.
"""

import glob
import gzip
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, RobertaConfig

import hf_dynsparse_cli
from hf_dynsparse import DynSparseBertForSequenceClassification
from hf_dynsparse.data import GLUE_TASKS
from tests.data.test_glue import OFFICIAL
from tests.docs.test_blocks import SIZES
from tests.docs.test_commands import PAGES, REST, ROOT, programs, shell_blocks
from tests.scripts import run_script
from tests.toy import WORDS, toy_model, toy_tokenizer


NAMES = {str(page.relative_to(ROOT)): page for page in PAGES if any(map(str.strip, shell_blocks(page)))}
SCRIPTS = {script for script, _ in hf_dynsparse_cli.TASKS.values()}

NOT_OURS = {
    "auditwheel": "looks at a wheel that cibuildwheel has built",
    "cibuildwheel": "builds wheels in a container",
    "hf": "asks the Hub: tests/test_cli.py has the extension",
    "make": "makes an environment",
    "pip": "asks a registry",
    "tensorboard": "serves until it is stopped",
    "trackio": "serves until it is stopped",
    "unzip": "opens what pip has fetched",
}

# Parts of commands, by page; "" is in all of them. Flags and files of them all are checked in test_commands.py.
COMPUTE = "takes minutes to hours"
NOT_RUN: dict[str, dict[str, str]] = {
    "CONTRIBUTING.md": {"python -m build": "takes a minute"},
    "model_cards/README.md": {"": "needs the runs of studies"},
    "docs/checkpoints.md": {"test_checksums.py": "damages two thousand checkpoints: tests/models damages fewer"},
    "docs/command_line.md": {
        "hf-dynsparse push": "needs a Hub: tests/test_cli.py",
        "--to onnx": "takes seconds: tests/checkpoints/test_export.py",
    },
    "docs/earlybert.md": {
        "--task_name qnli": "is that of sst2 again",
        "--task_name mrpc": "is that of sst2 again",
        "--ticket random:1": "is that of random:0 again",
        "--ticket random:2": "is that of random:0 again",
    },
    "docs/hub.md": {"run_mlm_dynsparse.py": "needs a Hub: tests/hub"},
    "docs/make_it_sparse.md": {"bench_calibrated.py": COMPUTE},
    "docs/monitoring.md": {"--report_to trackio": "needs trackio"},
    **dict.fromkeys(
        (
            *("docs/performance.md", "docs/performance_tables.md", "docs/study.md", "docs/results.md"),
            *("docs/results_finetuning.md", "docs/results_flops.md", "docs/results_wikipedia.md"),
        ),
        {"": COMPUTE},
    ),
}

# Of runs, after their own flags.
SHORT = (
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_eval_samples 8 --max_seq_length 24"
    " --eval_strategy no --save_strategy no --num_threads 1 --use_cpu true --kernel_tuning off --disable_tqdm true"
    " --cache_dir cache"
)
SHORTER = {
    "bench_sentences": "--quick",
    "estimate": "--preset tiny",
    "run_earlybert": f"{SHORT} --draw_every 1 --search_fallback 3",
    "run_qa_dynsparse": f"{SHORT} --doc_stride 8",
}


def shorter(name: str, words: list[str]) -> str:
    """Flags for the end of a command line, where they go before the same ones."""
    flags = SHORTER.get(name, SHORT if name in SCRIPTS else "")
    if "--trial" in words:
        flags += " --trial 0.1 --vocab_size 64 --max_seq_length 16 --batch_size 4"
    if name in SCRIPTS:
        in_steps = "--time_budget" not in words and "examples/plans/eight_hours.yaml" not in words
        flags += " --max_steps 4" * in_steps + " --report_to none" * ("--report_to" not in words)
        flags += " --glue_dir glue_data" * ("--task_name" in words)
    if name in ("demo", "run_mlm_dynsparse") or "--mlm" in words:
        flags += " --train_file text.txt" * ("--train_file" not in words)
        flags += " --num_topology_updates 1" * ("--num_topology_updates" in words)
        if not {"--model_name_or_path", "--config_name"} & {*words}:
            flags += " --preset tiny --vocab_size 80"
    return flags


def sentences(count: int) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS[:44], k=draw.randint(3, 12))) for _ in range(count)]


def write_text(file: Path) -> None:
    with gzip.open(file, "wt") if file.suffix == ".gz" else file.open("w") as opened:
        opened.write("\n".join(sentences(200)) + "\n")


def write_table(file: Path) -> None:
    rows = [f"{line},{line},{line},{number % 2},{number % 2}" for number, line in enumerate(sentences(16))]
    file.write_text("\n".join(["text,title,body,label,stars", *rows]) + "\n")


def write_glue(folder: Path) -> None:
    """Tasks in official files."""
    for task in ("sst2", "mrpc", "stsb"):
        about, (header, row) = GLUE_TASKS[task], OFFICIAL[task]
        (folder / about.folder).mkdir(parents=True)
        for split in ("train", "dev"):
            lines = [header]
            for number, line in enumerate(sentences(12)):
                cells = dict(zip(header, row, strict=True)) | dict.fromkeys(about.columns, line)
                lines.append([*(cells | {about.label: str(number % 2)}).values()])
            (folder / about.folder / f"{split}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))


def write_questions(folder: Path) -> None:
    hf_datasets = pytest.importorskip("datasets")
    same = {
        "title": "T",
        "context": "w1 w2 w3 w4",
        "question": "w1 w5",
        "answers": {"text": ["w2"], "answer_start": [3]},
    }
    for split in ("train", "validation"):
        rows = hf_datasets.Dataset.from_list([{"id": str(number), **same} for number in range(8)])
        rows.to_parquet(folder / f"{split}.parquet")


def saved(make: Callable[[], Any]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make().save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)

    return save


def dense(cls: type, **more: Any) -> Callable[[Path], None]:
    return saved(lambda: cls(BertConfig(**SIZES, **more)))


PROCESS = subprocess.Popen

# What takes the place of a name, where no command before has written it.
STAND_INS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(("bert-base-uncased", "runs/dense", "demo-output/dense"), dense(BertForMaskedLM)),
    "sentence-transformers/all-MiniLM-L6-v2": dense(BertModel),
    "runs/sst2-dense": dense(BertForSequenceClassification),
    "runs/stsb-dense": dense(BertForSequenceClassification, num_labels=1),
    "pairs.tsv.gz": lambda file: file.write_bytes(gzip.compress(b"sentence1\tsentence2\n" + b"w1 w2\tw2 w3\n" * 8)),
    "runs/sst2-locked": saved(lambda: toy_model(cls=DynSparseBertForSequenceClassification)),
    **dict.fromkeys(("runs/base-s90-b16", "runs/medium-s90-b16", "demo-output/sparse"), saved(toy_model)),
    **dict.fromkeys(("runs/static", "runs/dynamic"), lambda run: shutil.copytree("runs/mini-s90-b16", run)),
    "my-config": RobertaConfig(**SIZES).save_pretrained,
    **{
        f"{name}.txt{end}": write_text
        for name in ("text", "my_text", "train", "valid", "sentences")
        for end in ("", ".gz")
    },
    **dict.fromkeys(("train.csv", "valid.csv", "dev.csv", "new.csv"), write_table),
    "glue_data": write_glue,
    "rajpurkar/squad": write_questions,
}


def commands(name: str, folder: Path) -> list[list[str]]:
    """Of a page: programs and their arguments."""
    return [program for block in shell_blocks(NAMES[name]) for program in programs(block, folder)]


def read(program: list[str]) -> tuple[str, Path, list[str]]:
    """The name of a script or of a command of `hf-dynsparse`, the file that runs it, and its arguments."""
    if program[0] == "hf-dynsparse":
        name = hf_dynsparse_cli.TASKS[program[2]][0] if program[1] == "train" else program[1]
        return name, ROOT / "src" / "hf_dynsparse" / "__main__.py", program[1:]
    assert program[0] in ("accelerate", "python"), f"What is {program[0]}? It must run here, or stand in NOT_OURS."
    at = next(at for at, word in enumerate(program) if word.endswith(".py"))
    return Path(program[at]).stem, Path(program[at]), program[at + 1 :]


def start(command: list[str], *args: Any, **kwargs: Any) -> Any:
    """A process, but for a script that another one starts: it runs in this one."""
    if command[0] != sys.executable or not command[1].endswith(".py"):
        return PROCESS(command, *args, **kwargs)
    run_script(Path(command[1]), shlex.join(command[2:]))
    return SimpleNamespace(poll=lambda: 0, returncode=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout to work in, without a network and a browser."""
    for optional in ("datasets", "evaluate", "matplotlib"):
        pytest.importorskip(optional)
    monkeypatch.chdir(tmp_path)
    for part in ("benchmarks", "examples", "hub_kernel", "src"):
        Path(part).symlink_to(ROOT / part)
    monkeypatch.setattr("sys.path", ["benchmarks", *sys.path])
    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("webbrowser.open", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr("hf_dynsparse.training.budget.plan_steps", lambda *_, **__: 4)
    # Half of the time: pictures, which have tests of their own, and the memory of toys.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **how: Path(file).touch())
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    return tmp_path


def make_stand_ins(words: list[str]) -> None:
    for before, word in pairwise(["", *words]):
        if word in STAND_INS and before != "--output_dir" and not Path(word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            STAND_INS[word](Path(word))


@pytest.mark.parametrize("name", [name for name in NAMES if "" not in NOT_RUN.get(name, {})])
def test_commands_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"run_glue_dynsparse": ["--model_name_or_path", "bert-base-uncased", "--task_name", "sst2"]}
    for number, program in enumerate(commands(name, folder)):
        line = shlex.join(program)
        if program[0] in NOT_OURS or any(part in line for part in NOT_RUN.get(name, {})):
            continue
        script, file, words = read(program)
        own = [found for word in words for found in sorted(glob.glob(word)) or [word] if word not in REST]
        if {*words} & {*REST}:
            elsewhere = ["--output_dir", f"runs/{number}"] * (script in SCRIPTS)  # a study goes on
            own = [*said.get(script, []), *elsewhere, *own]
        said[script] = [word for word in own if word != "--dry_run"]
        flags = f"{shlex.join(own)} {shorter(script, own)}"
        make_stand_ins(shlex.split(flags))
        if script == "run_prune_ofa" and "--dry_run" not in own:  # its runs, before it would start them
            capsys.readouterr()
            run_script(file, f"{flags} --dry_run")
            for _, run, *words in map(shlex.split, capsys.readouterr().out.splitlines()):
                run_script(Path(run), f"{shlex.join(words)} {shorter(Path(run).stem, words)}")
        status = None
        try:
            run_script(file, flags)
        except SystemExit as ended:
            status = ended.code
        assert not status, f"{line}: {status}"


def test_a_program_that_is_neither_run_nor_left_out_is_found() -> None:
    with pytest.raises(AssertionError, match="What is rm"):
        read(["rm", "-r", "runs"])


def test_every_mark_is_of_a_command(tmp_path: Path) -> None:
    pages = {name: commands(name, tmp_path) for name in NAMES}
    assert {program[0] for page in pages.values() for program in page} >= NOT_OURS.keys()
    for name, parts in NOT_RUN.items():
        lines = [shlex.join(program) for program in pages[name] if program[0] not in NOT_OURS]
        assert [part for part in parts if not any(part in line for line in lines)] == [], name
