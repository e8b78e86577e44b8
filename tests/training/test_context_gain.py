"""Nats over the frequencies of pieces where `[MASK]` is shown: by hand, of every kind of model, and over a run."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from hf_dynsparse import DynSparseBertForPreTraining, DynSparseTrainer, sparsify_
from hf_dynsparse.training.context_gain import (
    GAIN,
    gains_by_row,
    hits_by_row,
    log_frequencies,
    plateau_left,
    what_helps,
)
from tests.toy import CLS, MASK, PAD, SEP, toy_arguments, toy_collator, toy_examples, toy_model, toy_trainer


COUNTS = torch.arange(64) ** 2
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}


def test_by_hand() -> None:
    """Four pieces and `[MASK]`: two positions show it, one shows its own piece and one another."""
    frequencies = log_frequencies([5, 2, 0, 0, 0])  # shares 6/12, 3/12, and three of 1/12
    labels = torch.tensor([[0, 2, -100, 1], [-100, -100, 1, -100]])
    ids = torch.tensor([[4, 4, 4, 1], [0, 1, 3, 2]])
    inputs = {"labels": labels, "input_ids": ids}
    row = torch.tensor([1 / 4, 1 / 4, 3 / 8, 1 / 8, 1e-30]).log()
    logits = (row + 7).expand(2, 4, 5)
    expected = [[math.log(1 / 4 / (6 / 12)) + math.log(3 / 8 / (1 / 12)), 2.0], [0.0, 0.0]]
    for given in (logits, logits[labels != -100], logits.double(), logits.bfloat16()):
        rows = gains_by_row(given, inputs, 4, frequencies)
        rounding = 0.1 if given.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(rows.float(), torch.tensor(expected), atol=rounding, rtol=0)
        assert hits_by_row(given, labels).tolist() == [[1.0, 3.0], [0.0, 1.0]]  # the third piece is the likeliest


def test_frequencies_gain_nothing(tmp_path: Path) -> None:
    model = toy_model()
    with torch.no_grad():
        norm = model.cls.predictions.transform.LayerNorm
        norm.weight.zero_(), norm.bias.zero_()
        model.cls.predictions.bias.copy_(log_frequencies(COUNTS))
    assert trainer_of(tmp_path, model).evaluate()[GAIN] == pytest.approx(0.0, abs=1e-6)


def trainer_of(folder: Path, model: Any, **settings: Any) -> DynSparseTrainer:
    rows = [{**row, "next_sentence_label": 0} for row in toy_examples(7, seed=1)]
    if not isinstance(model, DynSparseBertForPreTraining):
        rows = [{"input_ids": row["input_ids"][: 16 - 2 * i]} for i, row in enumerate(rows)]  # of many lengths
    return DynSparseTrainer(
        model,
        toy_arguments(folder, **settings),
        piece_counts=COUNTS,
        data_collator=toy_collator(),
        eval_dataset=rows,
    )


def modernbert(**settings: Any) -> Any:
    torch.manual_seed(0)
    tokens = {"pad_token_id": PAD, "cls_token_id": CLS, "bos_token_id": CLS, "sep_token_id": SEP, "eos_token_id": SEP}
    config = ModernBertConfig(**SIZES, **tokens, num_hidden_layers=1, attn_implementation="sdpa", **settings)
    return sparsify_(ModernBertForMaskedLM(config), block_size=4, sparsity=0.5)


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=40, pad_token_id=PAD)
    return RobertaForMaskedLM(config)


MODELS = {
    "sparse": (toy_model, True),
    "all positions while training": (lambda: toy_model(sparse_prediction=False), False),
    "pairs": (lambda: toy_model(cls=DynSparseBertForPreTraining), True),
    "ModernBERT": (modernbert, True),
    "stock": (roberta, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_labelled_positions_are_enough(tmp_path: Path, name: str) -> None:
    """Whatever the batch, the gain is the mean over all masked positions, and the loss is the same."""
    make, leaves_out = MODELS[name]
    model = make()
    rows: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: rows.append(logits.numel() // logits.shape[-1]))

    labelled = trainer_of(tmp_path, model).evaluate()
    quick = sum(rows)
    rows.clear()
    whole = trainer_of(tmp_path, model)
    whole.compute_metrics = lambda results: {"scored": 1.0}
    everywhere = whole.evaluate()
    assert (quick < sum(rows) / 2) == leaves_out
    for metric in ("eval_loss", "eval_accuracy", GAIN):
        assert labelled[metric] == pytest.approx(everywhere[metric], rel=1e-6), metric
    logits = whole.predict(whole.eval_dataset).predictions
    assert (logits[0] if isinstance(logits, tuple) else logits).shape == (7, 16, 64)  # for a user nothing has changed
    for size in (1, 7):
        metrics = trainer_of(tmp_path, model, per_device_eval_batch_size=size).evaluate()
        assert metrics[GAIN] == pytest.approx(labelled[GAIN], rel=1e-5)
        assert metrics["eval_accuracy"] == labelled["eval_accuracy"]


def test_a_model_that_always_leaves_out(tmp_path: Path) -> None:
    one, other = (trainer_of(tmp_path, modernbert(sparse_prediction=on)).evaluate()[GAIN] for on in (False, True))
    assert one == pytest.approx(other, rel=1e-6)


def test_masks_and_labels_are_what_counts(tmp_path: Path) -> None:
    """By hand over a whole evaluation, smoothed labels or not."""
    for smoothing in (0.0, 0.1):
        trainer = trainer_of(tmp_path, toy_model(), label_smoothing_factor=smoothing)
        batch = toy_collator()(trainer.eval_dataset)
        shown = (batch["labels"] != -100) & (batch["input_ids"] == MASK)
        with torch.no_grad():
            chances = trainer.model.eval()(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
        over = chances - ((COUNTS + 1.0) / (COUNTS + 1.0).sum()).log()
        gains = [float(over[row, column, batch["labels"][row, column]]) for row, column in shown.nonzero()]
        assert trainer.evaluate()[GAIN] == pytest.approx(sum(gains) / len(gains), rel=1e-5)


def test_without_counts_there_is_no_gain(tmp_path: Path) -> None:
    assert GAIN not in toy_trainer(tmp_path).evaluate()


@pytest.mark.parametrize(
    ("counts", "said"),
    [(COUNTS[1:], r"shape \(64,\). Got shape \(63,\)"), (-COUNTS, r"Got shape \(64,\), some negative")],
)
def test_counts_that_do_not_fit(tmp_path: Path, counts: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynSparseTrainer(toy_model(), toy_arguments(tmp_path), piece_counts=counts, data_collator=toy_collator())


def test_no_mask_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Got no tokenizer with a mask token"):
        DynSparseTrainer(toy_model(), toy_arguments(tmp_path), piece_counts=COUNTS, data_collator=dict)


class Scripted(DynSparseTrainer):
    """Its gain is what the test says."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs[GAIN] = {0: 0.5, 2: 0.03, 4: 0.07, 6: 0.2, 8: 0.05, 10: 0.4}[self.state.global_step]
        super().log(logs, start_time)


