"""A checkpoint that does not fit is refused by one error that names tensor and file; nothing is loaded by half."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    sparse_layers,
)
from tests.toy import toy_config, toy_model


QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint, to be damaged."""
    toy_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the tensors of the only file of `folder`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def describe(folder, **changes):
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(folder, *parts, file="model.safetensors", cls=DynSparseBertForMaskedLM, **arguments):
    """Loading ends in one ValueError that names the file and has these parts, in this order."""
    with pytest.raises(ValueError, match=r"(?s)" + ".*".join(map(re.escape, parts))) as caught:
        cls.from_pretrained(folder, **arguments)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(tmp_path, "must consist of whole safetensors files", file=shard.name)


def test_a_missing_shard(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        DynSparseBertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "shape", "got"),
    [
        ({"sparsity": 0.5}, "(32, 4, 4)", "(16, 4, 4)"),
        ({"block_size": 2}, "(64, 2, 2)", "(16, 4, 4)"),
        ({"block_size": [1, 4]}, "(64, 1, 4)", "(16, 4, 4)"),
        ({"nnzb": {"layer.0.attention.self.query": 3}}, "(3, 4, 4)", "(16, 4, 4)"),
    ],
)
def test_another_sparsity_or_block_size(folder, changes, shape, got):
    parts = (
        "`bert.encoder.layer.0.attention.",
        ".values` must have shape",
        shape,
        "Got",
        got,
        "`sparsity`, `block_size`",
    )
    refused(folder, *parts, **changes)
    describe(folder, **changes)
    refused(folder, *parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_in_another_precision_are_cast(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({f"{QUERY}.bias": tensors[f"{QUERY}.bias"].to(dtype)}))
    assert DynSparseBertForMaskedLM.from_pretrained(folder).dtype == torch.float32


def test_a_tensor_that_is_in_no_shard(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="10KB")
    for file in tmp_path.glob("model-*.safetensors"):
        tensors = {name: x for name, x in load_file(file).items() if name != f"{QUERY}.values"}
        save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path, f"without `{QUERY}.values`.", file="model.safetensors.index.json")


def test_a_wrong_tensor_in_a_shard_is_found_in_its_file(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="10KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    key = f"{QUERY}.values"
    tensors = load_file(tmp_path / places[key])
    tensors[key] = tensors[key][:3].clone()
    save_file(tensors, tmp_path / places[key], metadata={"format": "pt"})
    refused(tmp_path, f"`{key}` must have shape (16, 4, 4)", "Got (3, 4, 4)", file=places[key])


def test_fewer_layers_than_the_file_has(folder):
    refused(folder, "a place for every sparse layer", "Got `bert.encoder.layer.1.", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_hidden_layers", value) for value in (10**9, 0)],
        *[("hidden_size", value) for value in (10**9, 10**30, -32)],
        *[("vocab_size", value) for value in (2**63, 0)],
        *[("max_position_embeddings", 10**12), ("intermediate_size", 10**15), ("num_labels", 10**10)],
    ],
)
def test_a_configuration_that_asks_for_everything(folder, name, value):
    """At once: no list, layer or tensor of this size is made."""
    describe(folder, **{name: value})
    for cls in (DynSparseBertForMaskedLM, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=rf"`{name}` must lie in \[1, 10+\]. Got {value}"):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("sizes", [{"hidden_size": 10**8}, {"vocab_size": 10**8}, {"intermediate_size": 10**8}])
def test_a_configuration_that_asks_for_much(folder, sizes):
    """The model stands on meta until the headers have been read: terabytes cost nothing."""
    describe(folder, **sizes)
    refused(folder, "must have shape", "100000000", "Got (")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"intermediate_size": 128}, ("layer.0.intermediate.dense.", "must have shape (128", "Got (64")),
        ({"hidden_size": 16}, ("embeddings.", "must have shape (16,)", "Got (32,)")),
        ({"vocab_size": 99}, ("word_embeddings.weight", "(99, 32)", "Got (64, 32)")),
    ],
)
def test_a_dense_checkpoint_of_other_dimensions(tmp_path, changes, parts):
    BertForMaskedLM(toy_config().to_stock()).save_pretrained(tmp_path)
    refused(tmp_path, "`bert.", *parts, "the dimensions of the checkpoint", config=toy_config(**changes))
    # Only a head may start afresh.
    refused(tmp_path, "`bert.", *parts, config=toy_config(**changes), ignore_mismatched_sizes=True)


def test_a_dense_weight_of_other_dimensions_is_named_as_in_the_file(tmp_path):
    BertForMaskedLM(toy_config().to_stock()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{QUERY}.weight": torch.zeros(32, 16)}))
    refused(tmp_path, f"`{QUERY}.weight` must have shape (32, 32)", "Got (32, 16)", sparsity=0.75, block_size=4)


@pytest.mark.parametrize("cls", [DynSparseBertForMaskedLM, DynSparseBertForSequenceClassification])
def test_an_unrelated_model(tmp_path, cls):
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    refused(tmp_path, "Got", f"with none of {cls.__name__}: it holds `transformer.", config=toy_config(), cls=cls)


def test_a_state_dict_with_gaps():
    state = {name: x for name, x in toy_model().state_dict().items() if not name.startswith(QUERY)}
    with pytest.raises(ValueError, match=f"Got the given `state_dict` without `{QUERY}.* and 2 more"):
        DynSparseBertForMaskedLM.from_pretrained(None, config=toy_config(), state_dict=state)


def test_heads_may_be_missing_or_of_another_shape(tmp_path):
    model = toy_model(cls=DynSparseBertForTokenClassification, num_labels=5)
    model.save_pretrained(tmp_path)
    part = "`classifier.", "must have shape (3", "Got (5", "`num_labels`", "`ignore_mismatched_sizes=True`"
    refused(tmp_path, *part, cls=DynSparseBertForTokenClassification, num_labels=3)
    loaded, info = DynSparseBertForTokenClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.shape == (3, 32)
    other, info = DynSparseBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert {key.rpartition(".")[0] for key in info["missing_keys"]} == {"bert.pooler.dense"}
    for name, layer in sparse_layers(other).items():
        assert torch.equal(layer.values, sparse_layers(model)[name].values)


def test_loading_information_only_on_request(folder):
    assert type(DynSparseBertForMaskedLM.from_pretrained(folder)) is DynSparseBertForMaskedLM
    assert type(DynSparseBertForMaskedLM.from_pretrained(folder, output_loading_info=True)) is tuple


# PEFT asks models by the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_needs_no_encoder(folder, tmp_path):
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    model = DynSparseBertForMaskedLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=r"cls\.predictions\.transform\.dense"))
    model.save_pretrained(tmp_path / "adapter")
    other = DynSparseBertForMaskedLM.from_pretrained(folder)
    other.load_adapter(tmp_path / "adapter")
    names = [name for name in model.state_dict() if "lora" in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(other.state_dict()[name], model.state_dict()[name])
