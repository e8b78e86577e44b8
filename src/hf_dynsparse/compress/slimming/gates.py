"""Gates: one learnable number for each attention head and each intermediate neuron (arXiv:2101.00063, section 3)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ...nn.linear import SEARCH_GATES
from .ticket import Ticket


class Gates(NamedTuple):
    """Per layer the gates of its heads, of shape `(heads,)`, and of its neurons, of shape `(intermediate_size,)`."""

    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]


def add_gates_(model: PreTrainedModel) -> PreTrainedModel:
    """
    Give every head and every intermediate neuron of a dense BERT, stock or [`DynSparseBertModel`], a learnable gate of
    1, which changes no output.

    Gates are parameters `gates` of the two output projections of each layer and scale their inputs: for a head this
    equals scaling its attention probabilities. They are float32 whatever the model is: a whole search would be lost
    between 1 and the next number of bfloat16. They have weight decay like any other weight, as in the authors' code.

    Raises:
        ValueError: if the model is not a dense BERT, or has gates already.
    """
    projections = [pair for layer in encoder_layers(model) for pair in _projections(layer)]
    for dense, _ in projections:
        if type(dense) is not nn.Linear or SEARCH_GATES in dense._parameters:
            received = "one with gates" if SEARCH_GATES in dense._parameters else f"one with {type(dense).__name__}"
            raise ValueError(f"`add_gates_` must get a dense BERT without gates. Got {received}. Load a dense one.")
    for dense, units in projections:
        dense.register_parameter(SEARCH_GATES, nn.Parameter(torch.ones(units, device=dense.weight.device)))
        dense.register_forward_pre_hook(scale_inputs)
    return model


def gates_of(model: PreTrainedModel) -> Gates:
    """
    The gates of a model, the parameters themselves.

    Raises:
        ValueError: if there are none.
    """
    pairs = [[dense for dense, _ in _projections(layer)] for layer in encoder_layers(model)]
    heads, neurons = ([dense._parameters.get(SEARCH_GATES) for dense in part] for part in zip(*pairs, strict=True))
    if heads[0] is None:
        raise ValueError(f"The model must have gates. Got {type(model).__name__} without. Call `add_gates_` first.")
    return Gates(heads, neurons)


def remove_gates_(model: PreTrainedModel) -> Gates:
    """
    Take the gates off the model, whose outputs then are those of gates of 1, and return them: `slim` folds them into
    the weights.
    """
    gates = gates_of(model)
    for layer in encoder_layers(model):
        for dense, _ in _projections(layer):
            del dense._parameters[SEARCH_GATES]
            hooks = dense._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is scale_inputs]:
                del hooks[key]
    return Gates(*([gate.detach() for gate in part] for part in gates))


@torch.no_grad()
def close_gates_(model: PreTrainedModel, ticket: Ticket) -> PreTrainedModel:
    """Set the gates of the units outside `ticket` to 0: the outputs are those of the slimmed model."""
    for part, kept in zip(gates_of(model), (ticket.heads, ticket.neurons), strict=True):
        for gates, units in zip(part, kept, strict=True):
            open_gates = gates[list(units)].clone()
            gates.zero_()
            gates[list(units)] = open_gates
    return model


def scale_inputs(dense: nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """A forward pre-hook. A function of this module and no closure: copies of the model scale by their own gates."""
    (hidden,) = inputs  # [batch, tokens, units * unit_size]
    gates = dense.get_parameter(SEARCH_GATES)
    return hidden * gates.repeat_interleave(dense.in_features // len(gates)).to(hidden.dtype)


def encoder_layers(model: PreTrainedModel) -> Any:
    """
    The layers of a BERT.

    Raises:
        ValueError: if the model is none.
    """
    if model.config.model_type not in ("bert", "dynsparse_bert"):
        raise ValueError(f"Gates need a BERT. Got a model of type {model.config.model_type}. Use `bert`.")
    body: Any = model.base_model
    return body.encoder.layer


def _projections(layer: Any) -> Iterator[tuple[nn.Linear, int]]:
    """The projections that read heads and neurons, with how many there are."""
    yield layer.attention.output.dense, layer.attention.self.num_attention_heads
    yield layer.output.dense, layer.output.dense.in_features
