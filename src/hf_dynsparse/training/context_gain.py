"""
Context gain: by how many nats a masked language model beats the frequencies of pieces where it sees nothing but
context, and whether it has left the plateau on which it does not.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from .._transformers import EvalLoopOutput
from ..models.heads import predicting_labelled
from ..models.losses import IGNORED
from ..reports.facts import PLATEAU, seconds_so_far


logger = logging.getLogger(__name__)

GAIN = "eval_context_gain"
SMALL_VOCABULARY = 8192


def what_helps(config: Any, args: Any) -> str:
    """What takes a run of the model with this `config`, and with these training `args`, off the plateau sooner."""
    absolute = not any(getattr(config, name, None) for name in ("position_bias", "rope_parameters"))
    ways = {
        "a distance bias in attention (--distance_bias 1:0@0.7), for absolute positions hide the neighbours, or "
        "rotary positions (--model_type modernbert)": absolute and not getattr(args, "distance_bias", None),
        "small batches and a high rate (--recipe small)": getattr(args, "recipe", None) != "small",
        "a vocabulary of 8k or less": getattr(config, "vocab_size", 0) > SMALL_VOCABULARY,
        "more tokens": True,
    }
    return f"What helps: {'; '.join(way for way, is_left in ways.items() if is_left)}."


def log_frequencies(piece_counts: Any) -> torch.Tensor:
    """
    Logarithm of the share of each piece, each counted once more than it occurs: no piece is impossible.

    Args:
        piece_counts (tensor or array of shape `(vocab_size,)`): occurrences in the training text.

    Returns:
        `torch.Tensor` of shape `(vocab_size,)` and type float32.
    """
    counts = torch.as_tensor(piece_counts).double() + 1
    return (counts / counts.sum()).log().float()


def gains_by_row(
    logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], mask_token_id: int, log_frequencies: torch.Tensor
) -> torch.Tensor:
    """
    For each row of a batch the sum of `log p(piece | context) - log p(piece)` over the predicted positions that show
    `[MASK]`, and their number. Positions that show their own or a random piece do not count.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`, or `(labelled, vocab_size)`): of
            all positions, or of those with a label in reading order.
        inputs (`Mapping[str, torch.Tensor]`): `input_ids` and `labels` of shape `(batch_size, sequence_length)`.
        log_frequencies (`torch.Tensor` of shape `(vocab_size,)`): see [`log_frequencies`].

    Returns:
        `torch.Tensor` of shape `(batch_size, 2)`: nats and positions.
    """
    labelled = inputs["labels"] != IGNORED
    shown = labelled & (inputs["input_ids"] == mask_token_id)
    pieces = inputs["labels"][shown]
    chosen = logits[shown[labelled]] if logits.dim() == 2 else logits[shown]  # [positions, vocab_size]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    gains = -F.cross_entropy(chosen, pieces, reduction="none") - log_frequencies[pieces]
    by_position = gains.new_zeros(shown.shape).masked_scatter(shown, gains)
    return torch.stack([by_position.sum(1), shown.sum(1).to(gains.dtype)], 1)


def hits_by_row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    For each row of a batch how many of the predicted positions get their piece, and their number.

    Args:
        logits: as in [`gains_by_row`].
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`): the pieces.

    Returns:
        `torch.Tensor` of shape `(batch_size, 2)` and type float32.
    """
    labelled = labels != IGNORED
    found = (logits if logits.dim() == 2 else logits[labelled]).argmax(-1)  # [labelled]
    hits = torch.zeros_like(labels, dtype=torch.float32).masked_scatter(labelled, (found == labels[labelled]).float())
    return torch.stack([hits.sum(1), labelled.sum(1).float()], 1)


class ContextGainTrainer(Trainer):
    """
    [`~transformers.Trainer`] that adds `context_gain` and the `accuracy` at all predicted positions to the metrics of
    an evaluation, and computes logits at labelled positions only where nothing but the loss is asked for.
    """

    accelerator: Any
    state: Any
    _log_frequencies: torch.Tensor | None = None
    _gains: list[torch.Tensor] | None = None  # of the batches of this evaluation

    def _compare_with(self, piece_counts: Any) -> None:
        """Measure the gain over these counts from now on."""
        counts = torch.as_tensor(piece_counts)
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if counts.shape != (size,) or not bool((counts >= 0).all()):
            raise ValueError(
                "`piece_counts` must hold a count, 0 or more, for each entry of the model's vocabulary: shape "
                f"({size},). Got shape {tuple(counts.shape)}"
                f"{', some negative' if bool((counts < 0).any()) else ''}. "
                "Count with `count_pieces(..., size=model.config.vocab_size)`."
            )
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        mask_token_id = getattr(tokenizer, "mask_token_id", None)
        if mask_token_id is None:
            raise ValueError(
                "`piece_counts` is for models that predict what `[MASK]` hides. Got no tokenizer with a mask token. "
                "Give one as `processing_class`, or leave `piece_counts` out."
            )
        self._mask_token_id: int = mask_token_id
        self._log_frequencies = log_frequencies(counts).to(self.args.device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers, with `context_gain` and `accuracy` if the counts of pieces are known."""
        losses_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        model = self.accelerator.unwrap_model(self.model)
        self._gains, self._losses_only = [], losses_only
        try:
            with predicting_labelled(model) if losses_only else nullcontext():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            if self._gains:
                nats, positions, hits, labelled = torch.cat(self._gains).cpu().double().sum(0).tolist()
                if positions and output.metrics is not None:
                    output.metrics.setdefault(f"{metric_key_prefix}_accuracy", hits / labelled)
                    output.metrics[f"{metric_key_prefix}_context_gain"] = nats / positions
        finally:
            self._gains, self._losses_only = None, False
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in transformers; notes the gain and the hits of a batch of an evaluation."""
        if self._gains is None or self._log_frequencies is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out of `inputs`
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs["logits" if "logits" in outputs else "prediction_logits"]
        gains = gains_by_row(logits, given, self._mask_token_id, self._log_frequencies)
        rows = torch.cat([gains, hits_by_row(logits, given["labels"]).to(gains.dtype)], 1)  # [batch_size, 4]
        # Ranks may have batches of other lengths. What one repeats to fill its last batch is left out, as of losses.
        rows = self.accelerator.pad_across_processes(rows)
        self._gains.append(self.accelerator.gather_for_metrics(rows))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; says once that a run is on the plateau, and once that it has left."""
        super().log(logs, start_time)
        if GAIN not in logs or not self.state.global_step or not self.is_world_process_zero():
            return
        *earlier, now = (entry for entry in self.state.log_history if GAIN in entry and entry["step"])
        if any(entry[GAIN] >= PLATEAU for entry in earlier):
            return
        so_far = f"context gain {now[GAIN]:.2f} after {now['dynsparse/tokens'] / 1e6:.3g} M tokens"
        if now[GAIN] >= PLATEAU:
            logger.info("left the plateau of word frequencies: %s, %.3g s", so_far, seconds_so_far(now) or 0.0)
        elif not earlier:
            ways = what_helps(self.accelerator.unwrap_model(self.model).config, self.args)
            logger.info("still on the plateau of word frequencies: %s. %s", so_far, ways)


def plateau_left(log_history: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """
    `plateau_left_tokens` and `plateau_left_seconds`: what a run had done at its first evaluation with a gain of 0.1 or
    more. `None` if there was none.
    """
    found = next((entry for entry in log_history if entry.get(GAIN, 0.0) >= PLATEAU), None)
    return {
        "plateau_left_tokens": None if found is None else found["dynsparse/tokens"],
        "plateau_left_seconds": None if found is None else seconds_so_far(found),
    }
