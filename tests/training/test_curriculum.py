"""Schedules of sequence length and masking rate: by hand, against the collator, in a run; and recipes."""

from types import SimpleNamespace

import pytest
import torch

from hf_dynsparse import DynSparseTrainer, flops_per_sequence
from hf_dynsparse.data.pretraining import TextArguments
from hf_dynsparse.training.curriculum import Curriculum, parse_lengths, parse_rates, shorten, thin
from hf_dynsparse.training.finetuning import FinetuningArguments
from hf_dynsparse.training.recipes import (
    PRENORM_RATES,
    TOPOLOGY,
    recipe_defaults,
    scaled_lengths,
    set_first_weights_,
    set_learning_rates_,
)
from hf_dynsparse.training.summary import summarize_run
from tests.toy import MASK, toy_arguments, toy_collator, toy_config, toy_examples, toy_model, toy_trainer


def test_sequences_are_cut_in_their_order():
    ids = torch.arange(16).reshape(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids + 100}
    cut = shorten(batch, 4, full=8)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(cut["labels"], cut["input_ids"] + 100)
    assert cut["attention_mask"].shape == (4, 4)
    assert shorten(batch, 8, full=8) is batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1] * 8, [1] * 7 + [0]])}, "without padding.* Got padding. Pack the text"),
        ({"next_sentence_label": torch.zeros(2)}, r"Got the column\(s\) \['next_sentence_label'\]"),
        ({"input_ids": torch.ones(2, 6)}, r"must end with the length of the sequences. Got 8 for .* \(2, 6\)"),
    ],
)
def test_what_cannot_be_cut(change, message):
    with pytest.raises(ValueError, match=message):
        shorten({"input_ids": torch.ones(2, 8), **change}, 4, full=8)


def test_masks_are_taken_back_by_hand():
    # Words of a first row: a (draw 0.1), b b (0.2), c (0.25, not selected at any rate so far as labels say), special.
    batch = {
        "input_ids": torch.tensor([[MASK, 8, MASK, 9, 3], [MASK, 5, 6, 7, 3]]),
        "labels": torch.tensor([[7, 11, 12, -100, -100], [4, -100, -100, -100, -100]]),
        "mask_draws": torch.tensor([[0.1, 0.2, 0.2, 0.25, 2.0], [0.24, 0.6, 0.7, 0.8, 2.0]], dtype=torch.float64),
    }
    thinned = thin(dict(batch), 0.2)
    assert thinned.keys() == {"input_ids", "labels"}
    assert thinned["labels"].tolist() == [[7, -100, -100, -100, -100], [4, -100, -100, -100, -100]]  # the least stays
    assert thinned["input_ids"].tolist() == [[MASK, 11, 12, 9, 3], [MASK, 5, 6, 7, 3]]


@pytest.mark.parametrize("whole_word_mask", [True, False])
@pytest.mark.parametrize("rate", [0.4, 0.15, 0.02])
def test_masks_are_those_of_the_collator_at_that_rate(whole_word_mask, rate):
    examples = [*toy_examples(64), {"input_ids": [2, 3, 3]}, {"input_ids": [2, 7, 50, 3]}]
    collator = toy_collator(whole_word_mask=whole_word_mask)
    drawing = Curriculum(rates=(0.4, 0.1)).collator(collator)
    collator.set_epoch(3)  # of both
    collator.mlm_probability = rate
    wanted, reached = collator(examples), Curriculum(rates=(rate, rate))(drawing(examples), 0.5)
    assert reached.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(reached[name], tensor), name


def test_stages_and_rates():
    curriculum = Curriculum(parse_lengths("32:0.3,64:0.6,128"), parse_rates("0.3:0.15"))
    assert [curriculum.length(step / 10) for step in range(10)] == [32] * 3 + [64] * 3 + [128] * 4
    assert curriculum.shares(8, 10, 128) == {32: 3 / 8, 64: 3 / 8, 128: 2 / 8}
    assert [round(curriculum.rate(step / 10), 3) for step in (0, 5, 10)] == [0.3, 0.225, 0.15]
    assert parse_rates("0.3") == (0.3, 0.3)
    assert Curriculum(parse_lengths("128")).length(0.0) == 128


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *((length, "such as 32:0.5,128") for length in ("32:0.5", "32,128", "a:0.5,128", "32:0.5:1,128")),
        *((length, "the shares must rise") for length in ("32:0.5,64:0.4,128", "32:0,128", "32:1,128")),
        *((length, "each length must divide the last") for length in ("48:0.5,128", "0:0.5,128")),
    ],
)
def test_lengths_that_cannot_be(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=f"`seq_length_schedule` must be .*{message}.* Got '{wrong}'"):
        toy_arguments(tmp_path, seq_length_schedule=wrong)


