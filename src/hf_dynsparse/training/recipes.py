"""
Recipes of pre-training: the defaults of the script `run_mlm_dynsparse.py`. What is given goes before them.

`paper` (arXiv:2108.06277, section 3) is written in the arguments themselves. `small` is for budgets of a few million
tokens, all of which the paper's would spend on the frequencies of words.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose, log
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..models.density import sparsity_of
from ..optim import sparse_learning_rate
from ..reports.estimate import DENSE_LEARNING_RATES
from .curriculum import UNCUT, parse_lengths


logger = logging.getLogger(__name__)

# Tiny and large are not in the paper.
LEARNING_RATES = {"tiny": 1e-3, **DENSE_LEARNING_RATES, "large": 1e-4}

# Arguments of the recipe for small budgets. Lengths go with --max_seq_length.
SMALL = {
    "distance_bias": "1",
    "seq_length_schedule": "64:0.5,128",
    "mlm_probability_schedule": "0.3",
    "whole_word_mask": False,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"decay_type": "linear"},
    "warmup_steps": 0.03,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": 2000,
    # Once the model has learnt some, blocks are judged by use: those of small norm are new rather than useless.
    "topology_first_step": 0.3,
    "pruning_ratio": 0.3,
    "prune_score": "weight_gradient",
}
# Architectures whose positions are absolute, and hide the neighbours: those that a distance bias is for.
ABSOLUTE = ("dynsparse_bert", "bert", "roberta", "electra", "distilbert", "camembert", "xlm-roberta")
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs")
TOPOLOGY = ("topology_first_step", "pruning_ratio", "prune_score")
LENGTH = ("max_steps", "num_train_epochs", "time_budget")  # of a run


@dataclass(frozen=True)
class PeakRates:
    """
    Peak learning rates at a width of 256.

    Args:
        dense (`float`): of the matrices of a dense model.
        sparse (`float`): of matrices of density 0.1 or less; of those between, in a straight line of logarithms.
        rest (`float`): of embeddings, norms, biases and head.
    """

    dense: float
    sparse: float
    rest: float

    def of_matrices(self, density: float) -> float:
        """That of matrices of this density."""
        return self.dense * max(density, SMALL_DENSITY) ** (log(self.sparse / self.dense) / log(SMALL_DENSITY))


SMALL_DENSITY = 0.1
# What is normalised before each layer, rather than after, stands larger first weights and steps.
SMALL_RATES, PRENORM_RATES = PeakRates(4e-4, 4e-3, 4e-3), PeakRates(1e-3, 6e-3, 2e-3)
PRENORM = ("modernbert",)


@dataclass(frozen=True)
class PretrainingRecipe:
    """
    Defaults of pre-training from first weights.

    Args:
        arguments (`Callable`): of what is given, and the sequence length: defaults of the arguments.
        configuration (`Callable`): of the model's configuration and its density: fields of it that are set.
        learning_rate (`Callable`): of the model and the name of the preset: the peak rate.
        dense_learning_rate (`Callable`): of the model: the peak rate of what is not in its matrices; `None` for the
            same.
    """

    arguments: Callable[[Mapping[str, Any], int], dict[str, Any]]
    configuration: Callable[[PretrainedConfig, float], dict[str, Any]]
    learning_rate: Callable[[PreTrainedModel, str], float]
    dense_learning_rate: Callable[[PreTrainedModel], float | None]


def paper_learning_rate(model: PreTrainedModel, preset: str) -> float:
    """The dense optimum of the preset, by the rule for the sparsity."""
    return sparse_learning_rate(LEARNING_RATES[preset], sparsity_of(model))


def small_arguments(given: Mapping[str, Any], seq_length: int) -> dict[str, Any]:
    """[`SMALL`], without what would contradict something that is given."""
    left_out = set[str]()
    if any(given.get(name) for name in UNCUT):
        left_out.add("seq_length_schedule")
    if given.get("config_name") or given.get("model_type", ABSOLUTE[0]) not in ABSOLUTE:
        left_out.add("distance_bias")
    if "mlm_probability" in given:
        left_out.add("mlm_probability_schedule")
    if given.get("learning_rate_rewinding") or any(name in given for name in SCHEDULE):
        left_out.update(SCHEDULE)
    if "method" in given:
        left_out.update(TOPOLOGY)
    if any(name in given for name in LENGTH):
        left_out.add("max_steps")
    arguments: dict[str, Any] = {name: value for name, value in SMALL.items() if name not in left_out}
    if "seq_length_schedule" in arguments:
        arguments["seq_length_schedule"] = scaled_lengths(arguments["seq_length_schedule"], seq_length)
    return arguments


def scaled_lengths(schedule: str, seq_length: int) -> str | None:
    """The same schedule for another last length; `None` if a length would not be whole."""
    stages = parse_lengths(schedule)
    full = stages[-1][0]
    if any(length * seq_length % full for length, _ in stages):
        return None
    return ",".join([*(f"{length * seq_length // full}:{until:g}" for length, until in stages[:-1]), str(seq_length)])


def small_configuration(config: PretrainedConfig, density: float) -> dict[str, Any]:
    """
    First weights for which the outputs of a layer have a tenth of the variance of its inputs whatever its width and
    density, or in a pre-normalised dense model the same; and no dropout.
    """
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    variance = 1.0 if config.model_type in PRENORM else SMALL_DENSITY / max(density, SMALL_DENSITY)
    return {"initializer_range": (variance / config.hidden_size) ** 0.5, **dropout}


def small_learning_rate(model: PreTrainedModel, preset: str) -> float:
    """
    Of the matrices: a step of Adam moves every entry by the rate, and an output by the more the more inputs it has. So
    the rate falls with the root of the width and with the density.
    """
    return _small_rates(model).of_matrices(1.0 - sparsity_of(model)) * _by_width(model)


def small_dense_learning_rate(model: PreTrainedModel) -> float:
    """Of embeddings, norms, biases and head."""
    return _small_rates(model).rest * _by_width(model)


def _small_rates(model: PreTrainedModel) -> PeakRates:
    return PRENORM_RATES if model.config.model_type in PRENORM else SMALL_RATES


def _by_width(model: PreTrainedModel) -> float:
    return float((256 / model.config.hidden_size) ** 0.5)


RECIPES = {
    "small": PretrainingRecipe(small_arguments, small_configuration, small_learning_rate, small_dense_learning_rate),
    "paper": PretrainingRecipe(
        lambda given, seq_length: {}, lambda config, density: {}, paper_learning_rate, lambda model: None
    ),
}


def recipe_defaults(given: Mapping[str, Any], seq_length: int) -> dict[str, Any]:
    """
    Defaults of the arguments of a run, its recipe among them: the one that is given, else `paper` for a run that goes
    on from the weights of `model_name_or_path`, and `small` for first weights.

    Args:
        given (`Mapping[str, Any]`): the arguments that are given.
        seq_length (`int`): tokens per sequence of the run.

    Raises:
        ValueError: for a recipe that there is not.
    """
    name = given.get("recipe") or ("paper" if given.get("model_name_or_path") else "small")
    if name not in RECIPES:
        raise ValueError(f"`--recipe` must be {' or '.join(RECIPES)}. Got {name!r}. Choose one.")
    return {**RECIPES[name].arguments(given, seq_length), "recipe": name}


def set_first_weights_(config: PretrainedConfig, recipe: str, overrides: str | None, sparsity: float) -> None:
    """Set the fields of a fresh model's configuration that a recipe decides, but for those of `--config_overrides`."""
    overridden = {pair.split("=")[0].strip() for pair in (overrides or "").split(",")}
    for name, value in RECIPES[recipe].configuration(config, 1.0 - sparsity).items():
        if name not in overridden and name in config.to_dict():
            setattr(config, name, value)


def set_learning_rates_(args: Any, model: PreTrainedModel, preset: str) -> None:
    """Set the peak rates of a run that gives none: of all that is trained, and of what is not in matrices."""
    recipe = RECIPES[args.recipe]
    args.learning_rate, rest = recipe.learning_rate(model, preset), recipe.dense_learning_rate(model)
    if args.dense_learning_rate is None and rest is not None and not isclose(rest, args.learning_rate):
        args.dense_learning_rate = rest
    others = "" if args.dense_learning_rate is None else f", {args.dense_learning_rate:.3g} outside of the matrices"
    logger.info("learning rate %.3g%s, by the recipe %s", args.learning_rate, others, args.recipe)
