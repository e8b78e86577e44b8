"""Easy first: short sequences and many masks at the start of a run, acting on a batch at a known step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.collators import DRAWS, IGNORED


LENGTHS = "`seq_length_schedule` must be lengths and shares of the run, such as 32:0.5,128 (the last without a share)"
UNCUT = ("line_by_line", "nsp", "pad_to_max_length")  # flags of text with padding, or with two segments
RATES = "`mlm_probability_schedule` must be rates in (0, 1] of the start and the end, such as 0.3:0.15, or one rate"


@dataclass(frozen=True)
class Curriculum:
    """
    What becomes of the batches of a run. A pure function of a batch and the share of the run that is done: workers
    that work ahead, ranks and resuming do not change it.

    Args:
        lengths (`tuple[tuple[int, float], ...]`): tokens per sequence, and the share of the run until which they hold;
            empty to leave batches as they are.
        rates (`tuple[float, float]`, *optional*): share of words to predict, at the start and the end of the run.
    """

    lengths: tuple[tuple[int, float], ...] = ()
    rates: tuple[float, float] | None = None

    @classmethod
    def of(cls, args: Any) -> "Curriculum":
        """
        That of training arguments.

        Raises:
            ValueError: for a schedule that cannot be read, or that cannot be.
        """
        lengths, rates = args.seq_length_schedule, args.mlm_probability_schedule
        return cls(parse_lengths(lengths) if lengths else (), parse_rates(rates) if rates else None)

    def length(self, progress: float) -> int:
        """Tokens per sequence when the share `progress` of the run is done."""
        return next(length for length, until in self.lengths if progress < until or until == 1.0)

    def rate(self, progress: float) -> float:
        """Share of words to predict when the share `progress` of the run is done."""
        first, last = self.rates or (0.0, 0.0)
        return first + (last - first) * progress

    def shares(self, steps: int, max_steps: int, seq_len: int) -> dict[int, float]:
        """Which share of `steps` steps, of a run of `max_steps`, had which tokens per sequence; else `seq_len`."""
        if not self.lengths or not steps:
            return {seq_len: 1.0}
        taken = [self.length(step / max_steps) for step in range(steps)]
        return {length: taken.count(length) / steps for length, _ in self.lengths}

    def collator(self, collator: Any) -> Any:
        """
        What makes the batches of training: a collator with the masks of the highest rate, and their draws.

        Raises:
            ValueError: for a collator that cannot give its draws.
        """
        if self.rates is None:
            return collator
        if not hasattr(collator, "with_draws"):
            raise ValueError(
                "`mlm_probability_schedule` needs the draws of a `DataCollatorForWholeWordMasking`. Got a "
                f"{type(collator).__name__}. Give that as `data_collator`, or leave the schedule out."
            )
        return collator.with_draws(max(self.rates))

    def __call__(self, batch: Mapping[str, torch.Tensor], progress: float) -> dict[str, torch.Tensor]:
        """
        The batch for the step after the share `progress` of the run.

        Raises:
            ValueError: for a batch that cannot be cut: not of the last length, padded, or with other columns.
        """
        given = dict(batch)
        if self.rates is not None:
            given = thin(given, self.rate(progress))
        return shorten(given, self.length(progress), self.lengths[-1][0]) if self.lengths else given

    def check_text(self, text: Any) -> None:
        """
        Refuse lengths that do not fit the flags of the text, before anything is read.

        Args:
            text ([`~hf_dynsparse.data.pretraining.TextArguments`]): those flags.

        Raises:
            ValueError: naming the flag.
        """
        if not self.lengths:
            return
        for flag in UNCUT:
            if getattr(text, flag):
                raise ValueError(
                    f"`--seq_length_schedule` cuts packed text without padding. Got --{flag}. Leave one of them out."
                )
        if self.lengths[-1][0] != text.max_seq_length:
            raise ValueError(
                f"The last length of `--seq_length_schedule` must be --max_seq_length. Got {self.lengths[-1][0]} and "
                f"{text.max_seq_length}. Make them one."
            )


def parse_lengths(schedule: str) -> tuple[tuple[int, float], ...]:
    """
    `"32:0.5,128"` as `((32, 0.5), (128, 1.0))`: 32 tokens until half of the run, then 128.

    Raises:
        ValueError: for another form, shares that do not rise in (0, 1), or a length that does not divide the last.
    """
    *before, last = schedule.split(",")
    try:
        pairs = [(int(length), float(until)) for length, until in (stage.split(":") for stage in before)]
        stages = (*pairs, (int(last), 1.0))
    except ValueError:
        raise ValueError(f"{LENGTHS}. Got {schedule!r}. Write it like that.") from None
    untils = [0.0, *(until for _, until in stages)]
    if not all(a < b for a, b in zip(untils, untils[1:], strict=False)):
        raise ValueError(f"{LENGTHS}, and the shares must rise between 0 and 1. Got {schedule!r}. Put them in order.")
    if any(length < 1 or stages[-1][0] % length for length, _ in stages):
        raise ValueError(f"{LENGTHS}, and each length must divide the last. Got {schedule!r}. Choose divisors.")
    return stages


def parse_rates(schedule: str) -> tuple[float, float]:
    """
    `"0.3:0.15"` as `(0.3, 0.15)`: from 0.3 at the start of the run to 0.15 at its end; `"0.3"` is constant.

    Raises:
        ValueError: for another form, or a rate out of (0, 1].
    """
    try:
        rates = [float(rate) for rate in schedule.split(":")]
    except ValueError:
        rates = []
    if len(rates) not in (1, 2) or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"{RATES}. Got {schedule!r}. Write it like that.")
    return rates[0], rates[-1]


def thin(batch: dict[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
    """
    Put back the tokens of words whose draw is not under `rate`: what is left are the masks that the collator makes at
    this rate. A row keeps the word of its least draw.

    Args:
        batch (`dict[str, torch.Tensor]`): with `input_ids`, `labels` and the draws, all of shape
            `(batch_size, sequence_length)`.

    Returns:
        `dict[str, torch.Tensor]`: without the draws.
    """
    draws, labels = batch.pop(DRAWS), batch["labels"]
    back = (draws >= rate) & (draws > draws.amin(1, keepdim=True)) & (labels != IGNORED)
    return batch | {
        "input_ids": torch.where(back, labels, batch["input_ids"]),
        "labels": labels.masked_fill(back, IGNORED),
    }


def shorten(batch: dict[str, torch.Tensor], length: int, full: int) -> dict[str, torch.Tensor]:
    """
    Cut sequences of `full` tokens into pieces of `length`, in their order.

    Raises:
        ValueError: for sequences of another length, with padding, or columns that are not of tokens.
    """
    shape = batch["input_ids"].shape
    if shape[1:] != (full,):
        raise ValueError(
            f"`seq_length_schedule` must end with the length of the sequences. Got {full} for a batch of shape "
            f"{tuple(shape)}. Give text that is packed to that length."
        )
    if length == full:
        return batch
    others = [name for name, tensor in batch.items() if tensor.shape != shape]
    mask = batch.get("attention_mask")
    if others or (mask is not None and not mask.all()):
        raise ValueError(
            f"`seq_length_schedule` cuts packed text without padding, all columns of tokens. Got "
            f"{f'the column(s) {others}' if others else 'padding'}. Pack the text, or leave the schedule out."
        )
    return {name: tensor.reshape(-1, length) for name, tensor in batch.items()}  # [batch * full / length, length]
