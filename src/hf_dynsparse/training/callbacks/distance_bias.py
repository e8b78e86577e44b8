"""`DistanceBiasCallback`: a distance bias in attention that falls while any `Trainer` trains."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import CONFIG_NAME
from ...models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ...models.position_bias import set_position_bias_, strength_of
from .throughput import add_to_log


logger = logging.getLogger(__name__)

# Of the way down: at first the whole bias, for the model has to leave the frequencies of words behind.
CONSTANT = 1 / 3
# How far it falls by halves, before it goes to zero in a straight line.
DEPTH = 64


class DistanceBias(NamedTuple):
    """From strength `start` to `end` at the share `until` of a run."""

    start: float
    end: float
    until: float

    def strength(self, progress: float) -> float:
        """At `progress`, the share of the steps that are done."""
        return self.end + (self.start - self.end) * fall(progress / self.until)


def fall(way: float) -> float:
    """What is left of the bias after this share of the way: all for the first part, then a geometric fall to 0."""
    if way >= 1:
        return 0.0
    return (DEPTH ** min(1.0, (1 - way) / (1 - CONSTANT)) - 1) / (DEPTH - 1)


def parse_distance_bias(text: str) -> DistanceBias:
    """
    `START`, or `START:END@SHARE`.

    Raises:
        ValueError: for anything else, or numbers out of range.
    """
    first, _, rest = text.partition(":")
    end, _, until = rest.partition("@")
    try:
        bias = DistanceBias(float(first), float(end if rest else text), float(until if rest else 1))
    except ValueError:
        bias = DistanceBias(0.0, 0.0, 0.0)
    if not (0 < bias.start < float("inf") and 0 <= bias.end <= bias.start and 0 < bias.until <= 1):
        raise ValueError(
            "`distance_bias` must be START:END@SHARE, strengths that do not rise and a share of the run in (0, 1], or "
            f"one strength above 0 that stays. Got {text!r}. Write 1:0@0.7, or leave it out."
        )
    return bias


class DistanceBiasCallback(TrainerCallback):
    """
    Gives the attention of a model a bias of minus slope times distance (arXiv:2108.12409, section 3), and lets it fall
    as a function of the share of the steps that are done. At zero it is taken out, and the model is a stock one. The
    configuration of the model says how strong it is, so that a checkpoint computes what training did.

    Args:
        distance_bias (`str`): `"1:0@0.7"`: from 1 to 0 at 0.7 of the run; `"1"`: stays.

    Raises:
        ValueError: for another text; or from `on_init_end`, for a model that takes none.
    """

    def __init__(self, distance_bias: str) -> None:
        self.distance_bias = distance_bias
        self.schedule = parse_distance_bias(distance_bias)
        self._logged = 0.0

    def strength(self, state: TrainerState) -> float:
        """After the steps that are done."""
        return self.schedule.strength(state.global_step / state.max_steps)

    def is_final(self, state: TrainerState) -> bool:
        """Whether the bias changes no more."""
        return self.strength(state) == self.schedule.end

    def follow_(self, model: nn.Module, state: TrainerState) -> None:
        """Give `model` the bias of this step."""
        self._logged = self.strength(state)
        set_position_bias_(_whole_model(model), self._logged)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _whole_model(kwargs["model"])
        if strength_of(model.config) and model.config.position_bias != "alibi":
            raise ValueError(
                "`distance_bias` is for fixed slopes. Got a model with position_bias="
                f"{model.config.position_bias!r}, which learns its own. Leave one of them out."
            )
        set_position_bias_(model, self.schedule.start)
        if not isinstance(model, DynSparseBertPreTrainedModel) and "hf_quantizer" not in vars(model):
            logger.warning(
                "A dense %s is loaded by transformers alone, which leaves a distance bias out: what is saved while "
                "there is one gives other outputs, but by the scripts and commands of hf_dynsparse. "
                "`DynSparseBertConfig(sparsity=0)` is a dense BERT that keeps it.",
                type(model).__name__,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.follow_(kwargs["model"], state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Before that step is evaluated and saved: the model is then as the next step begins.
        self.follow_(kwargs["model"], state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        add_to_log(state, kwargs["logs"], {"dynsparse/distance_bias": self._logged})


def check_resumed(
    callback: DistanceBiasCallback | None, model: nn.Module, checkpoint: str | Path, state: TrainerState
) -> None:
    """
    Compare the distance bias of a run with that of the checkpoint that it goes on from, at `state`.

    Raises:
        ValueError: if they differ.
    """
    file = Path(checkpoint, CONFIG_NAME)
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return
    saved = strength_of(json.loads(file.read_text(encoding="utf-8")))
    here = callback.strength(state) if callback is not None else strength_of(model.config)
    if here != saved:
        given = "none" if callback is None else repr(callback.distance_bias)
        raise ValueError(
            "A resumed run must have the distance bias of its checkpoint, over as many steps. Got strength "
            f"{here:g} at step {state.global_step} of {state.max_steps} (distance_bias: {given}), but {checkpoint} "
            f"has {saved:g}. Give the `distance_bias` and `max_steps` of that run, or begin in another folder."
        )


def _whole_model(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "`distance_bias` is for a whole model of transformers: an adapter does not save it. Got "
            f"{type(model).__name__}. Leave it out."
        )
    return model
