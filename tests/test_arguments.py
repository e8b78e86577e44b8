import inspect

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dynsparse import DynSparseTrainingArguments, TopologyCallback
from hf_dynsparse.topology import PRUNE_SCORES, REGROW_RULES, SCHEDULES


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prune_score": "l3"}, "`prune_score` must be one of l1, l2, linf.* Got 'l3'"),
        ({"prune_score": "unfired"}, "`prune_score` must be one of .* Got 'unfired'"),
        ({"regrow_rule": "l1"}, "`regrow_rule` must be one of random, gradient, unfired. Got 'l1'"),
        ({"pruning_schedule": "step"}, "`schedule` must be one of cosine, constant, linear. Got 'step'"),
        ({"pruning_ratio": 1.01}, r"`pruning_ratio` .*\[0, 1\]. Got 1.01. The paper's optimum is 0.5"),
        ({"pruning_ratio": -0.1}, r"`pruning_ratio` .*\[0, 1\]. Got -0.1"),
        ({"num_topology_updates": -1}, "`num_topology_updates` must not be negative. Got -1"),
        ({"num_topology_updates": 4, "topology_update_every": 5}, "not both. Got 4 and 5"),
        ({"group_lasso": -1e-3}, "`group_lasso` must not be negative. Got -0.001"),
    ],
)
def test_errors(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DynSparseTrainingArguments(output_dir=str(tmp_path), **wrong)


def test_defaults_are_the_paper(tmp_path):
    args = DynSparseTrainingArguments(output_dir=str(tmp_path))
    assert (args.adam_epsilon, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1e-6, 0.01, 0.9, 0.999)
    assert (args.pruning_ratio, args.prune_score, args.regrow_rule) == (0.5, "l1", "random")
    assert (args.pruning_schedule, args.readmit, args.group_lasso) == ("cosine", False, 0.0)
    assert args.get_warmup_steps(757_000) == pytest.approx(10_000, rel=0.001)
    assert args.lr_scheduler_type == "linear"
    # Each rank's topology is compared instead of overwritten.
    assert args.ddp_broadcast_buffers is False


def test_settings_are_the_arguments_of_the_callback(tmp_path):
    args = DynSparseTrainingArguments(
        output_dir=str(tmp_path), seed=7, pruning_schedule="linear", topology_last_step=9
    )
    settings = args.topology_settings()
    assert settings.keys() == inspect.signature(TopologyCallback).parameters.keys()
    assert (settings["seed"], settings["schedule"], settings["last_step"]) == (7, "linear", 9)
    assert TopologyCallback(**settings).state()["args"] == settings


def test_command_line():
    (args,) = HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--num-topology-updates", "5", "--regrow_rule", "gradient", "--readmit"]
    )
    assert (args.num_topology_updates, args.regrow_rule, args.readmit) == (5, "gradient", True)
    assert isinstance(args, TrainingArguments)


@pytest.mark.parametrize(
    ("option", "choices"),
    [("--prune_score", PRUNE_SCORES), ("--regrow_rule", REGROW_RULES), ("--pruning_schedule", SCHEDULES)],
)
def test_command_line_names_the_choices(capsys, option, choices):
    with pytest.raises(SystemExit):
        HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", option, "?"])
    error = capsys.readouterr().err
    assert all(choice in error for choice in choices)
