from dataclasses import asdict, fields, replace

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dynsparse import DynSparseTrainingArguments, TopologyCallback
from hf_dynsparse.topology import METHODS, PRUNE_SCORES, REGROW_RULES, SCHEDULES, TopologyOptions, TopologySettings
from hf_dynsparse.training.scripts import check_updates_fit


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prune_score": "l3"}, "`prune_score` must be one of l1, l1_patient, l2, linf.* Got 'l3'"),
        ({"prune_score": "unfired"}, "`prune_score` must be one of .* Got 'unfired'"),
        ({"regrow_rule": "l1"}, "`regrow_rule` must be one of random, gradient, unfired, .* Got 'l1'"),
        ({"pruning_schedule": "sine"}, "`pruning_schedule` must be one of cosine, constant, linear, step. Got 'sine'"),
        ({"method": "rig"}, "`method` must be one of static, dynsparse, set, rigl, .* Got 'rig'"),
        ({"pruning_ratio": 1.01}, r"`pruning_ratio` .*\[0, 1\]. Got 1.01. The paper's optimum is 0.5"),
        ({"pruning_ratio": -0.1}, r"`pruning_ratio` .*\[0, 1\]. Got -0.1"),
        ({"num_topology_updates": -1}, "`num_topology_updates` must not be negative. Got -1"),
        ({"num_topology_updates": 4, "topology_update_every": 5}, "not both. Got 4 and 5"),
        ({"regrow_std": -1e-3}, "`regrow_std` .* must not be negative. Got -0.001. 0 starts them at zero"),
        ({"group_lasso": -1e-3}, "`group_lasso` must not be negative. Got -0.001"),
    ],
)
def test_errors(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DynSparseTrainingArguments(output_dir=str(tmp_path), **wrong)


def test_defaults_are_the_paper(tmp_path):
    args = DynSparseTrainingArguments(output_dir=str(tmp_path))
    assert (args.adam_epsilon, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1e-6, 0.01, 0.9, 0.999)
    settings = args.topology_settings()
    assert (settings.pruning_ratio, settings.prune_score, settings.regrow_rule) == (0.5, "l1", "random")
    assert (settings.pruning_schedule, settings.readmit, args.group_lasso) == ("cosine", False, 0.0)
    assert settings == TopologySettings(seed=42)
    assert args.get_warmup_steps(757_000) == pytest.approx(10_000, rel=0.001)
    assert args.lr_scheduler_type == "linear"
    # Each rank's topology is compared instead of overwritten.
    assert args.ddp_broadcast_buffers is False


def test_settings_are_those_of_the_callback(tmp_path):
    args = DynSparseTrainingArguments(
        output_dir=str(tmp_path), seed=7, pruning_schedule="linear", topology_last_step=9
    )
    settings = args.topology_settings()
    assert (settings.seed, settings.pruning_schedule, settings.topology_last_step) == (7, "linear", 9)
    saved = TopologyCallback(settings, group_lasso=0.1).state()["args"]
    assert saved == {**asdict(settings), "group_lasso": 0.1}
    assert TopologyCallback(**saved).settings == settings


def test_a_state_of_the_first_version_has_other_names():
    old = {"num_updates": 3, "update_every": None, "first_step": 2, "last_step": 9, "schedule": "linear", "seed": 7}
    new = TopologySettings(
        num_topology_updates=3, topology_first_step=2, topology_last_step=9, pruning_schedule="linear", seed=7
    )
    assert TopologyCallback(**old).settings == new
    TopologyCallback(new).check_settings({"args": old})
    with pytest.raises(ValueError, match=r"Got topology_last_step: None \(checkpoint: 9\)"):
        TopologyCallback(new, topology_last_step=None).check_settings({"args": old})


def test_help_stands_beside_every_option():
    own = {option.name: option for option in fields(DynSparseTrainingArguments)}
    assert all(own[option.name].metadata["help"] for option in fields(TopologyOptions))


def test_command_line():
    (args,) = HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--num-topology-updates", "5", "--regrow_rule", "gradient", "--readmit"]
    )
    assert (args.num_topology_updates, args.regrow_rule, args.readmit) == (5, "gradient", True)
    (rigl,) = HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--method", "rigl", "--replace_step", "false", "--pruning_ratio", "0.2"]
    )
    settings = rigl.topology_settings()
    assert (settings.readmit, settings.replace_step, settings.pruning_ratio) == (True, False, 0.2)
    assert isinstance(args, TrainingArguments)


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--prune_score", PRUNE_SCORES),
        ("--regrow_rule", REGROW_RULES),
        ("--pruning_schedule", SCHEDULES),
        ("--method", METHODS),
    ],
)
def test_command_line_names_the_choices(capsys, option, choices):
    with pytest.raises(SystemExit):
        HfArgumentParser(DynSparseTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", option, "?"])
    error = capsys.readouterr().err
    assert all(choice in error for choice in choices)


def test_what_is_given_wins_over_the_method(tmp_path):
    def settings(**arguments):
        return DynSparseTrainingArguments(output_dir=str(tmp_path), **arguments).topology_settings()

    rigl, changed = settings(method="rigl"), settings(method="rigl", pruning_ratio=0.5, readmit=False)
    assert (rigl.regrow_rule, rigl.readmit, rigl.replace_step) == ("gradient", True, True)
    assert rigl.topology_last_step == 0.75
    assert changed == replace(rigl, pruning_ratio=0.5, readmit=False)
    assert settings(method="itop").topology_update_every == 0.05
    # A number of updates takes the place of the preset's interval, and an interval that of its number.
    both = settings(method="itop", num_topology_updates=7)
    assert (both.num_topology_updates, both.topology_update_every) == (7, None)
    both = settings(method="static", topology_update_every=0.1)
    assert (both.num_topology_updates, both.topology_update_every) == (None, 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_every_method_are_complete(method):
    """What they amount to, given explicitly, amounts to the same."""
    settings = TopologySettings(method=method)
    assert replace(settings) == settings == TopologyCallback(**TopologyCallback(settings).state()["args"]).settings


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"pruning_schedule": "x"}, "^`pruning_schedule` must be one of cosine"),
        ({"regrow_rule": "x"}, "^`regrow_rule` must be one of random"),
        ({"density_schedule": "x"}, "^`density_schedule` must be one of"),
        ({"hidden_copy": True}, "Got density_schedule='constant', pruning_ratio=0.5"),
    ],
)
def test_errors_name_arguments_that_exist(tmp_path, given, error):
    with pytest.raises(ValueError, match=error):
        DynSparseTrainingArguments(output_dir=str(tmp_path), **given)


def test_errors_about_steps_name_arguments_that_exist(tmp_path):
    args = DynSparseTrainingArguments(output_dir=str(tmp_path), topology_update_every=1, topology_first_step=40)
    with pytest.raises(ValueError, match=r"Got topology_first_step=40, topology_last_step=None"):
        check_updates_fit(args, 30)