@pytest.mark.parametrize("wrong", ["0.3:0.2:0.1", "0.3:", "1.5:0.15", "0.3:0"])
def test_rates_that_cannot_be(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"`mlm_probability_schedule` must be .* Got '{wrong}'"):
        toy_arguments(tmp_path, mlm_probability_schedule=wrong)


def test_a_collator_without_draws_is_refused(tmp_path):
    args = toy_arguments(tmp_path, mlm_probability_schedule="0.3:0.1")
    with pytest.raises(ValueError, match="needs the draws of a `DataCollatorForWholeWordMasking`. Got a function"):
        DynSparseTrainer(toy_model(), args, data_collator=lambda rows: {}, train_dataset=toy_examples(4))


@pytest.mark.parametrize("schedule", [{"seq_length_schedule": "8:0.5,16"}, {"mlm_probability_schedule": "0.3"}])
def test_schedules_are_not_for_finetuning(tmp_path, schedule):
    with pytest.raises(ValueError, match=f"`{next(iter(schedule))}` is for pre-training .* Leave it out"):
        FinetuningArguments(output_dir=str(tmp_path), **schedule)


def test_text_that_is_not_packed_is_refused():
    curriculum = Curriculum(parse_lengths("64:0.5,128"))
    curriculum.check_text(TextArguments())
    for flag in ("line_by_line", "nsp", "pad_to_max_length"):
        with pytest.raises(ValueError, match=f"without padding. Got --{flag}"):
            curriculum.check_text(TextArguments(**{flag: True}))
    with pytest.raises(ValueError, match="must be --max_seq_length. Got 128 and 64"):
        curriculum.check_text(TextArguments(max_seq_length=64))


def test_a_run_with_both(tmp_path, monkeypatch):
    """Shapes, masks, tokens and FLOPs of its steps; evaluation is as without."""
    seen = []
    step = DynSparseTrainer.training_step

    def watch(self, model, inputs, *rest, **kwargs):
        assert inputs.keys() == {"input_ids", "attention_mask", "labels"}
        seen.append((tuple(inputs["input_ids"].shape), int((inputs["labels"] != -100).sum())))
        return step(self, model, inputs, *rest, **kwargs)

    monkeypatch.setattr(DynSparseTrainer, "training_step", watch)
    schedules = {"seq_length_schedule": "4:0.25,8:0.5,16", "mlm_probability_schedule": "0.6:0.1"}
    trainer = toy_trainer(tmp_path, **schedules)
    without = toy_trainer(tmp_path).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == without
    trainer.train()
    shapes, labels = zip(*seen, strict=True)
    assert shapes == ((16, 4),) * 3 + ((8, 8),) * 3 + ((4, 16),) * 6
    assert sum(labels[:3]) > 2 * sum(labels[-3:]) > 0
    trainer.save_model()
    summary = summarize_run(trainer, trainer.evaluate(), seq_len=16)
    assert (summary["tokens"], summary["steps"]) == (12 * 4 * 16, 12)
    for name, config in (("flops", toy_config()), ("dense_flops", toy_config(sparsity=0))):
        parts = (3 * 16 * flops_per_sequence(config, 4), 3 * 8 * flops_per_sequence(config, 8))
        assert summary[name] == pytest.approx(sum(parts) + 6 * 4 * flops_per_sequence(config, 16))
    assert summary["arguments"].items() >= schedules.items()


