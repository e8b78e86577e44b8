"""Distillation: the loss by hand, the rows that are compared, and its place in the Trainer."""

import math

import pytest
import torch
from transformers import AutoModel, DistilBertConfig, GPT2Config, LlamaConfig
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseTrainer,
)
from hf_dynsparse.training.distillation import Distillation, distillation_loss
from hf_dynsparse.training.hidden_states import hidden_state_loss, hidden_states_loss
from hf_dynsparse.training.relations import relation_loss
from tests.toy import toy_arguments, toy_batch, toy_collator, toy_examples, toy_model


# Keys and values are narrower than queries.
LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


def test_two_classes_by_hand():
    # Temperature 2 halves the logits: the teacher says 3 : 1, the student 1 : 1.
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(by_hand, rel=1e-6)


def test_regression_is_a_squared_difference():
    loss = distillation_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.5]]), 2.0)
    assert loss.tolist() == [9.0, 0.25]


class Echo(torch.nn.Module):
    """A teacher that answers with what it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {})()

    def forward(self, input_ids=None, attention_mask=None):
        assert not torch.is_grad_enabled()
        return self.answer


def loss_of(distillation, inputs, outputs, *items):
    return distillation.loss(inputs, outputs, distillation.answers(inputs), *items)


@pytest.fixture
def logits():
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([[-100, 1, -100], [2, -100, 3]])


@pytest.mark.parametrize("masked_only", [True, False])
def test_masked_language_modelling_compares_labelled_positions(logits, masked_only):
    student = torch.zeros(2, 3, 5)
    teacher = Distillation(Echo(MaskedLMOutput(logits=logits)))
    given = student[LABELS != -100] if masked_only else student
    rows = distillation_loss(torch.zeros(3, 5), torch.stack([logits[0, 1], logits[1, 0], logits[1, 2]]))
    outputs = MaskedLMOutput(logits=given)
    assert loss_of(teacher, {"labels": LABELS}, outputs) == pytest.approx(float(rows.mean()), rel=1e-6)
    assert loss_of(teacher, {"labels": LABELS}, outputs, 12) == pytest.approx(float(rows.sum()) / 12, rel=1e-6)
    means = teacher.take_means()
    assert means == {"distillation_loss": pytest.approx(float(rows.mean() + rows.sum() / 12) / 2, rel=1e-6)}
    assert teacher.take_means() == {}


def test_all_real_tokens(logits):
    teacher = Distillation(Echo(MaskedLMOutput(logits=logits)), positions="all")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rows = distillation_loss(torch.zeros(5, 5), torch.cat([logits[0], logits[1, :2]]))
    outputs, given = MaskedLMOutput(logits=torch.zeros(2, 3, 5)), {"labels": LABELS, "attention_mask": mask}
    assert loss_of(teacher, given, outputs) == pytest.approx(float(rows.mean()), rel=1e-6)
    # Three labels of twelve are in this micro-batch: a quarter of its mean.
    assert loss_of(teacher, given, outputs, 12) == pytest.approx(float(rows.mean()) / 4, rel=1e-6)
    del given["attention_mask"]
    every = distillation_loss(torch.zeros(6, 5), logits.flatten(0, 1))
    assert loss_of(teacher, given, outputs) == pytest.approx(float(every.mean()), rel=1e-6)
    sequence = SequenceClassifierOutput(logits=logits[:, 1])
    whole = Distillation(Echo(SequenceClassifierOutput(logits=logits[:, 0])), positions="all")
    expected = distillation_loss(logits[:, 1], logits[:, 0]).mean()
    assert loss_of(whole, {"labels": torch.tensor([0, 1])}, sequence) == pytest.approx(float(expected), rel=1e-6)


def test_at_all_tokens_the_student_predicts_them_too(tmp_path):
    args, teacher = toy_arguments(tmp_path, distillation_positions="all"), toy_model(9, sparsity=0.0)
    student = toy_model().train()
    trainer = DynSparseTrainer(student, args, teacher=teacher)
    batch = toy_batch()
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    distilled = distillation_loss(outputs.logits[real], wanted[real]).mean()
    assert loss.item() == pytest.approx((0.5 * outputs.loss + 0.5 * distilled).item(), rel=1e-6)
    assert student.config.sparse_prediction  # what the run asked for does not stay


def test_spans_leave_padding_out(logits):
    spans = logits[:, :, 0], logits[:, :, 1]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    teacher = Distillation(Echo(QuestionAnsweringModelOutput(start_logits=spans[0], end_logits=spans[1])))
    zeros = QuestionAnsweringModelOutput(start_logits=torch.zeros(2, 3), end_logits=torch.zeros(2, 3))
    expected = [
        distillation_loss(torch.zeros(1, length), part[row : row + 1, :length])
        for part in spans
        for row, length in ((0, 3), (1, 2))
    ]
    assert loss_of(teacher, {"attention_mask": mask}, zeros) == pytest.approx(
        float(torch.cat(expected).mean()), rel=1e-5
    )


def test_sequences(logits):
    teacher = Distillation(Echo(SequenceClassifierOutput(logits=logits[:, 0])))
    loss = loss_of(teacher, {"labels": torch.tensor([0, 1])}, SequenceClassifierOutput(logits=logits[:, 1]))
    assert loss == pytest.approx(float(distillation_loss(logits[:, 1], logits[:, 0]).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        ([1, -1, -1], [[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]], [1, 0, 1]),
        ([2.5, math.nan, -1.0], [[0.5], [4.5], [9.0]], [2.5, 4.5, -1.0]),
    ],
)
def test_the_teacher_labels_rows_without_a_label(labels, given, expected):
    teacher = Distillation(Echo(SequenceClassifierOutput(logits=torch.tensor(given))))
    inputs = {"input_ids": torch.zeros(3, 2, dtype=torch.long), "labels": torch.tensor(labels)}
    completed = teacher.completed(inputs, teacher.answers(inputs))
    assert completed["labels"].tolist() == expected
    assert completed["input_ids"] is inputs["input_ids"]
    assert math.isnan(inputs["labels"][1]) or inputs["labels"][1] == -1


def test_a_teacher_in_bfloat16(tmp_path):
    """Its answers are near, and its weights what they were; the student computes as before."""
    teacher = toy_model(cls=DynSparseBertForSequenceClassification)
    inputs = {"input_ids": torch.arange(5, 35).view(3, 10) % 40, "labels": torch.tensor([0, 1, 0])}
    exact, rounded = (
        Distillation(teacher, layers="all", dtype=dtype).answers(inputs) for dtype in ("float32", "bfloat16")
    )
    assert rounded["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(rounded["logits"].float(), exact["logits"], rtol=0.05, atol=0.02)
    torch.testing.assert_close(rounded["hidden_states"][-1].float(), exact["hidden_states"][-1], rtol=0.05, atol=0.1)
    assert not torch.equal(rounded["logits"].float(), exact["logits"])
    assert next(teacher.parameters()).dtype == torch.float32
    args = toy_arguments(tmp_path, teacher_dtype="bfloat16")
    trainer = DynSparseTrainer(toy_model(cls=DynSparseBertForSequenceClassification), args, teacher=teacher)
    assert trainer.distillation.dtype == torch.bfloat16


def test_hidden_states_by_hand():
    # Of the teacher's states the variances are 4 and 1, then 16; the last token is padding.
    teacher = torch.tensor([[[4.0, 0.0], [1.0, 3.0]], [[8.0, 0.0], [9.0, 9.0]]])
    student = torch.tensor([[[4.0, 2.0], [1.0, 2.0]], [[4.0, 4.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    first, second = (4 / 2 / 4 + 1 / 2 / 1) / 2, 32 / 2 / 16
    assert float(hidden_state_loss(student, teacher, mask)) == pytest.approx((first + second) / 2)
    assert float(hidden_state_loss(student[:1], teacher[:1])) == pytest.approx(first)
    choices = [states.view(2, 1, 2, 2).flatten(0, 1) for states in (student, teacher)]
    assert float(hidden_state_loss(*choices, mask.view(2, 1, 2))) == pytest.approx((first + second) / 2)
    own_mean = teacher.mean(-1, keepdim=True).expand_as(teacher)
    assert float(hidden_state_loss(own_mean, teacher, mask)) == pytest.approx(1.0)


def test_layers_that_are_compared():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 3, 4, generator=draw) for _ in range(4)] for _ in range(2))
    each = [float(hidden_state_loss(*pair)) for pair in zip(ours, theirs, strict=True)]
    assert float(hidden_states_loss(ours, theirs, "all")) == pytest.approx(sum(each[1:]) / 3)
    assert float(hidden_states_loss(ours, theirs, "0,2")) == pytest.approx((each[0] + each[2]) / 2)


def test_relations_by_hand():
    # One relation head of width 4, so products are halved. The teacher's two tokens are orthogonal, of products
    # 2 ln 3: each relates to itself 3 : 1. The student's are equal: 1 : 1. The third token is padding.
    length = math.sqrt(2 * math.log(3.0))
    teacher = torch.tensor([[[length, 0.0, 0.0, 0.0], [0.0, length, 0.0, 0.0], [9.0] * 4]])
    student = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [-7.0, 7.0]]])  # another width
    mask = torch.tensor([[1, 1, 0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(relation_loss(student, teacher, 1, mask)) == pytest.approx(by_hand, rel=1e-6)
    assert float(relation_loss(student[:, :2], teacher[:, :2], 1)) == pytest.approx(by_hand, rel=1e-6)
    # Heads are averaged: of the teacher's first half a token relates to itself 3^sqrt(2) : 1, of its second 1 : 1.
    # To the second token the halves are the other way round.
    first = 3 ** math.sqrt(2) / (3 ** math.sqrt(2) + 1)
    wide = torch.stack([torch.tensor([length, 0, 0, 0]), torch.tensor([0, 0, 0, length])])[None]
    heads = (math.log(2) + first * math.log(first) + (1 - first) * math.log(1 - first)) / 2
    assert float(relation_loss(torch.zeros(1, 2, 2), wide, 2)) == pytest.approx(heads, rel=1e-5)
    # Each sequence counts alike, however long it is.
    two = torch.cat([teacher, teacher.flip(1)]), torch.cat([student, student.flip(1)])
    both = relation_loss(two[1], two[0], 1, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    assert float(both) == pytest.approx(by_hand / 2, rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_relations_of_models_of_two_widths(tmp_path, compiled):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, teacher = toy_model(**still), toy_model(9, sparsity=0.0, hidden_size=64, num_hidden_layers=3)
    batch, parts = toy_batch(), []
    states = [
        each.eval()(**batch, output_hidden_states=True).hidden_states[layer]
        for each, layer in ((model, 1), (teacher, 2))
    ]
    for name in ("query", "key", "value"):
        layers = (each.bert.encoder.layer[layer].attention.self for each, layer in ((model, 1), (teacher, 2)))
        both = (getattr(layer, name)(state) for layer, state in zip(layers, states, strict=True))
        parts.append(relation_loss(*both, 4, batch["attention_mask"]).item())
    alone = model(**batch).loss.item()
    how = {"distillation_relations": "2:3", "distillation_relation_heads": 4, "distillation_relations_weight": 2.0}
    trainer = DynSparseTrainer(model, toy_arguments(tmp_path, distillation_weight=0.0, **how), teacher=teacher)
    trained = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        loss = trainer.compute_loss(trained.train(), batch)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(alone + 2 * sum(parts), rel=1e-5)
    assert trainer.distillation.take_means()["distillation_relations_loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(alone, rel=1e-5)  # the task's


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2), "attention.q_lin"),
        (LlamaConfig(**LLAMA), "self_attn.q_proj"),
    ],
)
def test_relations_of_other_architectures(config, attention):
    model, teacher = AutoModel.from_config(config), AutoModel.from_config(config)
    distillation = Distillation(teacher, relations="last")
    distillation.check_student(model)
    batch = {name: x for name, x in toy_batch().items() if name != "labels"}
    answers = distillation.answers(batch)
    ((weight, loss),) = distillation.on_top(batch, model(**batch), answers)
    loss.backward()
    moved = [name for name, parameter in model.named_parameters() if f"1.{attention}" in name and parameter.grad.any()]
    assert weight == 1
    assert moved


@pytest.mark.parametrize(
    ("layers", "heads", "error"),
    [
        ("3", None, "must be at most 2, as DynSparseBertForMaskedLM has attentions. Got 3"),
        ("2", 5, "must divide the width of queries, keys and values. Got 5 for 32"),
    ],
)
def test_relations_that_models_lack(layers, heads, error):
    with pytest.raises(ValueError, match=error):
        Distillation(toy_model(1), relations=layers, relation_heads=heads).check_student(toy_model())
    fused = AutoModel.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=40))
    with pytest.raises(ValueError, match="layers of their own. Got GPT2Model, which has none"):
        Distillation(fused, relations="last").check_student(fused)


def test_relations_want_gradients(tmp_path):
    model, teacher = (toy_model(seed, DynSparseBertForSequenceClassification) for seed in (0, 9))
    model.bert.requires_grad_(False)
    trainer = DynSparseTrainer(model, toy_arguments(tmp_path, distillation_relations="last"), teacher=teacher)
    with pytest.raises(ValueError, match="need gradients of queries, keys and values"):
        trainer.compute_loss(model.train(), toy_batch() | {"labels": torch.tensor([0, 1, 1, 0])})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"relations": "first"}, "must name a layer: last, .*Got 'first'"),
        ({"relations": "0"}, "must name a layer: last, .*Got '0'"),
        ({"relations_weight": 0.0}, "must be positive. Got 0.0"),
        ({"relation_heads": 0}, "must be at least 1. Got 0"),
        ({"layers": "1,x"}, "must be all, or a list such as 2,4,6. Got '1,x'"),
        ({"layers_weight": 0.0}, "must be positive. Got 0.0"),
        ({"weight": 1.5}, r"must lie in \[0, 1\]. Got 1.5"),
        ({"temperature": 0.0}, "must be positive. Got 0.0"),
        ({"positions": "some"}, "must be one of labelled, all. Got 'some'"),
    ],
)
def test_bad_arguments(arguments, error, tmp_path):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^`{name}` {error}"):
        Distillation(torch.nn.Linear(2, 2), **arguments)
    with pytest.raises(ValueError, match=f"^`distillation_{name}` {error}"):
        toy_arguments(tmp_path, **{f"distillation_{name}": value for name, value in arguments.items()})


def test_a_teacher_of_another_vocabulary(tmp_path):
    teacher = toy_model(1, vocab_size=99)
    with pytest.raises(ValueError, match="the same `vocab_size`. Got 99 and 64"):
        DynSparseTrainer(toy_model(), toy_arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize(
    ("layers", "sizes", "error"),
    [
        ("all", {"hidden_size": 64}, "the same `hidden_size`. Got 64 and 32"),
        ("all", {"num_hidden_layers": 3}, "the same `num_hidden_layers`. Got 3 and 2"),
        ("1,4", {}, "must be at most 2, as the models have layers. Got 1,4"),
    ],
)
def test_a_teacher_of_other_layers(tmp_path, layers, sizes, error):
    with pytest.raises(ValueError, match=error):
        DynSparseTrainer(
            toy_model(), toy_arguments(tmp_path, distillation_layers=layers), teacher=toy_model(1, **sizes)
        )


def test_a_teacher_that_was_named_only(tmp_path):
    with pytest.raises(ValueError, match="'somewhere': load that model"):
        DynSparseTrainer(toy_model(), toy_arguments(tmp_path, teacher="somewhere"))
    for name, given in (("distillation_layers", "all"), ("distillation_relations", "last")):
        with pytest.raises(ValueError, match=f"`{name}` are learned from a `teacher`. Got '{given}' and none"):
            DynSparseTrainer(toy_model(), toy_arguments(tmp_path, **{name: given}))


def masked_trainer(folder, **arguments):
    teacher = toy_model(9, sparsity=0.0)
    return DynSparseTrainer(
        toy_model(),
        toy_arguments(folder, **arguments),
        teacher=teacher,
        data_collator=toy_collator(seed=3),
        train_dataset=toy_examples(24),
        eval_dataset=toy_examples(6),
    )


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_training_moves_towards_the_teacher(tmp_path):
    trainer = masked_trainer(tmp_path, distillation_weight=1.0, max_steps=30)
    before = [parameter.clone() for parameter in trainer.distillation.teacher.parameters()]
    trainer.train()
    distance = losses(trainer, "dynsparse/distillation_loss")
    assert distance[-1] < 0.5 * distance[0]
    assert losses(trainer) == pytest.approx(distance, rel=1e-4)  # weight 1: nothing else is in the loss
    assert all(torch.equal(x, y) for x, y in zip(before, trainer.distillation.teacher.parameters(), strict=True))
    # Evaluation measures the task: at weight 1 nothing was learned from the labels.
    assert trainer.evaluate()["eval_loss"] > 3


@pytest.mark.parametrize("cls", [DynSparseBertForMaskedLM, DynSparseBertForPreTraining])
def test_weight_zero_is_training_without_a_teacher(tmp_path, cls):
    def run(teacher, **arguments):
        model = toy_model(0, cls)
        trainer = DynSparseTrainer(model, toy_arguments(tmp_path, **arguments), teacher=teacher)
        batch = toy_batch()
        if cls is DynSparseBertForPreTraining:
            batch["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
        model.train()
        return trainer.compute_loss(model, batch).detach()

    teacher = toy_model(9, cls)
    assert float(run(teacher, distillation_weight=0.0)) == pytest.approx(float(run(None)), rel=1e-6)
    assert float(run(teacher, distillation_weight=0.5)) != pytest.approx(float(run(None)), rel=1e-3)


def test_accumulation_equals_one_batch(tmp_path):
    """Rows hold different numbers of masked tokens, so a mean of means would show."""
    short = {"max_steps": 3, "num_topology_updates": 1, "distillation_layers": "all", "distillation_relations": "last"}
    whole = masked_trainer(tmp_path / "one", per_device_train_batch_size=8, **short)
    parts = masked_trainer(tmp_path / "two", gradient_accumulation_steps=4, per_device_train_batch_size=2, **short)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for what in ("layers", "relations"):
        one, other = (losses(trainer, f"dynsparse/distillation_{what}_loss") for trainer in (whole, parts))
        assert other == pytest.approx(one, rel=1e-5)
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (DynSparseBertForSequenceClassification, {"labels": torch.tensor([0, 1, 1, 0])}),
        (
            DynSparseBertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 2, 5, 6])},
        ),
    ],
)
def test_other_heads(tmp_path, cls, labels):
    model, teacher = toy_model(0, cls), toy_model(9, cls, sparsity=0.0)
    args = toy_arguments(tmp_path, distillation_weight=1.0, distillation_layers="all", distillation_layers_weight=2.0)
    trainer = DynSparseTrainer(model, args, teacher=teacher)
    batch = {name: x for name, x in toy_batch().items() if name != "labels"} | labels
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    assert float(loss.detach()) > 0
    means = trainer.distillation.take_means()
    assert float(loss.detach()) == pytest.approx(means["distillation_loss"] + 2 * means["distillation_layers_loss"])
    assert all(layer.grad is not None for name, layer in model.named_parameters() if name.endswith("values"))
    twin = toy_model(9, cls, sparsity=0.0)  # a student that agrees with its teacher has nothing to learn
    assert float(trainer.compute_loss(twin.train(), batch).detach()) == pytest.approx(0.0, abs=1e-6)