@pytest.mark.parametrize(
    ("config", "given", "left"),
    [
        ({"vocab_size": 30522}, {}, ["distance bias", "--recipe small", "8k", "tokens"]),
        ({"vocab_size": 8192}, {"recipe": "small", "distance_bias": "1"}, ["tokens"]),
        ({"rope_parameters": {"a": 1}}, {"recipe": "paper"}, ["--recipe small", "tokens"]),
        ({"position_bias": "alibi"}, {"recipe": "small"}, ["tokens"]),
    ],
)
def test_only_what_a_run_does_not_do_yet_can_help(config: dict, given: dict, left: list[str]) -> None:
    said = what_helps(SimpleNamespace(**config), SimpleNamespace(**given))
    assert [word for word in ("distance bias", "--recipe small", "8k", "tokens") if word in said] == left


def test_leaving_the_plateau_is_said_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(seed: int, resume: Path | None = None) -> tuple[Scripted, list[str]]:
        caplog.clear()
        settings = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
        trainer = Scripted(
            toy_model(seed),
            toy_arguments(tmp_path, **settings, save_steps=4, metric_for_best_model="context_gain"),
            data_collator=toy_collator(),
            train_dataset=toy_examples(24),
            eval_dataset=toy_examples(2),
        )
        with caplog.at_level(logging.INFO, "hf_dynsparse.training.context_gain"):
            trainer.train(resume and str(resume))
        return trainer, [text for text in caplog.messages if "plateau of word" in text]

    straight, (still, left) = run(0)
    assert "still on the plateau of word frequencies: context gain 0.03 after 0.000128 M tokens. What helps: " in still
    assert "left the plateau of word frequencies: context gain 0.20 after 0.000384 M tokens, " in left
    assert plateau_left(straight.state.log_history)["plateau_left_tokens"] == 6 * 64
    assert straight.state.best_global_step == 10
    for step, said in ((4, [left]), (8, [])):
        resumed, texts = run(1, tmp_path / f"checkpoint-{step}")
        assert [text.partition(",")[0] for text in texts] == [text.partition(",")[0] for text in said]
        assert plateau_left(resumed.state.log_history)["plateau_left_tokens"] == 6 * 64


def test_a_run_that_stays_on_the_plateau() -> None:
    entry = {"step": 1, GAIN: 0.09, "dynsparse/tokens": 10, "dynsparse/tokens_per_second": 2.0}
    assert plateau_left([entry, {"loss": 1.0}]) == {"plateau_left_tokens": None, "plateau_left_seconds": None}
    assert plateau_left([entry, {**entry, GAIN: 0.1}]) == {"plateau_left_tokens": 10, "plateau_left_seconds": 5.0}
