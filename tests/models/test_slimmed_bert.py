"""BERTs whose layers have numbers of heads and neurons of their own: dense and sparse, built, saved, trained."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertForMaskedLM

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    densify_,
    estimate_run,
    export_dense,
    flops_per_sequence,
    inference_flops_per_sequence,
    inspect_checkpoint,
    seed_dropout_,
    slim,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.checkpoints.loading import empty_model
from hf_dynsparse.hub.files import check_model
from hf_dynsparse.models.bert.configuration_dynsparse_bert import encoder_shapes
from hf_dynsparse.reports.facts import dense_bytes
from hf_dynsparse.reports.model_card import create_model_card
from tests.toy import toy_batch, toy_config, toy_model, toy_trainer


# Heads of 8 rows; blocks of 4 divide all that these layers have.
SLIM = {"num_attention_heads": 4, "heads_per_layer": [1, 3], "intermediate_sizes": [12, 64]}
KINDS = {"dense": {"sparsity": 0}, "b4": {}, "b1": {"block_size": 1}, "erk": {"distribution": "erk"}}


def slim_model(kind="b4", cls=DynSparseBertForMaskedLM, **overrides):
    """With biases that are not zero."""
    model = toy_model(cls=cls, **{**SLIM, **KINDS[kind], **overrides})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.1, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def inputs():
    return {name: toy_batch()[name] for name in ("input_ids", "attention_mask")}


def outputs(model):
    with torch.no_grad():
        return [tensor for tensor in model.eval()(**inputs()).values() if torch.is_tensor(tensor)]


def assert_same_outputs(one, other, **tolerance):
    for left, right in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


def assert_same_state(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_shapes_and_what_follows_from_them():
    config = toy_config(**SLIM)
    one, other = (list(encoder_shapes(config).values())[start : start + 6] for start in (0, 6))
    assert one == [(8, 32)] * 3 + [(32, 8), (12, 32), (32, 12)]
    assert other == [(24, 32)] * 3 + [(32, 24), (64, 32), (32, 64)]
    entries = 4 * 8 * 32 + 2 * 12 * 32 + 4 * 24 * 32 + 2 * 64 * 32
    assert toy_config(**SLIM, sparsity=0).num_active_entries() == entries
    assert config.num_active_entries() == entries // 4
    # T = 5; one and three heads of 8.
    assert inference_flops_per_sequence(config, 5) == 2 * 5 * entries // 4 + 4 * 5**2 * (1 + 3) * 8
    assert sum(config.nnzb_per_layer().values()) * 16 == entries // 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_what_its_configuration_says(kind):
    model = slim_model(kind)
    config, encoder = model.config, model.bert.encoder
    for name, shape in encoder_shapes(config).items():
        layer = encoder.get_submodule(name)
        assert (layer.out_features, layer.in_features) == shape
    found = {name: layer.nnzb for name, layer in sparse_layers(encoder).items()}
    assert found == config.nnzb_per_layer()
    assert [layer.attention.self.num_attention_heads for layer in encoder.layer] == [1, 3]
    assert flops_per_sequence(model, 12) == flops_per_sequence(config, 12)
    estimate = estimate_run(config, seq_len=12)
    assert estimate.model.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert estimate.dense_model.parameters * 4 == dense_bytes(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads_per_layer": [2]}, "`heads_per_layer` must have an entry for each of 2 layers. Got 1. Give as many"),
        ({"heads_per_layer": [0, 1]}, r"`heads_per_layer` must lie in \[1, 4\].* Got 0 for layer 0. .* at least one"),
        ({"heads_per_layer": [1, 5]}, r"`heads_per_layer` must lie in \[1, 4\].* Got 5 for layer 1"),
        ({"intermediate_sizes": [64, 65]}, r"`intermediate_sizes` must lie in \[1, 64\].* Got 65 for layer 1"),
        ({"intermediate_sizes": [64.0, 1]}, "intermediate_sizes"),
        ({"num_hidden_layers": 3}, "`heads_per_layer` must have an entry for each of 3 layers. Got 2"),
        ({"intermediate_sizes": [12, 10]}, r"must divide both sides of `layer.1.intermediate.dense` \(10 x 32\)"),
    ],
)
def test_wrong_sizes(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        toy_config(**{**SLIM, **change})


def test_configurations_travel(tmp_path):
    config = toy_config(**SLIM)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()
    assert not {"heads_per_layer", "intermediate_sizes"} & json.loads(toy_config().to_json_string()).keys()
    stock = config.to_stock().to_dict()
    assert (stock["num_attention_heads"], stock["intermediate_size"]) == (4, 64)
    assert not {"heads_per_layer", "intermediate_sizes"} & stock.keys()
    assert DynSparseBertConfig.from_stock(config, sparsity=0.0).intermediate_sizes == [12, 64]


@pytest.mark.parametrize("kind", ["dense", "b4"])
def test_eager_attention_is_sdpa(kind):
    model = slim_model(kind).eval()
    expected = outputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs(), output_attentions=True)
    torch.testing.assert_close(found.logits, expected[0])
    assert [tuple(weights.shape) for weights in found.attentions] == [(4, 1, 12, 12), (4, 3, 12, 12)]


@pytest.mark.parametrize("kind", ["dense", "b4"])
def test_training_with_and_without_kept_activations(kind):
    gradients = []
    for checkpointing in (False, True):
        model = slim_model(kind, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model(**toy_batch()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert seed_dropout_(model) > 0
    model(**toy_batch()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_class_has_zeros_where_units_are_missing(kind, tmp_path):
    model = slim_model(kind).double()
    dense = model.to_dense()
    assert type(dense) is BertForMaskedLM
    assert_same_outputs(model, dense, rtol=1e-12, atol=1e-12)
    layer = dense.bert.encoder.layer[0]
    for name, shape in (("attention.self.value", (8, 32)), ("output.dense", (32, 12))):
        weight = layer.get_submodule(name).weight
        assert weight[: shape[0], : shape[1]].count_nonzero() > 0
        assert weight[shape[0] :].count_nonzero() == weight[:, shape[1] :].count_nonzero() == 0
    export_dense(model, tmp_path / "dense")
    assert_same_outputs(model, BertForMaskedLM.from_pretrained(tmp_path / "dense", dtype=torch.float64))
    back = slim(dense, [range(1), range(3)], [range(12), range(64)])
    assert_same_outputs(model, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "cls"), [*zip(KINDS, [DynSparseBertForMaskedLM, DynSparseBertForQuestionAnswering] * 2, strict=True)]
)
def test_round_trip(kind, cls, tmp_path):
    model = slim_model(kind, cls)
    model.save_pretrained(tmp_path)
    assert_same_state(model, cls.from_pretrained(tmp_path))
    assert_same_state(model, check_model(tmp_path))  # as before a push
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(other) is DynSparseBertForSequenceClassification
    assert_same_state(model.bert.encoder, other.bert.encoder)
    assert empty_model(tmp_path).config.heads_per_layer == [1, 3]


def test_a_slimmed_model_becomes_sparse_and_dense_again(tmp_path):
    dense = slim_model("dense")
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, sparsity=0.5, block_size=4)
    config = DynSparseBertConfig.from_stock(dense.config, sparsity=0.5, block_size=4)
    assert_same_state(loaded, DynSparseBertForMaskedLM.from_dense(dense, config))
    assert_same_state(loaded, sparsify_(dense, block_size=4, sparsity=0.5))
    assert dense.config.nnzb_per_layer() == config.nnzb_per_layer()
    assert len(sparse_layers(loaded)) == 12
    expected = outputs(loaded)
    pruned = densify_(loaded)
    torch.testing.assert_close(outputs(pruned), expected)
    again = DynSparseBertForMaskedLM.from_nonzeros(pruned, block_size=4)
    assert again.config.nnzb_per_layer() == config.nnzb_per_layer()
    assert again.config.heads_per_layer == [1, 3]
    torch.testing.assert_close(outputs(again), expected)


def test_a_block_must_divide_what_is_left():
    slimmed = slim(toy_model(sparsity=0), [[0], [1]], [range(10), range(64)])
    with pytest.raises(ValueError, match=r"must divide .*layer.0.intermediate.dense. \(10 x 32\). Got 4 x 4"):
        sparsify_(slimmed, block_size=4, sparsity=0.5)
    assert not sparse_layers(slimmed)


@pytest.mark.parametrize("kind", ["dense", "b4"])
def test_training_and_resuming(kind, tmp_path):
    """Four steps with a topology update, and the same by two steps and two more: bit for bit."""
    settings = {"max_steps": 4, "num_topology_updates": 0 if kind == "dense" else 1, "save_strategy": "steps"}
    straight = toy_trainer(tmp_path / "straight", slim_model(kind), save_steps=2, **settings)
    straight.train()
    assert straight.topology is None or straight.topology.metrics["topology_updates"] == 1
    resumed = toy_trainer(tmp_path / "resumed", slim_model(kind), save_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same_state(straight.model, resumed.model)
    trained = straight.model.state_dict()
    moved = [name for name, tensor in slim_model(kind).state_dict().items() if not torch.equal(tensor, trained[name])]
    assert len([name for name in moved if name.endswith("block_index")]) == (0 if kind == "dense" else 12)
    assert {f"bert.encoder.layer.{number}.attention.output.LayerNorm.weight" for number in (0, 1)} <= set(moved)


def test_cards_and_reports_say_so(tmp_path):
    model = slim_model("dense")
    model.save_pretrained(tmp_path / "slim")
    lines = str(inspect_checkpoint(tmp_path / "slim")).splitlines()
    assert lines[1:3] == ["attention heads by layer: 1, 3", "intermediate neurons by layer: 12, 64"]
    units = {"attention heads": [1, 3], "intermediate neurons": [12, 64]}
    assert inspect_checkpoint(tmp_path / "slim").to_dict()["units"] == units
    text = "they have 1, 3 attention heads and 12, 64 intermediate neurons."
    assert text in str(create_model_card(model))
    toy_model().save_pretrained(tmp_path / "whole")
    assert inspect_checkpoint(tmp_path / "whole").to_dict()["units"] == {}
    assert "slimmed" not in str(create_model_card(toy_model()))
