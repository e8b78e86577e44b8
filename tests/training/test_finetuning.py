"""Fine-tuning modes and recipes, and what is loaded for them."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_dynsparse import DynSparseBertForSequenceClassification, DynSparseTrainer, densify_, sparse_layers
from hf_dynsparse.blocks.sizes import count_active_blocks
from hf_dynsparse.data import glue_metrics
from hf_dynsparse.models.auto import load_pretrained, load_teacher, saved_sparsity
from hf_dynsparse.optim.recipes import FINETUNE_MODES
from hf_dynsparse.training.finetuning import (
    FinetuningArguments,
    center_head_,
    load_metric,
    prepare_finetuning_,
    set_final_sparsity_,
)
from hf_dynsparse.training.flags import FinetunedModelArguments, PrunedModelArguments
from tests.toy import TOY_SIZES, toy_batch, toy_model


@pytest.mark.parametrize(
    ("given", "sparsity", "gradual", "samples"),
    [
        (None, 0.8, False, 512),  # made sparse at once: by calibration
        (None, 0.8, True, 0),
        (None, None, False, 0),
        (0, 0.8, False, 0),
        (7, 0.8, False, 7),
        (0, None, True, 0),
    ],
)
def test_a_dense_model_is_pruned_by_calibration_unless_told_otherwise(given, sparsity, gradual, samples):
    arguments = PrunedModelArguments(calibration_samples=given)
    arguments.check_calibration(sparsity, {"--finetune_mode gradual": gradual})
    assert arguments.calibration_samples == samples
    assert arguments.calibrates_by_default is (given is None and samples > 0)
    assert not PrunedModelArguments.calibrates_by_default
    with pytest.raises(ValueError, match="Got 3 with no --sparsity"):
        PrunedModelArguments(calibration_samples=3).check_calibration(None, {"--finetune_mode gradual": gradual})


def test_a_model_that_teaches_itself_has_one_revision():
    asked = FinetunedModelArguments(model_name_or_path="user/model", model_revision="v2")
    assert [asked.hub_of_teacher(name)["revision"] for name in ("user/model", "user/other")] == ["v2", "main"]


def arguments(folder, **given):
    return FinetuningArguments(str(folder), use_cpu=True, report_to="none", save_strategy="no", **given)


def toy_classifier(**overrides):
    return toy_model(0, DynSparseBertForSequenceClassification, **overrides)


def rows(count=16):
    batch = toy_batch(count)
    return [{"input_ids": ids, "labels": int(ids[5] > 30)} for ids in batch["input_ids"]]


GRADUAL = {"gradual": {"final_sparsity": 0.9, "method": "prune_ofa"}}


@pytest.mark.parametrize("mode", FINETUNE_MODES)
def test_recipes(tmp_path, mode):
    args = arguments(tmp_path, finetune_mode=mode, **GRADUAL.get(mode, {}))
    model = prepare_finetuning_(toy_classifier(), args)
    assert (args.learning_rate, args.num_train_epochs) == (
        FINETUNE_MODES[mode].learning_rate,
        FINETUNE_MODES[mode].num_train_epochs,
    )
    assert bool(sparse_layers(model)) == (mode != "dense")
    ratio = FINETUNE_MODES[mode].learning_rate / FINETUNE_MODES["dense"].learning_rate
    assert mode in ("dense", "gradual") or 3 <= ratio <= 5


@pytest.mark.parametrize(
    ("mode", "sparsity", "rate"), [("locked", 0.5, 5e-4), ("dynamic", 0.5, 2e-4), ("locked", 0.0, 5e-5)]
)
def test_hidden_states_are_learned_at_a_higher_rate(tmp_path, mode, sparsity, rate):
    args = arguments(tmp_path, finetune_mode=mode, distillation_layers="all")
    prepare_finetuning_(toy_classifier(sparsity=sparsity), args)
    assert args.learning_rate == rate


def test_what_the_user_gives_stands(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-3, num_train_epochs=1)
    prepare_finetuning_(toy_classifier(), args)
    assert (args.learning_rate, args.num_train_epochs) == (1e-3, 1)


def test_a_dense_model_takes_the_dense_recipe(tmp_path):
    args = arguments(tmp_path)
    prepare_finetuning_(toy_classifier(sparsity=0.0), args)
    assert args.learning_rate == FINETUNE_MODES["dense"].learning_rate


@pytest.mark.parametrize("given", [{"num_topology_updates": 3}, {"topology_update_every": 2}, {"method": "rigl"}])
@pytest.mark.parametrize("mode", ["locked", "dense"])
def test_updates_without_dynamic(tmp_path, mode, given):
    with pytest.raises(ValueError, match=f"need `finetune_mode` dynamic. Got {mode}"):
        arguments(tmp_path, finetune_mode=mode, **given)


@pytest.mark.parametrize("mode", ["locked", "dense", "dynamic"])
def test_a_density_that_changes_without_gradual(tmp_path, mode):
    with pytest.raises(ValueError, match=f"needs `finetune_mode` gradual. Got {mode} with method prune_ofa"):
        arguments(tmp_path, finetune_mode=mode, method="prune_ofa")


def test_unknown_mode(tmp_path):
    with pytest.raises(ValueError, match="must be one of locked, dense, dynamic, gradual. Got 'frozen'"):
        arguments(tmp_path, finetune_mode="frozen")


@pytest.mark.parametrize("mode", FINETUNE_MODES)
def test_what_each_mode_does_to_the_topology(tmp_path, mode):
    given = {"num_train_epochs": 5, "kernel_tuning": "off", "disable_tqdm": True, **GRADUAL.get(mode, {})}
    args = arguments(tmp_path, finetune_mode=mode, **given)
    model = toy_classifier()
    before = {name: layer.block_index.clone() for name, layer in sparse_layers(model).items()}
    nonzero = {name: layer.to_dense() != 0 for name, layer in sparse_layers(model).items()}
    prepare_finetuning_(model, args)
    trainer = DynSparseTrainer(model, args, train_dataset=rows())
    trainer.train()
    moments = trainer.optimizer.state
    layers = sparse_layers(model)
    if mode == "dense":
        for name, active in nonzero.items():
            weight = model.get_submodule(name).weight
            assert (weight[~active] != 0).float().mean() > 0.5, name  # zeros train
            assert moments[weight]["exp_avg"].shape == weight.shape
    else:
        same = [torch.equal(layers[name].block_index, index) for name, index in before.items()]
        assert all(same) if mode == "locked" else not any(same)


def test_gradual_takes_the_method_of_prune_once_for_all(tmp_path):
    args = arguments(tmp_path, finetune_mode="gradual")
    settings = args.topology_settings()
    assert (args.method, settings.pruning_ratio, settings.hidden_copy) == ("prune_ofa", 0.0, True)
    assert arguments(tmp_path, finetune_mode="gradual", method="gmp").method == "gmp"
    set_final_sparsity_(args, 0.9)
    assert args.topology_settings().final_sparsity == 0.9
    with pytest.raises(ValueError, match="Got sparsity=0.8 and final_sparsity=0.9"):
        set_final_sparsity_(args, 0.8)
    with pytest.raises(ValueError, match="Got sparsity=None and final_sparsity=None"):
        set_final_sparsity_(arguments(tmp_path), None)
    with pytest.raises(ValueError, match="pruned in topology updates. Got sparsity=0.9"):
        set_final_sparsity_(arguments(tmp_path), 0.9)
    with pytest.raises(ValueError, match="Got one without sparse layers and final_sparsity=0.9"):
        prepare_finetuning_(toy_classifier(sparsity=0.0), args)


def test_load_pretrained_sparse(tmp_path):
    model = toy_classifier()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(AutoModelForSequenceClassification, str(tmp_path))
    assert type(loaded) is DynSparseBertForSequenceClassification
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    with pytest.raises(ValueError, match=r"is for dense checkpoints. Got 0.5 for .*, which is sparse"):
        load_pretrained(AutoModelForSequenceClassification, str(tmp_path), sparsity=0.5)
    with pytest.raises(ValueError, match="`block_size` needs a `sparsity`. Got block size 4 alone"):
        load_pretrained(AutoModelForSequenceClassification, str(tmp_path), block_size=4)


def test_load_pretrained_dense_bert(tmp_path):
    sizes = {name: value for name, value in TOY_SIZES.items() if name not in ("block_size", "sparsity")}
    dense = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))
    dense.save_pretrained(tmp_path)
    loaded = load_pretrained(
        AutoModelForSequenceClassification, str(tmp_path), sparsity=0.5, block_size=(1, 4), num_labels=2
    )
    assert type(loaded) is DynSparseBertForSequenceClassification
    layers = sparse_layers(loaded)
    assert {(layer.block_shape, layer.sparsity) for layer in layers.values()} == {((1, 4), 0.5)}
    for name, layer in layers.items():
        weight, kept = dense.get_submodule(name).weight, layer.to_dense() != 0
        assert torch.equal(layer.to_dense()[kept], weight[kept])
        assert weight[kept].abs().sum() > 0.6 * weight.abs().sum()


STOCK = {
    "bert": (BertForSequenceClassification, BertConfig, {"hidden_size": 32, "intermediate_size": 64}),
    "another": (DistilBertForSequenceClassification, DistilBertConfig, {"dim": 32, "hidden_dim": 64}),
}


@pytest.mark.parametrize("kind", STOCK)
def test_load_pretrained_with_all_blocks(tmp_path, kind):
    cls, config, sizes = STOCK[kind]
    heads, layers = ("num_attention_heads", "num_hidden_layers") if kind == "bert" else ("n_heads", "n_layers")
    dense = cls(config(vocab_size=64, max_position_embeddings=32, **sizes, **{heads: 2, layers: 2})).eval()
    dense.save_pretrained(tmp_path)
    given = {"sparsity": 0.9, "block_size": (1, 4), "all_blocks": True, "num_labels": 2}
    loaded = load_pretrained(AutoModelForSequenceClassification, str(tmp_path), **given).eval()
    assert len(sparse_layers(loaded)) == 12
    assert all(layer.nnzb == layer.num_blocks for layer in sparse_layers(loaded).values())
    ids = toy_batch()["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-6)
    args = arguments(tmp_path / "out", finetune_mode="gradual", max_steps=10, kernel_tuning="off", disable_tqdm=True)
    set_final_sparsity_(args, 0.9)
    DynSparseTrainer(prepare_finetuning_(loaded, args), args, train_dataset=rows()).train()
    for layer in sparse_layers(loaded).values():
        assert layer.nnzb == count_active_blocks(layer.num_blocks, 1 - 0.9)
    loaded.save_pretrained(tmp_path / "pruned")
    again = load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "pruned"))
    assert saved_sparsity(AutoConfig.from_pretrained(tmp_path / "pruned")) == 0.9
    assert torch.equal(again.eval()(ids).logits, loaded.eval()(ids).logits)
    # What is sparse already keeps its blocks, and is pruned further.
    load = partial(load_pretrained, AutoModelForSequenceClassification, str(tmp_path / "pruned"), all_blocks=True)
    further = load(sparsity=0.95)
    assert {name: layer.nnzb for name, layer in sparse_layers(further).items()} == {
        name: layer.nnzb for name, layer in sparse_layers(again).items()
    }
    with pytest.raises(ValueError, match="pruned further, to a higher `sparsity`. Got 0.9 for .*, which has 0.9"):
        load(sparsity=0.9)
    with pytest.raises(ValueError, match="is for dense checkpoints"):
        load(sparsity=0.95, block_size=4)


@pytest.mark.parametrize("kind", STOCK)
def test_load_pretrained_with_a_calibration(tmp_path, kind):
    cls, config, sizes = STOCK[kind]
    heads, layers = ("num_attention_heads", "num_hidden_layers") if kind == "bert" else ("n_heads", "n_layers")
    dense = cls(config(vocab_size=64, max_position_embeddings=32, **sizes, **{heads: 2, layers: 1})).eval()
    dense.save_pretrained(tmp_path)
    batch, given = toy_batch(32), {"sparsity": 0.5, "block_size": 4, "config": dense.config}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    load = partial(load_pretrained, AutoModelForSequenceClassification, str(tmp_path))
    wanted = dense.base_model(**inputs)[0]
    found = [load(**given, calibration=how) for how in (None, [inputs])]
    assert {layer.sparsity for model in found for layer in sparse_layers(model).values()} == {0.5}
    errors = [(model.eval().base_model(**inputs)[0] - wanted).norm() for model in found]
    assert errors[1] < 0.7 * errors[0]
    with pytest.raises(ValueError, match="Got sparsity=None and all_blocks=False"):
        load(calibration=[inputs])


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 0.1), ({"dropout": 0.3}, 0.3), ({"distillation_layers": "all"}, 0.0), ({"dropout": 0.0}, 0.0)],
)
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_dropout(tmp_path, given, expected, kind):
    """Of states and inside attention; what the configuration says stays."""
    if kind == "bert":
        model = toy_classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    else:
        config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2, seq_classif_dropout=0.1)
        model = DistilBertForSequenceClassification(config)
    before = model.config.to_dict()
    prepare_finetuning_(model, arguments(tmp_path, **given))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {expected}
    assert model.config.to_dict() == before
    batch = {name: x for name, x in toy_batch().items() if name != "labels"}
    model.train()
    with torch.no_grad():
        same = torch.equal(model(**batch).logits, model(**batch).logits)
    assert same == (expected == 0.0)


def test_dropout_is_a_probability(tmp_path):
    with pytest.raises(ValueError, match=r"`dropout` must lie in \[0, 1\). Got 1.0"):
        arguments(tmp_path, dropout=1.0)


def test_a_fresh_head_begins_at_the_mean():
    model = toy_classifier(num_labels=1)
    center_head_(model, [1.0, 2.0, 6.0])
    assert model.classifier.bias.tolist() == [3.0]
    center_head_(model, [1.0])  # it has been trained
    assert model.classifier.bias.tolist() == [3.0]
    classes = toy_classifier()
    center_head_(classes, [1.0])
    assert not classes.classifier.bias.any()


def test_a_densified_model_is_saved_dense(tmp_path):
    densify_(toy_classifier()).save_pretrained(tmp_path)
    loaded = load_pretrained(AutoModelForSequenceClassification, str(tmp_path))
    assert loaded.config.sparsity == 0.0


def test_a_teacher_without_its_head(tmp_path):
    toy_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model trained for this task. Got .*, which lacks .*classifier.weight"):
        load_teacher(AutoModelForSequenceClassification, str(tmp_path))


# The form of the script that `evaluate` loads, with the scores of scikit-learn under it.
METRIC = """
import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class Toy(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(kinds))

    def _compute(self, predictions, references):
        return {"f1": float(f1_score(references, predictions)), "accuracy": accuracy_score(references, predictions)}
"""


def test_evaluate_and_its_stand_in_agree(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.py").write_text(METRIC)
    found, truth = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]

    def fallback(**given):
        return glue_metrics("mrpc", **given)

    by_script = load_metric("glue", "mrpc", str(tmp_path / "toy"), fallback=None)
    assert not caplog.records
    with caplog.at_level("INFO", "hf_dynsparse"):
        by_fallback = load_metric("no/such-metric", "mrpc", fallback=fallback)
    assert "cannot load the metric no/such-metric/mrpc" in caplog.text
    assert by_fallback is fallback
    given = {"predictions": found, "references": truth}
    assert by_script(**given) == pytest.approx(by_fallback(**given)) == {"f1": 2 / 3, "accuracy": 0.6}


def test_a_metric_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_metric("glue", "mrpc", str(tmp_path / "nothing"), fallback=dict)
