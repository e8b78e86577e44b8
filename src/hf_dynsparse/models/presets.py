"""Sizes for a model to be trained from scratch: the family of BERTs, in the words of other architectures."""

from math import lcm
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..blocks.sizes import as_block_shape
from ..data.tokenizer_checks import OFFSET_POSITIONS, vocabulary_size
from .bert.configuration_dynsparse_bert import PRESETS, DynSparseBertConfig
from .fresh import sparse_from_config


# What an architecture calls a field of BERT's, where its configuration does not know that name itself.
RENAMED = {
    "distilbert": {
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
}


def encoder_preset(
    model_type: str, preset: str, block_size: int | tuple[int, int] = 16, overrides: str | None = None
) -> PretrainedConfig:
    """
    The configuration of a dense encoder of any architecture with the layers, width, heads and dropout of the BERT of
    that name, and room for 512 tokens.

    A ModernBERT keeps its own dropout, none, and 8,192 tokens; its gated units are two thirds as many, so that a layer
    is as big as BERT's, and its first weights have a standard deviation of `1 / sqrt(width)`.

    Args:
        model_type (`str`): such as `"modernbert"`, `"roberta"`, `"electra"` or `"distilbert"`.
        preset (`str`): tiny, mini, small, medium, base or large.
        block_size (`int` or `tuple[int, int]`): of the sparse model: it divides the number of gated units.
        overrides (`str`, *optional*): other fields, such as `"num_hidden_layers=6,local_attention=64"`.

    Raises:
        ValueError: for an architecture without a masked-language-modelling head or with other fields, a preset that
            there is not, or a field that does not fit.
    """
    if preset not in PRESETS:
        raise ValueError(f"`--preset` must be one of {', '.join(PRESETS)}. Got {preset!r}.")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(
            f"`--model_type` must be an architecture of transformers. Got {model_type!r}. Choose for instance "
            "modernbert, roberta, electra or distilbert."
        ) from error
    check_encoder(default, f"--model_type {model_type}")
    bert: Any = DynSparseBertConfig.preset(preset, sparsity=0.0)
    sizes = {
        name: getattr(bert, name)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    }
    fields = {"hidden_dropout_prob": bert.hidden_dropout_prob, **sizes}
    fields["attention_probs_dropout_prob"] = bert.attention_probs_dropout_prob
    fields["embedding_size"] = bert.hidden_size  # of ELECTRA, as in its larger models
    if model_type in OFFSET_POSITIONS:
        fields["max_position_embeddings"] = 514
    if model_type == "modernbert":
        step = lcm(16, *as_block_shape(block_size))
        fields["intermediate_size"] = max(1, round(bert.intermediate_size * 2 / 3 / step)) * step
        fields["sparse_prediction"] = True
    renamed = {RENAMED.get(model_type, {}).get(name, name): value for name, value in fields.items()}
    known = {*default.to_dict(), *default.attribute_map}
    lacking = [name for name in sizes if RENAMED.get(model_type, {}).get(name, name) not in known]
    if lacking:
        raise ValueError(
            f"`--preset` gives sizes to architectures whose configuration has them by the names of BERT's. Got "
            f"{model_type}, which has no {', '.join(lacking)}. Write its configuration to a folder, and give that as "
            "--config_name."
        )
    given = {name: value for name, value in renamed.items() if name in known}
    config = overridden(AutoConfig.for_model(model_type, **given), overrides, given)
    if model_type == "modernbert" and "initializer_range" not in (overrides or ""):
        config.initializer_range = config.hidden_size**-0.5
    return config


def overridden(config: PretrainedConfig, overrides: str | None, given: dict[str, Any] | None = None) -> Any:
    """
    `config` with other fields, such as `"num_hidden_layers=6"`, and checked again.

    Args:
        given (`dict`, *optional*): what `config` was made from: what follows from that is made anew, such as the kinds
            of layers. By default all fields but those of `overrides` stay.

    Raises:
        ValueError: for a field that there is not, or a value that does not fit.
    """
    if not overrides:
        return config
    config.update_from_string(overrides)
    names = [pair.partition("=")[0] for pair in overrides.split(",")]
    changed = {name: getattr(config, name) for name in names}
    if given is None:
        return type(config).from_dict(config.to_dict())
    return AutoConfig.for_model(config.model_type, **{**given, **changed})


def check_encoder(config: PretrainedConfig, source: str) -> None:
    """
    Raises:
        ValueError: for a configuration whose architecture is no encoder with a masked-language-modelling head, or of a
            saved sparse or quantised model of transformers.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"A fresh encoder needs the configuration of a dense one. Got {source} with a `quantization_config`. "
            "Take that out of its config.json, and give its sparsity and block size."
        )
    if type(config) not in AutoModelForMaskedLM._model_mapping or config.is_encoder_decoder:
        raise ValueError(
            f"Masked language modelling needs an encoder with a head for it. Got {source}, a {config.model_type}. "
            "Choose for instance modernbert, roberta, electra or distilbert."
        )


def tell_vocabulary_(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the configuration of a fresh encoder the size of a vocabulary, and the ids of the tokens that it names."""
    config.vocab_size, config.pad_token_id = vocabulary_size(tokenizer), tokenizer.pad_token_id
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = {"cls": cls, "sep": sep, "bos": cls, "eos": sep, "mask": tokenizer.mask_token_id}
    for name, id in ids.items():
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", id)


def preset_model(model_type: str, preset: str, vocab_size: int, **how: Any) -> PreTrainedModel:
    """
    A fresh sparse model of a preset, with a head for masked language modelling.

    Args:
        how: sparsity, block size and distribution, where given.
    """
    if model_type == DynSparseBertConfig.model_type:
        ours = DynSparseBertConfig.preset(preset, vocab_size=vocab_size, **how)
        return AutoModelForMaskedLM.from_config(ours)
    config: Any = encoder_preset(model_type, preset, how.get("block_size", 16))
    config.vocab_size, config.pad_token_id = vocab_size, 0
    if how.get("sparsity") == 0:
        return AutoModelForMaskedLM.from_config(config)
    return sparse_from_config(AutoModelForMaskedLM, config, **how)


def preset_on_meta(model_type: str, preset: str, vocab_size: int, **how: Any) -> PreTrainedModel:
    """[`preset_model`] on the meta device: for its sizes."""
    with torch.device("meta"):
        return preset_model(model_type, preset, vocab_size, **how)
