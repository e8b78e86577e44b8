"""How the training scripts begin: their flags and help, and how they end when something is wrong."""

import argparse
import dataclasses
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from hf_dynsparse.training import scripts
from hf_dynsparse.training.flags import FinetuningRunArguments, FlagParser
from tests.scripts import EXAMPLES
from tests.toy import toy_examples, toy_trainer


SCRIPTS = [*(f"run_{task}_dynsparse" for task in ("mlm", "glue", "qa", "embedding")), "run_earlybert"]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kinds of arguments of a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def of(script: str) -> tuple[Any, ...]:
        module: Any = import_module(script)
        return module.TASK_ARGUMENTS if script == "run_earlybert" else module.ARGUMENTS

    yield of
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_of_ours_once_and_explains_it(
    arguments: Any, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = arguments(script)
    parser = FlagParser(kinds, description=f"{sys.modules[script].__doc__}\n    an example \\\n        of two lines")
    shown = parser.format_help()
    assert shown.startswith("usage: ")
    assert shown.splitlines()[5].startswith("  --sparsity ")
    assert shown.endswith("    an example \\\n        of two lines\n")
    ours, theirs = shown.split("all flags of transformers.TrainingArguments work too; --help_all explains them:\n")
    theirs = theirs.split("\n\n")[0]
    flags = re.findall(r"^  --(\w+)", ours, re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert flags.index("sparsity") == 0
    explained = {field.name for cls in kinds for field in dataclasses.fields(cls) if field.init}
    explained -= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert explained <= set(flags)
    assert {"output_dir", "eval_strategy", "logging_steps", "learning_rate"} <= set(flags)
    actions = {action.dest: action for action in reversed(parser._actions)}
    for name in explained:
        assert len(actions[name].help or "") > 15, name
    rest = re.findall(r"--(\w+)", theirs)
    assert {"fsdp", "hub_token", "optim"} <= set(rest)
    assert set(rest).isdisjoint(flags)
    assert {*rest, *flags, "help", argparse.SUPPRESS} == set(actions)
    for flag in ("--help_all", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([flag])
        everything = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(everything) == sorted([*flags, *rest])


def test_flags_come_from_the_command_line_or_from_a_file(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"sparsity": 0.5, "max_steps": 4, "output_dir": "a", "nsp": True}))
    (tmp_path / "run.yaml").write_text("sparsity: 5e-1\nmax_steps: 9\noutput_dir: b  # as said below\nnsp: true\n")
    found = []
    for given in (
        ["--sparsity", "0.5", "--max-steps", "4", "--output_dir", "a", "--nsp"],
        [str(tmp_path / "run.json")],
        [str(tmp_path / "run.yaml"), "--max_steps", "4", "--output_dir", "a"],
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", *given])
        model_args, data_args, args = scripts.parse_arguments(*arguments("run_mlm_dynsparse"))
        found.append((model_args.sparsity, data_args.nsp, args.max_steps, args.output_dir))
    assert found == [(0.5, True, 4, "a")] * 3


def test_what_yaml_means_otherwise(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are those of the command line: `no` is a strategy, 1x4 and 16 are block sizes; null leaves nothing."""
    plan = "eval_strategy: no\nblock_size: 16\ntime_budget: 90\nsave_total_limit: null\nlearning_rate: 1e-3\n"
    (tmp_path / "plan.yml").write_text(f"{plan}accelerator_config: {{even_batches: false}}\nreport_to: [none]\n")
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "plan.yml"), "--output_dir", str(tmp_path)])
    model_args, _, args = scripts.parse_arguments(*arguments("run_mlm_dynsparse"))
    assert (model_args.block_size, args.time_budget, args.save_total_limit) == ("16", "90", None)
    assert (args.eval_strategy, args.learning_rate, args.report_to) == ("no", 1e-3, [])
    assert args.accelerator_config.even_batches is False


def test_the_plan_for_eight_hours(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [str(EXAMPLES / "plans" / "eight_hours.yaml"), "--output_dir", str(tmp_path), "--block_size=4"]
    monkeypatch.setattr(sys, "argv", ["script.py", *given])
    model_args, data_args, args = scripts.parse_arguments(*arguments("run_mlm_dynsparse"))
    assert (model_args.preset, model_args.block_size, data_args.max_seq_length) == ("mini", "4", 128)
    assert (args.time_budget, args.max_steps, args.resume_from_checkpoint) == ("8h", -1, "last")
    data_args.streaming = True  # whose steps are not known yet
    sys.modules["run_mlm_dynsparse"].check(model_args, data_args, args)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("plan.yaml", "presett: mini", r"must hold flags of --help, without their dashes. Got `presett`"),
        ("plan.yaml", "- preset", r"must be a table of flags, .* Got .*plan.yaml, which holds none"),
        ("plan.yml", "preset: [", r"must be YAML or JSON. Got .*plan.yml: while parsing"),
        ("plan.json", "{", r"must be YAML or JSON. Got .*plan.json: Expecting property name"),
        ("plan.yaml", "time_budget: 8h\nmax_steps: 4", r"Got 8h and --max_steps 4"),
    ],
)
def test_plans_that_cannot_be_read(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, error: str
) -> None:
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / name)])
    with pytest.raises(ValueError, match=error):
        scripts.parse_arguments(*arguments("run_mlm_dynsparse"))


@pytest.mark.parametrize(("steps", "warned"), [(7_031, True), (7_032, False)])
def test_a_run_below_the_plateau_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, warned: bool
) -> None:
    """Steps of twice four sequences of 16 tokens: 900,000 in all, or less."""
    trainer = toy_trainer(tmp_path, max_steps=steps, gradient_accumulation_steps=2)
    with caplog.at_level("INFO", "hf_dynsparse"):
        scripts.tell_length(trainer)
    assert caplog.messages == [f"{steps:,} steps: 2.34e+03 passes over 24 sequences"]
    scripts.warn_of_plateau(trainer, 16)
    assert ("A run of 899,968 tokens is likely to end as a table of word frequencies" in caplog.text) is warned


def test_a_recipe_is_what_is_not_given(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"output_dir": "a", "max_seq_length": 64, "per_device_train_batch_size": 4, "use_cpu": True}
    kinds = arguments("run_mlm_dynsparse")
    (tmp_path / "run.json").write_text(json.dumps(given))
    for argv in ([f"--{name}={value}" for name, value in given.items()], [str(tmp_path / "run.json")]):
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        _, data_args, args = scripts.parse_arguments(*kinds, recipes=True)
        assert (args.recipe, args.adam_beta2, args.per_device_train_batch_size) == ("small", 0.98, 4)
        assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("warmup_stable_decay", {"decay_type": "linear"})
        assert (args.seq_length_schedule, data_args.whole_word_mask) == ("32:0.5,64", False)
    monkeypatch.setattr(sys, "argv", ["script.py", "--recipe", "paper", "--output_dir", "a", "--use_cpu"])
    assert dataclasses.asdict(scripts.parse_arguments(*kinds, recipes=True)[2]) == dataclasses.asdict(
        kinds[2](output_dir="a", use_cpu=True)
    )
    for name, batch in (("paper", 32), ("small", 8)):
        monkeypatch.setattr(sys, "argv", ["script.py", "--recipe", name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            scripts.parse_arguments(*kinds, recipes=True)
        shown = capsys.readouterr().out
        assert re.search(rf"Sequences per process and\s+micro-batch. \(default: {batch}\)", shown)
    assert re.search(r"\n  --adam_beta2 X .*\n.*\(default: 0\.98\)", shown)


@pytest.mark.parametrize("error", [ValueError("first\n\n  `a` must be b.  "), OSError("`a` must be b.")])
def test_an_error_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit, match=r"^script.py: error: `a` must be b\.$"), scripts.one_line_errors():
        raise error
    with pytest.raises(type(error)), scripts.one_line_errors(KeyError):
        raise error


def test_an_error_of_the_hub_names_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    error = OSError("me/model is not a valid identifier\nIf it is private, log in.")
    with pytest.raises(SystemExit, match="me/model is not a valid identifier If"), scripts.one_line_errors():
        raise error


@pytest.mark.parametrize("had", [False, True])
def test_the_output_folder_is_as_it_was(had: bool, tmp_path: Path) -> None:
    """Unless it had a tokenizer, the one that a script made goes; what is made after the preparation stays."""
    folder = tmp_path / "out"
    if had:
        (folder / "tokenizer").mkdir(parents=True)
    args: Any = argparse.Namespace(
        output_dir=str(folder),
        process_index=0,
        world_size=1,
        should_save=True,
        push_to_hub=False,
        resume_from_checkpoint=None,
    )

    @scripts.holds_output_dir
    def main() -> None:
        with scripts.one_line_errors():
            assert scripts.find_checkpoint(args, None) is None
            (folder / "tokenizer").mkdir(exist_ok=True)
            raise ValueError("refused")

    with pytest.raises(SystemExit):
        main()
    assert (folder / "tokenizer").exists() == folder.exists() == had

    @scripts.holds_output_dir
    def later() -> None:
        with scripts.one_line_errors():
            scripts.find_checkpoint(args, None)
            (folder / "tokenizer").mkdir(exist_ok=True)
        with scripts.one_line_errors():
            raise ValueError("refused")

    with pytest.raises(SystemExit):
        later()
    assert (folder / "tokenizer").exists()


def test_what_is_left_out_is_not_evaluated(tmp_path: Path) -> None:
    args = FinetuningRunArguments(output_dir=str(tmp_path), use_cpu=True, do_eval=False, do_predict=True)
    assert (args.splits, args.do_eval) == (["train", "test"], False)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"max_steps": 1000, "eval_strategy": "steps", "eval_steps": 300}, 80),  # 6 % of 4000, three times
        ({"max_steps": 1000, "eval_strategy": "steps", "eval_steps": 0.25}, 64),  # 60 would be too few
        ({"max_steps": 1000, "eval_strategy": "steps", "eval_steps": 999}, 90),  # all there are
        ({"max_steps": -1, "num_train_epochs": 500, "eval_strategy": "epoch", "gradient_accumulation_steps": 6}, 64),
    ],
)
def test_evaluations_while_training_are_a_small_share(tmp_path: Path, settings: dict[str, Any], rows: int) -> None:
    trainer = toy_trainer(tmp_path, num_topology_updates=0, **settings)
    whole = Dataset.from_list(toy_examples(90))
    trainer.eval_dataset = whole
    kept = scripts.rows_while_training(trainer)
    assert list(kept["input_ids"]) == list(whole["input_ids"])[:rows]
    trainer.eval_dataset = whole.to_iterable_dataset()
    assert [row["input_ids"] for row in scripts.rows_while_training(trainer)] == list(whole["input_ids"])[:rows]
