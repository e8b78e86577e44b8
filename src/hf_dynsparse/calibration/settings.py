"""What calibrated pruning is given, and what of it is refused."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .selection import SELECTIONS
from .stages import Batch


BUDGETS = ("distribution", "error")


@dataclass(frozen=True)
class Calibration:
    """
    How a dense model is pruned by what passes through it.

    Args:
        batches (`Iterable[Mapping[str, torch.Tensor]]`): inputs of the model, such as a tokenizer returns, with an
            `attention_mask` where there is padding: that is left out. 512 ordinary sentences are enough.
        selection (`str`, defaults to `"admm"`): how blocks are chosen: `"admm"`, those of a layer together; or by
            what each is worth: `"surgeon"`, the error of the outputs that its removal causes when the rest is fitted
            anew; `"activation"`, the sum of `w²` times the variance of the inputs, which is cheap; or `"magnitude"`,
            the sum of `|w|`.
        steps (`int`, defaults to 4): by what each is worth, the number of blocks falls to its end in so many equal
            ratios, and what is left is fitted after each.
        ridge (`float`, defaults to 0.01): how strongly the fit holds on to the dense weights, as a share of the mean
            variance of the inputs.
        dense_share (`float`, defaults to 0.25): outputs are fitted to those of the dense layer for a mixture of the
            inputs of the dense model (this share of it) and of its own. At 0 the errors of the layers before go on as
            they are; at 1 they are made up for, but what cannot be is taken for noise, and the outputs fade.
        budget (`str`, defaults to `"distribution"`): how many blocks each layer keeps: what the `distribution` says,
            or by `"error"` between half and twice as many, so that the sum over layers of the lost shares of variance
            is least; that takes another pass.
        progress (`bool`, defaults to `True`): whether to show a bar, in a terminal.
        save_statistics (`str` or `Path`, *optional*): a new file for the statistics of the dense model.
        statistics (`str` or `Path`, *optional*): such a file, in the place of `batches`. Layers are then fitted to
            what the dense model reads, not the pruned one: nothing makes up for the errors of the layers before.

    Raises:
        ValueError: for a value out of range, or batches beside `statistics`.
        FileExistsError, FileNotFoundError: if there is a file of `save_statistics`, or none of `statistics`.

    Example:
        ```python
        >>> batches = [tokenizer(texts, padding=True, truncation=True, return_tensors="pt") for texts in ...]
        >>> model = sparsify_(model, sparsity=0.8, calibration=Calibration(batches, budget="error"))
        ```
    """

    batches: Iterable[Batch] = ()
    selection: str = "admm"
    steps: int = 4
    ridge: float = 0.01
    dense_share: float = 0.25
    budget: str = "distribution"
    progress: bool = True
    save_statistics: str | Path | None = None
    statistics: str | Path | None = None

    def __post_init__(self) -> None:
        for name, known in (("selection", SELECTIONS), ("budget", BUDGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}. Got {getattr(self, name)!r}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1. Got {self.steps}. 1 prunes in one go.")
        if not 0.0 <= self.ridge < math.inf:
            raise ValueError(f"`ridge` must be a number from 0 on. Got {self.ridge}. 0.01 is usual.")
        if not 0.0 <= self.dense_share <= 1.0:
            raise ValueError(f"`dense_share` must lie in [0, 1]. Got {self.dense_share}. 0.25 is usual.")
        if self.statistics is not None and (self.batches != () or self.save_statistics is not None):
            raise ValueError("`statistics` take the place of batches to calibrate by. Got both. Leave one out.")
        if self.statistics is not None and not Path(self.statistics).is_file():
            raise FileNotFoundError(f"`statistics` must be a file. Got {self.statistics}, which is none.")
        if self.save_statistics is not None and Path(self.save_statistics).exists():
            raise FileExistsError(f"`save_statistics` must name a new file. Got {self.save_statistics}.")


def check_batches(batches: Sequence[Batch], width: int) -> None:
    """
    Refuse batches that are no inputs of a model, and such as are too few.

    Args:
        width (`int`): inputs of the widest layer: a fit needs at least as many positions.

    Raises:
        ValueError: if they are.
    """
    positions = 0
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not any(map(torch.is_tensor, batch.values())):
            raise ValueError(
                "Each batch of `calibration` must be a dictionary of tensors, the arguments of the model. Got "
                f"{type(batch).__name__} as batch {number}. Give what a tokenizer returns for return_tensors='pt'."
            )
        first, mask = next(filter(torch.is_tensor, batch.values())), batch.get("attention_mask")
        if mask is None:
            positions += first.numel() // (first.shape[-1] if first.is_floating_point() else 1)
            continue
        if mask.is_floating_point() or mask.shape != first.shape[: mask.dim()]:
            raise ValueError(
                f"`attention_mask` must be whole numbers of the shape of the token ids. Got {mask.dtype} of shape "
                f"{tuple(mask.shape)} for {tuple(first.shape)} in batch {number}. Give that of the tokenizer."
            )
        positions += int((mask != 0).sum())
    if positions < width:
        raise ValueError(
            f"`calibration` must hold at least {width} tokens without padding, as the widest layer has inputs. "
            f"Got {positions} in {len(batches)} batches. Give more text: 512 sentences are usual; without any, the "
            "blocks of largest norm are kept (scripts: --calibration_samples 0)."
        )
