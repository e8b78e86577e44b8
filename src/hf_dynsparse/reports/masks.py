"""What masked language models put in the place of a mask, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..checkpoints.loading import empty_model, load_model, load_tokenizer, pinned
from ..data.tokenizer_checks import check_fit, check_tokenizer, positions_of
from .model_card import TASKS, auto_class_of


MASK = "[MASK]"  # in a text it stands for the mask token of every tokenizer


class Guess(NamedTuple):
    """A piece of the vocabulary, and the probability that a model gives it."""

    piece: str
    probability: float


class FilledMask(NamedTuple):
    """
    One mask of a text.

    Args:
        text (`str`): with all its masks.
        number (`int`): which of them, from 1.
        guesses (`dict[str, list[Guess]]`): of each model, the likeliest first.
    """

    text: str
    number: int
    guesses: dict[str, list[Guess]]


def fill_masks(models: Mapping[str, str | Path], texts: Sequence[str], top: int = 3) -> list[FilledMask]:
    """
    The likeliest pieces at every mask of every text, by each of the models.

    Args:
        models (`Mapping[str, str | Path]`): name to folder, or repository of the Hub as `"user/name"` or
            `"user/name@revision"`: a masked language model, sparse or dense, with its tokenizer.
        texts (`Sequence[str]`): with `[MASK]`, or the mask token of the tokenizer, where a word is missing.
        top (`int`): pieces at each mask.

    Raises:
        ValueError: for a model that fills no masks or has no tokenizer of its own, and for a text without a mask or
            longer than the positions of a model; before any weights are read.
    """
    sources = {name: pinned(source) for name, source in models.items()}
    encoded = {name: _encode(source, texts, top) for name, source in sources.items()}
    found = {name: _fill(sources[name], *each, top) for name, each in encoded.items()}
    return [
        FilledMask(text, mask + 1, {name: guesses[place][mask] for name, guesses in found.items()})
        for place, text in enumerate(texts)
        for mask in range(len(next(iter(found.values()))[place]))
    ]


def mask_rows(filled: Sequence[FilledMask]) -> list[list[str]]:
    """A table: the headings, then a row for each mask with the guesses of every model."""
    several = {mask.text for mask in filled if mask.number > 1}
    rows = []
    for mask in filled:
        guesses = (", ".join(f"{piece} {share:.2f}" for piece, share in each) for each in mask.guesses.values())
        rows.append([f"{mask.text} (mask {mask.number})" if mask.text in several else mask.text, *guesses])
    return [["text", *filled[0].guesses], *rows]


def _encode(source: str, texts: Sequence[str], top: int) -> tuple[PreTrainedTokenizerBase, list[BatchEncoding]]:
    """The tokenizer of a model, and the texts as it takes them; all that can be wrong is found here."""
    model = empty_model(source)
    if TASKS.get(auto_class_of(model)) != "fill-mask":
        raise ValueError(
            f"Masks are filled by a masked language model. Got {source}, a {type(model).__name__}. Name the model "
            "that it was fine-tuned from, or another."
        )
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, ("mask",))
    if not 1 <= top <= model.config.vocab_size:
        raise ValueError(f"`top` must lie in [1, {model.config.vocab_size}], the vocabulary of {source}. Got {top}.")
    positions = positions_of(model.config) or torch.inf
    encoded = []
    for text in texts:
        inputs = tokenizer(text.replace(MASK, tokenizer.mask_token), return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if not (inputs["input_ids"] == tokenizer.mask_token_id).any():
            raise ValueError(f"A text must hold {MASK} where a word is missing. Got {text!r}. Put it in.")
        if length > positions:
            raise ValueError(f"A text must have at most {positions} tokens for {source}. Got {length}: shorten it.")
        check_fit(tokenizer, model.config, length)
        encoded.append(inputs)
    return tokenizer, encoded


@torch.inference_mode()
def _fill(
    source: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[BatchEncoding], top: int
) -> list[list[list[Guess]]]:
    """By text and mask."""
    model = load_model(source)
    found = []
    for inputs in texts:
        logits = model(**inputs)[0][inputs["input_ids"] == tokenizer.mask_token_id]  # [masks, vocabulary]
        best = logits.float().softmax(-1).topk(top)
        found.append(
            [
                [Guess(str(tokenizer.decode([piece])).strip(), share) for piece, share in zip(*each, strict=True)]
                for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    return found
