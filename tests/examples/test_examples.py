"""The example script as a user runs it: what it writes, that it resumes, and how it refuses what cannot work."""

import gzip
import json
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from scripts import EXAMPLES, assert_same_weights, clean_environment, run_script
from toy import without_post_processor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

from hf_dynsparse import densify_, sparse_layers
from hf_dynsparse.data import train_wordpiece_tokenizer
from hf_dynsparse.models.pretraining import first_pattern
from hf_dynsparse.topology.frames import read_history
from hf_dynsparse.training.recipes import SMALL_RATES


SCRIPT = EXAMPLES / "run_mlm_dynsparse.py"
TOY = (
    "--preset tiny --config_overrides hidden_size=32,intermediate_size=64 --block_size 8 --sparsity 0.5"
    " --vocab_size 300 --max_seq_length 32 --max_steps 4 --num_topology_updates 2 --per_device_train_batch_size 4"
    " --num_threads 1 --logging_steps 1 --save_steps 2 --eval_strategy no --max_eval_samples 16 --disable_tqdm true"
    " --report_to none --kernel_tuning off --recipe paper"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small text in every format; documents of a few lines, an empty line between them."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 7))) for _ in range(120)]
    documents = [
        [" ".join(draw.choice(words) for _ in range(draw.randint(4, 30))) for _ in range(draw.randint(3, 6))]
        for _ in range(60)
    ]
    lines = [line for document in documents for line in [*document, ""]]
    (folder / "train.txt").write_text("\n".join(lines))
    with gzip.open(folder / "train.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    with open(folder / "train.json", "w") as file:
        file.writelines(json.dumps({"text": "\n".join(document)}) + "\n" for document in documents)
    hf_datasets = pytest.importorskip("datasets")
    hf_datasets.Dataset.from_dict({"text": ["\n".join(document) for document in documents]}).to_parquet(
        folder / "train.parquet"
    )
    (folder / "valid.txt").write_text("\n".join(lines[:60]))
    # Tokenizers and configurations that do not fit.
    tokenizer = train_wordpiece_tokenizer(lines, vocab_size=400)
    tokenizer.save_pretrained(folder / "large")
    for name in ("mask", "cls"):
        lacks = AutoTokenizer.from_pretrained(folder / "large")
        setattr(lacks, f"{name}_token", None)
        lacks.save_pretrained(folder / f"{name}less")
    transformers.GPT2Config().save_pretrained(folder / "stock")
    odd = without_post_processor(tokenizer, gap=990)
    odd.save_pretrained(folder / "odd")
    rows = [json.dumps({"text": f"{words[number % 120]} {words[number % 7]}"}) for number in range(9000)]
    (folder / "late.jsonl").write_text("\n".join([*rows, '{"text": 3}']))
    return folder


@pytest.fixture(scope="module")
def run(text: Path) -> Callable[..., Path]:
    """Run the script in this process: `run(output_dir, flags)`."""

    def run_toy(output: Path, flags: str = "", train_file: str | None = "train.txt", toy: str = TOY) -> Path:
        train = f"--train_file {text / train_file} --cache_dir {text / 'cache'}" if train_file else ""
        run_script(SCRIPT, f"{toy} {train} --output_dir {output} {flags}")
        return output

    return run_toy


@pytest.fixture(scope="module")
def finished(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be changed."""
    return run(tmp_path_factory.mktemp("finished") / "out")


def test_a_teacher_of_another_vocabulary(run: Callable[..., Path], finished: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = train_wordpiece_tokenizer((text / "train.txt").read_text().splitlines(), vocab_size=99)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match="must have the same `vocab_size`. Got 300 and"):
        run(tmp_path / "out", f"--teacher {finished} --tokenizer_name {tmp_path / 'tokenizer'}")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_summary(finished: Path) -> None:
    summary = summary_of(finished)
    # A model of 300 words that was trained for four steps guesses.
    assert 4.5 < summary["eval_loss"] < 6.5
    assert summary["perplexity"] == pytest.approx(torch.tensor(summary["eval_loss"]).exp().item(), rel=1e-4)
    # Four steps of four sequences, forward and backward: 3 * 2 FLOPs an active weight and token at the least.
    assert summary["flops"] > 6 * 4 * 4 * 32 * 2 * (4 * 32 * 32 + 2 * 32 * 64) * 0.5
    assert 0.5 < summary["flops"] / summary["dense_flops"] < 0.9
    assert summary["tokens_per_second"] > 1
    assert summary["sparsity"] == 0.5
    assert 0.5 < summary["coverage"] < 1
    assert summary["topology_updates"] == 2
    assert summary["checkpoint_bytes"] < summary["dense_checkpoint_bytes"]
    assert 0.5 < summary["encoder_bytes"] / summary["dense_encoder_bytes"] < 0.6
    assert summary["checkpoint_bytes"] < (finished / "model.safetensors").stat().st_size
    assert summary["versions"]["transformers"] == transformers.__version__
    assert summary["seed"] == 42


def test_pictures(finished: Path) -> None:
    for name in ("training.png", "block_map.png"):
        picture = (finished / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    frames = read_history(finished)
    assert [frame.update for frame in frames] == [0, 1, 2]
    index = load_file(finished / "model.safetensors")[f"{frames[0].layer}.block_index"]
    assert sorted(index.tolist()) == frames[-1].block_map.ravel().nonzero()[0].tolist()
    assert [file.name for file in finished.glob("*.safetensors")] == ["model.safetensors"]


def test_another_architecture_resumes(run: Callable[..., Path], tmp_path: Path) -> None:
    flags = "--model_type modernbert"
    whole = run(tmp_path / "whole", flags)
    assert summary_of(whole)["topology_updates"] == 2
    assert 0.5 < summary_of(whole)["encoder_bytes"] / summary_of(whole)["dense_encoder_bytes"] < 0.52
    assert "`ModernBertForMaskedLM`, block-sparse." in (whole / "README.md").read_text()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    heads = "--config_overrides hidden_size=32,intermediate_size=64,num_attention_heads=4"
    with pytest.raises(SystemExit, match="Got num_attention_heads = 4, but .* has 2"):
        run(tmp_path / "part", f"{flags} {heads} --resume_from_checkpoint last")
    assert_same_weights(whole, run(tmp_path / "part", f"{flags} --resume_from_checkpoint last"))
    assert len(sparse_layers(AutoModelForMaskedLM.from_pretrained(whole))) == 8


@pytest.mark.parametrize("part", [".", "checkpoint-2", "checkpoint-4"])
def test_auto_classes_load_what_was_written(finished: Path, part: str) -> None:
    model, info = AutoModelForMaskedLM.from_pretrained(finished / part, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(sparse_layers(model)) == 12
    saved = load_file(finished / part / "model.safetensors")
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.block_index, saved[f"{name}.block_index"])
        assert torch.equal(layer.values, saved[f"{name}.values"])
    batch = AutoTokenizer.from_pretrained(finished / part)("abc [MASK] def", return_tensors="pt")
    assert model.eval()(**batch).logits.isfinite().all()


def test_resume_of_a_finished_run(run: Callable[..., Path], finished: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(finished, tmp_path / "again"))
    run(again, "--resume_from_checkpoint last")
    assert_same_weights(again, finished)
    for name in ("eval_loss", "flops", "coverage", "topology_updates", "steps"):
        assert summary_of(again)[name] == summary_of(finished)[name], name


@pytest.mark.parametrize("length", ["--max_steps 4", "--time_budget 1s"])  # the checkpoint says how many steps
def test_resume_of_an_interrupted_run(run: Callable[..., Path], finished: Path, tmp_path: Path, length: str) -> None:
    again = Path(shutil.copytree(finished, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-4", "*.*")))
    shutil.copytree(finished / "checkpoint-2", again / "checkpoint-2", dirs_exist_ok=True)
    run(again, "--resume_from_checkpoint last", toy=TOY.replace("--max_steps 4", length))
    assert_same_weights(again, finished)
    assert_same_weights(again / "checkpoint-4", finished / "checkpoint-4")
    for name in ("eval_loss", "flops", "coverage", "topology_updates", "steps"):
        assert summary_of(again)[name] == summary_of(finished)[name], name


def test_resume_without_a_checkpoint_and_compressed_text(
    run: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    """Both change nothing."""
    out = run(tmp_path / "out", "--resume_from_checkpoint last", train_file="train.txt.gz")
    assert_same_weights(out, finished)


# Training file, flags, and what the summary must say then. What becomes of flags of the data is tested in tests/data.
CASES = {
    "pairs of sentences, rectangles": (
        "train.json",
        "--nsp --validation_split_percentage 20 --block_size 1x4 --distribution erk",
        {"block_size": [1, 4], "topology_updates": 2},
    ),
    "streaming, a tokenizer that adds no special tokens and has a gap in its ids": (
        "train.txt",
        "--streaming --validation_file {text}/valid.txt --eval_strategy steps --eval_steps 2"
        " --tokenizer_name {text}/odd"
        " --config_overrides hidden_size=32,intermediate_size=64,max_position_embeddings=32",
        {},
    ),
    "the recipe for small budgets, streaming": (
        "train.txt",
        "--recipe small --streaming --validation_file {text}/valid.txt",
        {"learning_rate": pytest.approx(0.2 * SMALL_RATES.sparse * (256 / 32) ** 0.5)},
    ),
    "dense, by epochs": (
        "train.parquet",
        "--dense_baseline --max_steps -1 --num_train_epochs 1 --max_train_samples 16",
        {"sparsity": 0.0, "coverage": 1.0, "topology_updates": 0},
    ),
    "static, lines, with a teacher": (
        "train.txt",
        "--static --line_by_line --pad_to_max_length --teacher {finished} --distillation_weight 1.0",
        {"sparsity": 0.5, "coverage": 0.5, "topology_updates": 0, "teacher": "out"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(run: Callable[..., Path], text: Path, finished: Path, tmp_path: Path, case: str) -> None:
    train_file, flags, expected = CASES[case]
    summary = summary_of(run(tmp_path / "out", flags.format(text=text, finished=finished), train_file))
    assert 4 < summary["eval_loss"] < 8
    assert summary["steps"] == 4
    assert {name: summary[name] for name in expected} == expected
    load = AutoModelForPreTraining if "--nsp" in flags else AutoModelForMaskedLM
    _, info = load.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert (tmp_path / "out" / "training.png").exists()
    if "--teacher" in flags:
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in log if "loss" in entry]
        assert len(steps) == 4
        for entry in steps:
            assert entry["loss"] == pytest.approx(entry["dynsparse/distillation_loss"], rel=1e-3)
        # Without a tokenizer of its own the student takes the teacher's.
        assert (tmp_path / "out" / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()


def test_a_stream_that_goes_wrong_ends_in_one_line(run: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    flags = f"--streaming --validation_file {text}/valid.txt"
    with pytest.raises(SystemExit, match=r"^run_mlm_dynsparse.py: error: .*late.jsonl. Got int 3 in row 9001\. .*$"):
        run(tmp_path / "out", flags, "late.jsonl")


def test_going_on_from_a_saved_model(run: Callable[..., Path], finished: Path, tmp_path: Path) -> None:
    """Without a step to speak of, the weights are those of the model that was named."""
    out = run(tmp_path / "out", f"--model_name_or_path {finished} --learning_rate 0 --static")
    assert_same_weights(out, finished)
    assert summary_of(out)["eval_loss"] == pytest.approx(summary_of(finished)["eval_loss"], rel=1e-6)
    assert summary_of(out)["sparsity"] == 0.5


@pytest.fixture(scope="module")
def dense_bert(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stock BERT. Not to be changed."""
    folder = tmp_path_factory.mktemp("dense")
    densify_(AutoModelForMaskedLM.from_pretrained(finished)).to_dense().save_pretrained(folder)
    AutoTokenizer.from_pretrained(finished).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    return folder


def test_a_dense_checkpoint_is_pruned_step_by_step(run: Callable[..., Path], dense_bert: Path, tmp_path: Path) -> None:
    flags = (
        f"--model_name_or_path {dense_bert} --method prune_ofa --topology_update_every 2 --sparsity 0.75"
        " --block_size 1x4 --learning_rate_rewinding --max_steps 10 --save_steps 3 --save_total_limit 9"
        f" --teacher {dense_bert} --distillation_positions all"
    )
    toy = TOY.replace("--num_topology_updates 2", "")
    whole = run(tmp_path / "whole", flags, toy=toy)
    summary = summary_of(whole)
    assert (summary["sparsity"], summary["topology_updates"]) == (0.75, 4)
    config = json.loads((whole / "config.json").read_text())
    assert (config["sparsity"], config["nnzb"], config["block_size"]) == (0.75, None, [1, 4])
    begun = AutoModelForMaskedLM.from_pretrained(whole / "checkpoint-3").config
    assert begun.sparsity == pytest.approx(0.75 - 0.75 * 0.6**3, abs=1e-3)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    part = run(tmp_path / "part", f"{flags} --resume_from_checkpoint last", toy=toy)
    assert_same_weights(part, whole)
    assert config["sparse_prediction"]
    with pytest.raises(SystemExit, match="A resumed run must have the model of its checkpoint"):
        run(tmp_path / "part", f"{flags} --block_size 1 --resume_from_checkpoint last", toy=toy)


# What a checkpoint becomes: which, flags, then its sparsity, the side of its blocks and where the run leads.
ON = {
    "sparse, as it is": ("sparse", {}, (0.5, 8, None)),
    "sparse, said again": ("sparse", {"sparsity": 0.5, "block_size": "8x8"}, (0.5, 8, None)),
    "sparse, pruned further": ("sparse", {"sparsity": 0.9, "method": "gmp"}, (0.5, 8, 0.9)),
    "sparse, to an end that nobody says": ("sparse", {"method": "gmp"}, (0.5, 8, "refused")),
    "dense, as it is": ("dense", {}, (0.0, 16, None)),
    "dense, a baseline": ("dense", {"sparsity": 0.9, "block_size": "4", "dense_baseline": True}, (0.0, 16, None)),
    "dense, pruned at once": ("dense", {"sparsity": 0.9, "block_size": "4"}, (0.9, 4, None)),
    "dense, pruned gradually": ("dense", {"sparsity": 0.9, "block_size": "4", "method": "gmp"}, (0.0, 4, 0.9)),
}


@pytest.mark.parametrize("case", ON)
def test_what_a_checkpoint_becomes(finished: Path, dense_bert: Path, tmp_path: Path, case: str) -> None:
    kind, flags, (sparsity, side, final) = ON[case]
    script = runpy.run_path(str(SCRIPT))
    of_model = {name: value for name, value in flags.items() if name != "method"}
    model_args = script["ModelArguments"](
        model_name_or_path=str(finished if kind == "sparse" else dense_bert), **of_model
    )
    args = script["RunArguments"](
        output_dir=str(tmp_path), method=flags.get("method", "dynsparse"), use_cpu=True, eval_strategy="no"
    )
    if final == "refused":
        with pytest.raises(ValueError, match="needs one `sparsity`, that of the end. Got sparsity=None"):
            script["build_config"](model_args, script["TextArguments"](), args, None)
        return
    config = script["build_config"](model_args, script["TextArguments"](), args, None)
    kept = "that of the checkpoint" if kind == "sparse" else "the blocks of largest L1 norm"
    assert first_pattern(model_args.model_name_or_path) == kept
    assert (config.sparsity, config.block_size, args.final_sparsity) == (sparsity, side, final)
    assert bool(config.nnzb_per_layer()) == (sparsity > 0 or final is not None)
    if kind == "dense" and final:
        blocks = {config.hidden_size**2 // 16, config.hidden_size * config.intermediate_size // 16}
        assert {*config.nnzb.values()} == blocks


def test_a_named_configuration_stays_as_it_is(tmp_path: Path) -> None:
    """Whatever the recipe; of Funnel, which calls it otherwise, nobody asks for an `initializer_range`."""
    script = runpy.run_path(str(SCRIPT))
    args = script["RunArguments"](output_dir=str(tmp_path), recipe="small", use_cpu=True, eval_strategy="no")
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    AutoConfig.for_model("roberta", **sizes, initializer_range=0.05).save_pretrained(tmp_path / "named")

    def built(**flags: Any) -> Any:
        return script["build_config"](script["ModelArguments"](**flags), script["TextArguments"](), args, None)

    named = {"config_name": str(tmp_path / "named"), "sparsity": 0.5}
    assert (built(**named).initializer_range, built(**named).hidden_dropout_prob) == (0.05, 0.1)
    assert built(**named, initializer_range=0.2).initializer_range == 0.2
    fresh = built(model_type="roberta", preset="tiny")
    assert (fresh.initializer_range, fresh.hidden_dropout_prob) == (fresh.hidden_size**-0.5, 0.0)
    AutoConfig.for_model("funnel", block_sizes=[1], d_model=64, n_head=2, d_head=32, d_inner=64).save_pretrained(
        tmp_path / "named"
    )
    assert built(**named).model_type == "funnel"


@pytest.mark.slow
def test_accelerate_launch(text: Path, tmp_path: Path, finished: Path) -> None:
    """As the first line of the README types it."""
    flags = shlex.split(f"{TOY} --train_file {text / 'train.txt'} --output_dir {tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(SCRIPT), *flags],
        env=clean_environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "evaluation loss" in done.stdout
    assert "2 topology updates" in done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    steps = [line.split()[1].split("/")[0] for line in told]
    assert steps == ["1", "2", "3", "4", "4", "4"]  # training, its end, and the evaluation
    assert re.fullmatch(r"step 3/4  loss .* tokens/s  \d+ s left  sparsity 50.0%  coverage .*%  newborn \d+%", told[2])
    logged = [line for line in done.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line)]
    assert len(logged) <= 6
    assert len((done.stdout + done.stderr).splitlines()) <= 30  # with what the launcher says, and the summary
    assert not re.search(r"it/s|UserWarning|\[transformers\]", done.stdout + done.stderr)
    assert_same_weights(tmp_path / "out", finished)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "hf"}


# Flags that cannot work, and words that the one line must hold: the argument and what it was given.
BAD = {
    "no such file": ("--train_file {text}/nothing.txt", ("train_file", "nothing.txt")),
    "sparsity 1": ("--sparsity 1.0", ("sparsity", "1.0")),
    "sparsity in words": ("--sparsity much", ("sparsity", "much")),
    "block size 3": ("--block_size 3", ("block_size", "3")),
    "block size abc": ("--block_size abc", ("block_size", "abc")),
    "preset": ("--preset enormous", ("preset", "enormous", "tiny")),
    "too many updates": ("--num_topology_updates 40", ("updates", "40")),
    "updates twice": ("--topology_update_every 2", ("num_topology_updates", "topology_update_every")),
    "config override": ("--config_overrides hidden_sise=32", ("hidden_sise",)),
    "heads": ("--config_overrides num_attention_heads=3", ("heads",)),
    "no checkpoint": ("--resume_from_checkpoint {text}", ("resume_from_checkpoint", "{text}")),
    "another model": (
        "--resume_from_checkpoint {finished}/checkpoint-2 --block_size 4",
        ("block_size", "4", "8"),
    ),
    "another sparsity": (
        "--resume_from_checkpoint {finished}/checkpoint-2 --sparsity 0.9",
        ("sparsity", "0.9", "0.5"),
    ),
    "other updates": (
        "--resume_from_checkpoint {finished}/checkpoint-2 --pruning_ratio 0.1",
        ("pruning_ratio", "0.1", "0.5"),
    ),
    "another sparsity of a sparse model": (
        "--model_name_or_path {finished} --sparsity 0.8",
        ("--sparsity 0.8", "0.5", "prune_ofa"),
    ),
    "calibration of a sparse model": (
        "--model_name_or_path {finished} --sparsity 0.5 --calibration_samples 9",
        ("`--calibration_samples` is for dense checkpoints", "which is sparse"),
    ),
    "calibration of a fresh model": (
        "--sparsity 0.5 --calibration_samples 9",
        ("Got 9 with no --model_name_or_path",),
    ),
    "other blocks of a sparse model": ("--model_name_or_path {finished} --block_size 4", ("--block_size 4",)),
    "a dense twin of a sparse model": ("--model_name_or_path {finished} --dense_baseline", ("--dense_baseline",)),
    "a density that a dense twin cannot reach": (
        "--sparsity 0 --method gmp --final_sparsity 0.8",
        ("`--final_sparsity`", "Got 0.8"),
    ),
    "rewinding without pruning": ("--learning_rate_rewinding", ("density_schedule='constant'",)),
    "pruning without updates": (
        "--model_name_or_path {finished} --sparsity 0.8 --method gmp --static",
        ("pruned in topology updates", "0.8"),
    ),
    "no such model": ("--model_name_or_path {text}/nothing", ("nothing",)),
    "more sequence than text": (
        "--train_file {text}/valid.txt --validation_split_percentage 1 --max_seq_length 512",
        ("512",),
    ),
    "unknown flag": ("--sparsness 0.5", ("--sparsness",)),
    "more positions than the model's": (
        "--config_overrides hidden_size=32,intermediate_size=64,max_position_embeddings=16",
        ("--max_seq_length", "32", "The model has 16"),
    ),
    "another vocabulary": (
        "--model_name_or_path {finished} --tokenizer_name {text}/large",
        ("the vocabulary of the model", "{text}/large", "300"),
    ),
    "no token to mask with": ("--tokenizer_name {text}/maskless", ("mask_token", "{text}/maskless")),
    "no token to begin with": ("--tokenizer_name {text}/clsless", ("cls_token", "{text}/clsless")),
    "sequences that are cut, and padded": ("--seq_length_schedule 16:0.5,32 --line_by_line", ("Got --line_by_line",)),
    "sequences of another length": ("--seq_length_schedule 64:0.5,128", ("--max_seq_length", "128 and 32")),
    "first weights twice": (
        "--initializer_range 0.1 --config_overrides initializer_range=0.2",
        ("--initializer_range", "--config_overrides"),
    ),
    "the configuration of a decoder": ("--config_name {text}/stock", ("needs an encoder", "stock", "gpt2")),
    "an architecture that there is not": ("--model_type nonsense", ("--model_type", "'nonsense'", "modernbert")),
    "next sentences for another architecture": ("--model_type bert --nsp", ("--nsp", "dynsparse_bert", "a bert")),
    "types of tokens": (
        "--nsp --config_overrides hidden_size=32,intermediate_size=64,type_vocab_size=1",
        ("type_vocab_size", "1"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    run: Callable[..., Path],
    text: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    flags, wanted = BAD[case]
    places = {"text": text, "finished": finished}
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "out", flags.format(**places))
    code = exit.value.code
    if code == 2:  # argparse has written its own line, after the usage
        line = capsys.readouterr().err.strip().splitlines()[-1]
    else:  # what Python writes to stderr, with exit code 1
        assert isinstance(code, str)
        line = code
    assert line.startswith("run_mlm_dynsparse.py: error: ")
    assert "\n" not in line
    for word in wanted:
        assert word.format(**places) in line, line
    assert not (tmp_path / "out").exists()


def test_output_folder_of_another_run(run: Callable[..., Path], finished: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(
        SystemExit, match=r"^run_mlm_dynsparse\.py: error: .*output_dir.*--resume_from_checkpoint last"
    ):
        run(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
