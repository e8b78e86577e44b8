"""Batches in which nothing is to be predicted: loss 0 with a graph, in every head, and nothing of them in a mean."""

import math

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseTrainer,
    sparsify_,
)
from tests.toy import CLS, SEP, UNK, toy_arguments, toy_batch, toy_collator, toy_examples, toy_model, toy_trainer


IDS = toy_batch()["input_ids"]
NONE, NO_CLASS = torch.full((4, 12), -100), torch.full((4,), -100)
OUTSIDE = torch.full((4,), 12)  # a position behind the last
UNKNOWN = {"input_ids": [CLS, *[UNK] * 6, SEP]}


HEADS = {
    "masked": (DynSparseBertForMaskedLM, {"labels": NONE}),
    "no items": (DynSparseBertForMaskedLM, {"labels": NONE, "num_items_in_batch": torch.tensor(0)}),
    "not one item": (DynSparseBertForMaskedLM, {"labels": NONE, "num_items_in_batch": 0}),
    "pre-training": (DynSparseBertForPreTraining, {"labels": NONE, "next_sentence_label": NO_CLASS}),
    "tokens": (DynSparseBertForTokenClassification, {"labels": NONE}),
    "spans": (DynSparseBertForQuestionAnswering, {"start_positions": OUTSIDE, "end_positions": OUTSIDE}),
    "sequences": (DynSparseBertForSequenceClassification, {"labels": NO_CLASS}),
    "choices": (DynSparseBertForMultipleChoice, {"labels": NO_CLASS}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_nothing_to_predict(head, training):
    cls, labels = HEADS[head]
    model = toy_model(cls=cls).train(training)
    ids = torch.stack([IDS, IDS], 1) if head == "choices" else IDS
    model(ids, **labels).loss.backward()
    assert model(ids, **labels).loss.item() == 0.0
    assert model(ids, **labels, return_dict=False)[0].item() == 0.0
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # All of them, or a rank of a distributed run would wait for ever; the first position is what poolers look at.
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(bool((gradient == 0).all()) for gradient in gradients.values())


@pytest.mark.parametrize("training", [True, False])
def test_one_half_of_a_loss(training):
    """What counts is as large as if the other half were not there."""
    pairs, spans = (toy_model(cls=cls) for cls in (DynSparseBertForPreTraining, DynSparseBertForQuestionAnswering))
    pairs.train(training), spans.train(training)
    for model in (pairs, spans):
        for module in model.modules():
            module.p = 0.0  # no dropout
    outputs = pairs(IDS, labels=NONE, next_sentence_label=torch.tensor([0, 1, 1, 0]))
    by_hand = -outputs.seq_relationship_logits.log_softmax(-1)[range(4), [0, 1, 1, 0]].mean()
    assert outputs.loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    outputs = spans(IDS, start_positions=torch.tensor([3, 99, 99, 1]), end_positions=OUTSIDE)
    by_hand = -outputs.start_logits.log_softmax(-1)[[0, 3], [3, 1]].mean() / 2
    assert outputs.loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        ({}, "labelled"),
        ({"gradient_accumulation_steps": 2}, "all"),
        ({"gradient_accumulation_steps": 2}, None),
        ({"label_smoothing_factor": 0.1}, None),
    ],
)
def test_a_run_over_unknown_words(given, positions, tmp_path):
    """Every second micro-batch, and a whole step at the end, holds no known word."""
    args = toy_arguments(
        tmp_path,
        per_device_train_batch_size=1,
        max_steps=6,
        num_topology_updates=2,
        train_sampling_strategy="sequential",
        **given,
        **({"distillation_positions": positions} if positions else {}),
    )
    teacher = toy_model(9, sparsity=0.0) if positions else None
    rows = [row for known in toy_examples(6) for row in (known, UNKNOWN)] + [UNKNOWN] * 2
    data = {"data_collator": toy_collator(), "train_dataset": rows[-6 * args.gradient_accumulation_steps :]}
    trainer = DynSparseTrainer(toy_model(), args, teacher=teacher, **data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    if positions != "all":
        assert losses[-1] == 0.0


def test_a_stock_head_in_a_run(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=40, pad_token_id=0, **sizes)
    model = sparsify_(RobertaForMaskedLM(config), block_size=4, sparsity=0.5)
    trainer = DynSparseTrainer(model, toy_arguments(tmp_path), data_collator=toy_collator())
    loss = trainer.compute_loss(model.train(), toy_collator()([UNKNOWN]))
    loss.backward()
    assert loss.item() == 0.0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_an_evaluation_leaves_them_out(tmp_path):
    trainer = toy_trainer(tmp_path, per_device_eval_batch_size=1)
    known = toy_examples(3)
    wanted = trainer.evaluate(known)["eval_loss"]
    assert trainer.evaluate([known[0], UNKNOWN, *known[1:]])["eval_loss"] == pytest.approx(wanted, rel=1e-6)
