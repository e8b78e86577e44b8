"""The demo with toy models, its runs in this process: what it trains, what it keeps, and what it says at the end."""

import importlib
import json
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import EXAMPLES, run_script

from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.nn.linear import sparse_layers


TOY = (
    "--preset tiny --config_overrides hidden_size=32,intermediate_size=64 --block_size 8 --sparsity 0.5"
    " --vocab_size 300 --max_seq_length 32 --max_steps 12 --num_topology_updates 3 --per_device_train_batch_size 4"
    " --num_threads 1 --logging_steps 1 --save_strategy no --max_eval_samples 8 --disable_tqdm true --report_to none"
    " --kernel_tuning off"
)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, whose runs are started in this process; `started` holds their flags."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module: Any = importlib.import_module("demo")
    module.started = []

    def start(flags: list[str]) -> None:
        module.started.append(flags)
        run_script(EXAMPLES / "run_mlm_dynsparse.py", shlex.join(flags))

    monkeypatch.setattr(module, "start", start)
    yield module
    for name in ("demo", "run_mlm_dynsparse"):
        sys.modules.pop(name)


@pytest.fixture
def toy(tmp_path: Path) -> str:
    """Flags of a demo that takes seconds."""
    draw = random.Random(0)
    words = ["index", "value", "file", "array", "details", "object", "returns", "error", "number", "axis"]
    lines = [" ".join(draw.choice(words) for _ in range(20)) for _ in range(120)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    return f"{TOY} --train_file {tmp_path / 'train.txt'} --cache_dir {tmp_path / 'cache'}"


def run(demo: Any, folder: Path, flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", shlex.split(f"demo.py --output_dir {folder} {flags}"))
        demo.main()


def test_the_demo(demo: Any, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    run(demo, output, toy)
    printed = capsys.readouterr().out
    files = {name: output / name / "summary.json" for name in ("sparse", "dense_trial", "dense")}
    runs = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert [run["sparsity"] for run in runs.values()] == [0.5, 0, 0]
    assert runs["dense_trial"]["steps"] == 10
    a_step = runs["dense_trial"]["seconds"] / 10
    assert runs["dense"]["steps"] == max(1, round(runs["sparse"]["seconds"] / a_step))
    assert not sparse_layers(load_model(output / "dense"))

    report = (output / "demo.md").read_text()
    for file in ("loss.png", "topology.gif", "sparse/block_map.png"):
        assert f"]({file})" in report
        assert (output / file).stat().st_size > 5000
    for shown in (printed, report):
        assert f"{runs['sparse']['eval_loss']:.3f}" in shown
        assert f"{runs['dense']['perplexity']:,.1f}" in shown
        assert f"{runs['sparse']['encoder_bytes'] / 1e6:.2f}" in shown
        assert "newborn share" in shown
        assert all(sentence in shown for sentence in demo.SENTENCES)
        assert "context gain" not in shown or runs["sparse"]["context_gain"]

    # Again: nothing is trained twice, and what is missing is.
    before = (output / "demo.md").read_bytes()
    kept = files["dense"].rename(tmp_path / "kept.json")
    demo.start = lambda flags: demo.started.append(flags) or kept.rename(files["dense"])
    run(demo, output, toy)
    assert len(demo.started) == 4
    assert demo.started[2] == demo.started[3]
    assert demo.started[3][-2:] == [f"--output_dir={output / 'dense'}", "--resume_from_checkpoint=last"]
    assert (output / "demo.md").read_bytes() == before


BAD = {
    "sparsity": ("--sparsity 1.0", "1.0"),
    "unknown flag": ("--sparsness 0.5", "--sparsness"),
    "other flags": ("--seed 5", "begun with: --seed=4"),
    "push": ("--push_to_hub", "push one: hf-dynsparse push"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_one_line(demo: Any, tmp_path: Path, case: str) -> None:
    flags, wanted = BAD[case]
    output = tmp_path / "out"
    if case == "other flags":
        output.mkdir()
        (output / "demo.json").write_text('{"flags": ["--seed=4"]}')
    with pytest.raises(SystemExit) as ended:
        run(demo, output, flags)
    assert str(ended.value.code).startswith("demo.py: error: ")
    assert wanted in str(ended.value.code)
    assert demo.started == []
    assert output.exists() == (case == "other flags")


def test_the_dense_model_alone(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the steps of the sparse one; what is given comes last, and wins."""
    monkeypatch.setattr(demo, "train", lambda folder, flags: demo.started.append([folder.name, *flags]))
    run(demo, tmp_path / "out", "--seed 1 --dense_baseline")
    assert demo.started == [["dense_baseline", *demo.FLAGS, "--seed", "1", "--dense_baseline"]]
