"""Save, load, export: what travels is what the model is."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
    densify_,
    prune_regrow_,
    sparse_layers,
)
from hf_dynsparse.models import loading
from hf_dynsparse.topology import track_
from tests.toy import toy_batch, toy_config, toy_model


HEADS = {
    DynSparseBertModel: AutoModel,
    DynSparseBertForMaskedLM: AutoModelForMaskedLM,
    DynSparseBertForPreTraining: transformers.AutoModelForPreTraining,
    DynSparseBertForSequenceClassification: AutoModelForSequenceClassification,
    DynSparseBertForTokenClassification: transformers.AutoModelForTokenClassification,
    DynSparseBertForQuestionAnswering: transformers.AutoModelForQuestionAnswering,
    DynSparseBertForMultipleChoice: transformers.AutoModelForMultipleChoice,
}


def trained_model(cls=DynSparseBertForMaskedLM, **overrides):
    """A model as training leaves it: slots out of order, some blocks zero, biases not."""
    model = toy_model(3, cls, **overrides)
    for layer in sparse_layers(model).values():
        prune_regrow_(layer, pruning_ratio=0.5)
        with torch.no_grad():
            layer.bias.uniform_(-0.1, 0.1)
    return model.eval()


def outputs(model):
    batch = {name: x for name, x in toy_batch().items() if name != "labels"}
    if isinstance(model, DynSparseBertForMultipleChoice | transformers.BertForMultipleChoice):
        batch = {name: x[None] for name, x in batch.items()}
    return [x for x in model.eval()(**batch).to_tuple() if torch.is_tensor(x)]


def assert_same_outputs(one, other, **tolerance):
    for left, right in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(left, right, **{"rtol": 0, "atol": 0, **tolerance})


def assert_same_encoder(one, other):
    left, right = sparse_layers(one.base_model), sparse_layers(other.base_model)
    assert left.keys() == right.keys()
    for name, layer in left.items():
        assert right[name].block_index.dtype == torch.int32
        assert torch.equal(layer.block_index, right[name].block_index), name
        assert torch.equal(layer.values, right[name].values), name
        assert torch.equal(layer.bias, right[name].bias), name


def load(auto, folder, missing=(), **arguments):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {key.split(".")[0] for key in info["missing_keys"]} == set(missing)
    return model


@pytest.mark.parametrize("cls", HEADS)
def test_round_trip(tmp_path, cls):
    model = trained_model(cls)
    model.save_pretrained(tmp_path)
    loaded = load(HEADS[cls], tmp_path)
    assert type(loaded) is cls
    assert_same_encoder(model, loaded)
    assert_same_outputs(model, loaded)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({"block_size": 1}, (1, 1)), ({"block_size": [1, 4]}, (1, 4)), ({"distribution": "erk"}, (4, 4))],
)
def test_round_trip_of_other_configurations(tmp_path, sizes, shape):
    model = trained_model(**sizes)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForMaskedLM, tmp_path)
    assert {layer.block_shape for layer in sparse_layers(loaded).values()} == {shape}
    assert_same_encoder(model, loaded)
    assert_same_outputs(model, loaded)


def test_what_a_file_holds(tmp_path):
    trained_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    query = {name: x for name, x in tensors.items() if name.startswith("bert.encoder.layer.0.attention.self.query.")}
    assert {name.rsplit(".")[-1]: (tuple(x.shape), x.dtype) for name, x in query.items()} == {
        "values": ((16, 4, 4), torch.float32),
        "block_index": ((16,), torch.int32),
        "bias": ((32,), torch.float32),
    }


@pytest.mark.parametrize(
    ("auto", "missing"),
    [
        (AutoModelForSequenceClassification, {"classifier", "bert"}),
        (transformers.AutoModelForTokenClassification, {"classifier"}),
        (transformers.AutoModelForQuestionAnswering, {"qa_outputs"}),
        (transformers.AutoModelForMultipleChoice, {"classifier", "bert"}),
        (transformers.AutoModelForPreTraining, {"cls", "bert"}),
        (AutoModel, {"pooler"}),
    ],
)
def test_another_head_keeps_the_topology(tmp_path, auto, missing):
    model = trained_model()
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == missing
    assert not any("encoder" in key for key in info["missing_keys"])
    assert_same_encoder(model, loaded)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 5, name


def test_what_a_file_holds_survives_the_initialisation_of_the_rest(monkeypatch):
    # A layer that lacks one tensor is visited by `_init_weights`; it must not draw the others anew. No checkpoint
    # comes that far: the check is taken away.
    monkeypatch.setattr(loading, "verify", lambda *_: None)
    model, lost = trained_model(), "bert.encoder.layer.1.output.dense.bias"
    state = {name: x for name, x in model.state_dict().items() if name != lost}
    # Copies: the loaded model takes over the very tensors that it is given.
    given = {name: x.clone() for name, x in state.items()}
    loaded = DynSparseBertForMaskedLM.from_pretrained(None, config=toy_config(), state_dict=given)
    assert not loaded.state_dict()[lost].any()
    for name, tensor in state.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_bfloat16_leaves_the_index_alone(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForMaskedLM, tmp_path, dtype=torch.bfloat16)
    for name, layer in sparse_layers(loaded).items():
        expected = sparse_layers(model)[name]
        assert layer.block_index.dtype == torch.int32
        assert torch.equal(layer.block_index, expected.block_index)
        assert torch.equal(layer.values, expected.values.bfloat16())
    assert_same_outputs(model, loaded.float(), atol=0.05)


def test_exploration_buffers_are_no_part_of_a_loaded_model(tmp_path):
    model = trained_model()
    for layer in sparse_layers(model).values():
        track_(layer)
    model.save_pretrained(tmp_path)
    assert any(name.endswith("ever_active") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load(AutoModelForMaskedLM, tmp_path)
    assert loaded.state_dict().keys() == toy_model().state_dict().keys()
    assert_same_outputs(model, loaded)


@pytest.mark.parametrize("cls", HEADS)
def test_to_dense_is_the_stock_class(tmp_path, cls):
    model = trained_model(cls, num_labels=3) if "Classification" in cls.__name__ else trained_model(cls)
    dense = model.to_dense()
    stock = getattr(transformers, cls.__name__.removeprefix("DynSparse"))
    assert type(dense) is stock
    assert not dense.training
    assert dense.config.model_type == "bert"
    assert not {"sparsity", "block_size", "distribution", "sparse_prediction"} & dense.config.to_dict().keys()
    assert_same_outputs(model, dense, rtol=1e-5, atol=1e-6)
    dense.save_pretrained(tmp_path)
    loaded = load(stock, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [stock.__name__]
    assert_same_outputs(dense, loaded)


def test_to_dense_shares_nothing_with_the_model():
    model = trained_model()
    expected = outputs(model)
    dense = model.to_dense()
    assert dense.cls.predictions.decoder.weight is dense.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    for got, before in zip(outputs(model), expected, strict=True):
        assert torch.equal(got, before)


def test_densified_model_is_saved_as_what_it_is(tmp_path):
    model = trained_model()
    expected = outputs(model)
    densify_(model)
    assert not sparse_layers(model)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForMaskedLM, tmp_path)
    assert type(loaded) is DynSparseBertForMaskedLM
    assert loaded.config.sparsity == 0
    assert_same_outputs(model, loaded)
    for got, before in zip(outputs(loaded), expected, strict=True):
        torch.testing.assert_close(got, before, rtol=1e-5, atol=1e-6)
