"""Whether a tokenizer has what is needed of it, and whether a model takes what comes out of it."""

from collections.abc import Collection

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .files import DataError


NAMES = {"cls": "classification", "sep": "separator", "mask": "mask", "pad": "padding"}
# Architectures that number positions from the one after padding.
OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}
    | {"xlm-roberta-xl", "xmod"}
)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Entries that a model needs: the highest id and one. Ids with gaps make it more than there are tokens."""
    return max([*tokenizer.get_vocab().values(), *tokenizer.all_special_ids], default=-1) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, needed: Collection[str]) -> None:
    """
    Refuse a tokenizer without a token that is needed.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): whatever it is.
        needed (`Collection[str]`): of `"cls"`, `"sep"`, `"mask"`, `"pad"`.

    Raises:
        ValueError: naming those that it lacks.
    """
    missing = [name for name in NAMES if name in needed and getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise DataError(
            f"The tokenizer must have a {', a '.join(NAMES[name] for name in needed)} token. Got "
            f"{_name_of(tokenizer)} without {', '.join(f'{name}_token' for name in missing)}. "
            "Set it in tokenizer_config.json, or name another tokenizer."
        )


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def check_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse a tokenizer that has a classification token and does not put it in front of a text: a model would take the
    first word for it.

    Raises:
        ValueError: for such a one.
    """
    cls = tokenizer.cls_token_id
    if cls is not None and cls not in tokenizer("a")["input_ids"]:
        raise DataError(
            f"The tokenizer must add its special tokens to a text. Got {_name_of(tokenizer)}, which leaves out "
            f"{tokenizer.cls_token}: it has no post-processor. Give it one (`tokenizers.processors`), or name another."
        )


def check_fit(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_seq_length: int,
    who: str = "The model",
    pairs: bool = False,
) -> None:
    """
    Refuse sequences that a model would look up beyond the end of one of its tables.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): makes the sequences.
        config ([`PretrainedConfig`]): of the model.
        max_seq_length (`int`): most tokens of a sequence.
        who (`str`): what to call the model in an error.
        pairs (`bool`): whether sequences consist of two texts.

    Raises:
        ValueError: for ids, positions or types of tokens that the model does not have.
    """
    check_positions(config, max_seq_length, who)
    size, entries = vocabulary_size(tokenizer), getattr(config, "vocab_size", None)
    if entries is not None and size > entries:
        raise DataError(
            f"The ids of the tokenizer must lie in the vocabulary of the model. Got {size - 1} as the highest of "
            f"{_name_of(tokenizer)}. {who} has {entries} entries: name its own tokenizer."
        )
    types = getattr(config, "type_vocab_size", 0)
    if pairs and types and "token_type_ids" in tokenizer.model_input_names:
        highest = max(tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"])
        if highest >= types:
            raise DataError(
                f"The types of tokens must be known to the model. Got {highest} for the second of two texts. {who} "
                f"has `type_vocab_size` {types}: name its own tokenizer, or another model."
            )


def check_positions(config: PretrainedConfig, max_seq_length: int, who: str = "The model") -> None:
    """
    Refuse sequences longer than the model was made for.

    Raises:
        ValueError: with the length that it takes.
    """
    positions = positions_of(config)
    if positions is not None and max_seq_length > positions:
        raise DataError(
            f"`--max_seq_length` must not exceed the positions of the model. Got {max_seq_length}. {who} has "
            f"{positions}: give --max_seq_length {positions}, or less."
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence; `None` if positions are relative and have no end."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in OFFSET_POSITIONS:
        return positions - (config.pad_token_id or 0) - 1
    return positions