def test_the_rate_is_constant_until_the_last_fifth(tmp_path):
    trainer = toy_trainer(
        tmp_path,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"decay_type": "linear"},
        warmup_steps=2,
    )
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(20, optimizer)
    rates = [scheduler.lr_lambdas[0](step) for step in range(21)]
    assert rates == pytest.approx([0, 0.5, *[1] * 14, 1, 0.75, 0.5, 0.25, 0])
    trainer.lr_scheduler, trainer.args.lr_scheduler_kwargs = None, {"num_decay_steps": 10}
    assert trainer.create_scheduler(20, optimizer).lr_lambdas[0](15) == pytest.approx(0.5)  # half of a cosine


def test_recipes_give_way_to_what_is_given():
    small = recipe_defaults({}, 128)
    assert small["recipe"] == "small"
    assert (small["seq_length_schedule"], small["mlm_probability_schedule"]) == ("64:0.5,128", "0.3")
    assert (small["max_steps"], small["prune_score"]) == (2000, "weight_gradient")
    assert recipe_defaults({"method": "rigl", "time_budget": "8h"}, 128).keys().isdisjoint((*TOPOLOGY, "max_steps"))
    assert "distance_bias" not in recipe_defaults({"model_type": "modernbert"}, 128)  # its positions are rotary
    assert scaled_lengths("32:0.25,64:0.5,128", 64) == "16:0.25,32:0.5,64"
    assert (small["max_steps"], small["prune_score"]) == (2000, "weight_gradient")
    assert recipe_defaults({"method": "rigl", "time_budget": "8h"}, 128).keys().isdisjoint((*TOPOLOGY, "max_steps"))
    assert "distance_bias" not in recipe_defaults({"model_type": "modernbert"}, 128)  # its positions are rotary
    assert scaled_lengths("32:0.25,64:0.5,128", 66) is None
    assert "seq_length_schedule" not in recipe_defaults({"nsp": True}, 128)
    assert "mlm_probability_schedule" not in recipe_defaults({"mlm_probability": 0.2}, 128)
    for given in ({"lr_scheduler_type": "cosine"}, {"learning_rate_rewinding": True}):
        assert not recipe_defaults(given, 128).keys() & {"lr_scheduler_type", "lr_scheduler_kwargs"}
    assert recipe_defaults({"recipe": "paper"}, 128) == {"recipe": "paper"}
    assert recipe_defaults({"model_name_or_path": "runs/dense"}, 128) == {"recipe": "paper"}
    with pytest.raises(ValueError, match="`--recipe` must be small or paper. Got 'large'"):
        recipe_defaults({"recipe": "large"}, 128)


def test_first_weights_and_rates_of_a_recipe():
    config = toy_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    set_first_weights_(config, "paper", None, 0.9)
    assert (config.initializer_range, config.hidden_dropout_prob) == (0.02, 0.1)
    set_first_weights_(config, "small", "hidden_dropout_prob=0.1, hidden_size=32", 0.95)
    assert config.initializer_range == pytest.approx(32**-0.5)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.0)
    config.hidden_size = 250
    set_first_weights_(config, "small", None, 0.0)
    assert config.initializer_range == pytest.approx(0.02)
    for sparsity, rate, rest in ((0.95, 8e-3, None), (0.9, 8e-3, None), (0.5, 1.6e-3, 8e-3), (0.0, 8e-4, 8e-3)):
        args = SimpleNamespace(recipe="small", learning_rate=None, dense_learning_rate=None)
        set_learning_rates_(args, toy_model(hidden_size=64, sparsity=sparsity, block_size=2), "mini")
        assert (args.learning_rate, args.dense_learning_rate) == (pytest.approx(rate), rest)
    rates = [PRENORM_RATES.of_matrices(density) for density in (1.0, 0.1, 0.05)]
    assert rates == pytest.approx([1e-3, 6e-3, 6e-3])


def test_a_dense_model_has_a_rate_for_what_a_sparse_one_has_dense(tmp_path):
    model = toy_model(sparsity=0.0)
    trainer = toy_trainer(tmp_path, model, learning_rate=1e-3, dense_learning_rate=1e-2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    slow = {name for name, rate in rates.items() if rate == 1e-3}
    assert slow == {name for name in rates if ".layer." in name and name.endswith("weight") and "Norm" not in name}
    assert set(rates.values()) == {1e-3, 1e-2}
