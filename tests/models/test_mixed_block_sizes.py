"""A model whose layers have blocks of several sizes: built, saved, loaded, converted, trained and described."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertForMaskedLM

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertModel,
    estimate_run,
    inspect_checkpoint,
    save_with_code,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.blocks.sizes import parse_block_size
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.reports.model_card import write_model_card
from tests.toy import TOY_SIZES, toy_batch, toy_config, toy_model, toy_trainer


# Sorted, as in a config.json, the most general pattern comes first.
MIXED = {"*attention*": 2, "*": 16, "layer.1.output.*": (4, 8)}
SHAPES = {
    **{f"layer.{i}.attention.{name}": (2, 2) for i in (0, 1) for name in ("self.query", "self.key", "self.value")},
    **{f"layer.{i}.attention.output.dense": (2, 2) for i in (0, 1)},
    **{f"layer.{i}.intermediate.dense": (16, 16) for i in (0, 1)},
    **{"layer.0.output.dense": (16, 16), "layer.1.output.dense": (4, 8)},
}


def shapes_of(model):
    return {name: layer.block_shape for name, layer in sparse_layers(model.base_model.encoder).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    model = toy_model(block_size=MIXED)
    model.save_pretrained(folder)
    return folder, model


def test_the_longest_pattern_counts():
    config = toy_config(block_size=MIXED)
    assert config.block_shapes() == SHAPES
    # 256 blocks of 2 x 2 in each square matrix, 8 of 16 x 16 and 64 of 4 x 8 in the long ones, a quarter of each.
    assert sorted(config.nnzb_per_layer().values()) == [2, 2, 2, 16, *[64] * 8]
    assert config.num_active_entries() == toy_config().num_active_entries() == (8 * 1024 + 4 * 2048) // 4
    assert toy_config(block_size=4).block_shapes() == dict.fromkeys(SHAPES, (4, 4))
    with pytest.raises(ValueError, match=r"`block_shape` is that of all layers\. Got .*\. Ask `block_shapes\(\)`"):
        _ = config.block_shape


def test_a_saved_model(saved):
    folder, model = saved
    assert shapes_of(model) == SHAPES
    config = AutoConfig.from_pretrained(folder)
    assert [*config.block_size] == sorted(MIXED)
    assert config.block_shapes() == SHAPES
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(loaded) is DynSparseBertForMaskedLM
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert shapes_of(AutoModel.from_pretrained(folder)) == SHAPES
    overridden = json.loads((folder / "config.json").read_text())["block_size"]
    assert DynSparseBertConfig.from_dict({"block_size": overridden, **dict(TOY_SIZES, block_size=overridden)})


def test_from_dense_and_back(saved, tmp_path):
    dense = toy_model(sparsity=0.0).to_dense()
    dense.save_pretrained(tmp_path / "dense")
    config = DynSparseBertConfig.from_stock(dense.config, sparsity=0.75, block_size=MIXED)
    models = [
        DynSparseBertForMaskedLM.from_pretrained(tmp_path / "dense", sparsity=0.75, block_size=MIXED),
        DynSparseBertForMaskedLM.from_dense(dense, config),
    ]
    for model in models:
        assert shapes_of(model) == SHAPES
        for name, layer in sparse_layers(model.base_model.encoder).items():
            weight, kept = dense.bert.encoder.get_submodule(name).weight, layer.to_dense()
            assert torch.equal(kept, weight * kept.ne(0))
    pruned = models[0].to_dense()
    assert type(pruned) is BertForMaskedLM
    again = DynSparseBertForMaskedLM.from_nonzeros(pruned, block_size=MIXED)
    assert again.config.nnzb == config.nnzb_per_layer()
    assert again.config.sparsity == 0.75
    for name, layer in sparse_layers(again).items():
        assert torch.equal(layer.to_dense(), sparse_layers(models[0])[name].to_dense())
    with pytest.raises(ValueError, match="must find zero blocks of 2 x 2, 4 x 8, 16 x 16. Got none"):
        DynSparseBertForMaskedLM.from_nonzeros(dense, block_size=MIXED)


def test_described_as_it_is(saved, tmp_path):
    folder, model = saved
    report = inspect_checkpoint(folder)
    found = {layer.name.partition("encoder.")[2]: layer.layout.block_shape for layer in report.layers}
    assert found == SHAPES
    estimate = estimate_run(model.config)
    assert estimate.model.checkpoint_bytes == checkpoint_bytes(folder)
    card = write_model_card(tmp_path, model=model)
    text = card.read_text() if card else (tmp_path / "README.md").read_text()
    assert "in blocks of 16 x 16 and 2 x 2 and 4 x 8." in text
    save_with_code(model, tmp_path / "with code")
    assert json.loads((tmp_path / "with code" / "config.json").read_text())["block_size"]["*attention*"] == 2


def test_trains_dynamically(tmp_path):
    trainer = toy_trainer(
        tmp_path, toy_model(block_size=MIXED), block_age_adam=True, max_steps=4, num_topology_updates=1
    )
    before = {name: layer.nnzb for name, layer in sparse_layers(trainer.model).items()}
    trainer.train()
    assert {name: layer.nnzb for name, layer in sparse_layers(trainer.model).items()} == before
    assert trainer.topology.metrics["topology_updates"] == 1
    trainer.model.eval()
    assert torch.isfinite(trainer.model(**toy_batch()).loss)


def test_stock_models_have_one_block_size(saved):
    with pytest.raises(ValueError, match="`block_size` must be a positive integer or a pair"):
        sparsify_(toy_model(sparsity=0.0).to_dense(), block_size={"*": 4}, sparsity=0.5)
    assert shapes_of(DynSparseBertModel(toy_config(block_size={"*": 4}))) == dict.fromkeys(SHAPES, (4, 4))


@pytest.mark.parametrize(
    ("block_size", "message"),
    [
        (
            {"*attention*": 4},
            "must give a size for every layer. Got none for `layer.0.intermediate.dense` .* Add .* `*`",
        ),
        (
            {"*": 4, "*attn*": 2},
            r"Every pattern .* must match a layer. Got '\*attn\*'. Layers .* layer.0.attention.self",
        ),
        (
            {"*": 4, "*output*": 5},
            r"must divide both sides of `layer.0.attention.output.dense` \(32 x 32\). Got 5 x 5",
        ),
        ({"*": 0}, "must be a positive integer or a pair .* Got 0"),
        ({"*": "4"}, "block_size"),
        ({}, "must give a size for every layer"),
    ],
)
def test_sizes_that_do_not_fit(block_size, message):
    with pytest.raises((StrictDataclassError, ValueError)) as caught:
        toy_config(block_size=block_size)
    assert re.search(message, str(caught.value), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16", 16), ("1x4", (1, 4)), ("*attention*=4,*=16", {"*attention*": 4, "*": 16}), ("*=2x8", {"*": (2, 8)})],
)
def test_on_a_command_line(text, size):
    assert parse_block_size(text) == size


@pytest.mark.parametrize("text", ["", "a", "4x", "2x2x2", "*=", "*=4,5", "=4,*=a"])
def test_not_on_a_command_line(text):
    with pytest.raises(ValueError, match="`--block_size` must be a number such as 16, .*attention.*=16. Got"):
        parse_block_size(text)
