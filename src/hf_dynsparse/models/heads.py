"""
Heads and the rest of a transformers model: what starts afresh, what may become sparse, what FLOP counts cover, and
where a head predicts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import Any

from torch import nn
from transformers import Conv1D, PreTrainedModel

from ..nn.linear import LinearLayer


# Poolers, and the heads of models that have no base model. Not "*head*": attention is "multi_head_attention" in CTRL,
# and its projections are "q_head" in Funnel.
HEADS_IN_BODY = (
    "*pooler*",
    "*classifier*",
    "*classification_head*",
    "*lm_head*",
    "*qa_outputs*",
    "head.*",
    "*.head.*",
)

# Dense inside a body too: embeddings and their projections, routers.
DENSE_IN_BODY = (*HEADS_IN_BODY, "*embed*", "*_gate", "*.gate")


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor or module of `model` belongs to its head or a pooler, which another task starts afresh."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = name.removeprefix(prefix)
    return not name.startswith(prefix) or any(fnmatchcase(inner, pattern) for pattern in HEADS_IN_BODY)


def body_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """
    The modules of `model` by name, in module order, without heads, poolers and embeddings. A head is what stands
    outside the base model of the architecture, whatever its name.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix)
        and module is not head
        and not any(fnmatchcase(name.removeprefix(prefix), pattern) for pattern in DENSE_IN_BODY)
    }


@contextmanager
def predicting_labelled(model: Any) -> Iterator[None]:
    """
    While evaluating inside, a masked language model of this package gives logits at labelled positions only, of shape
    `(labelled, vocab_size)` in reading order: the same loss to rounding, at a fraction of the head's cost. Any other
    model stays as it is.
    """
    if not hasattr(model, "sparse_evaluation"):
        yield
        return
    model.sparse_evaluation = True
    try:
        yield
    finally:
        model.sparse_evaluation = False


def body_linears(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers between embeddings and head by name, sparse ones among them."""
    kinds = nn.Linear | Conv1D | LinearLayer
    return {name: module for name, module in body_modules(model).items() if isinstance(module, kinds)}


def stack_name(model: PreTrainedModel) -> str:
    """What the names of all linear layers of the body begin with, such as `"bert.encoder.layer."`."""
    return commonprefix(list(body_linears(model))).rpartition(".")[0] + "."
