"""How big a model is said to be, against what is then saved."""

from pathlib import Path

import pytest
import torch

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseBertForSequenceClassification,
    sparse_layers,
)
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes
from hf_dynsparse.reports.layers import model_facts
from tests.toy import toy_model


@pytest.mark.parametrize(
    ("cls", "part"),
    [
        (DynSparseBertForMaskedLM, ""),
        (DynSparseBertForPreTraining, ".encoder."),
        (DynSparseBertForSequenceClassification, ""),
    ],
)
def test_bytes_by_hand_and_against_a_saved_dense_twin(tmp_path: Path, cls: type, part: str) -> None:
    model, twin = toy_model(cls=cls), toy_model(cls=cls, sparsity=0)
    twin.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sparse", max_shard_size="10KB")
    facts = model_facts(model, part)
    assert facts.dense_bytes == dense_bytes(model, part) == checkpoint_bytes(tmp_path / "dense", part)
    assert facts.bytes == checkpoint_bytes(tmp_path / "sparse", part)
    # Of 16,384 entries a quarter stays; each of the 256 blocks has a number of four bytes.
    assert facts.dense_bytes - facts.bytes == 4 * (16384 - 4096 - 256)
    assert (facts.positions, facts.nnz, facts.sparsity) == (16384, 4096, 0.75)
    assert facts.dense_parameters - facts.parameters == 16384 - 4096


def test_a_part_without_sparse_layers() -> None:
    facts = model_facts(toy_model(), ".embeddings.")
    assert (facts.layers, facts.sparsity) == ((), 0.0)
    assert facts.dense_bytes == facts.bytes == 4 * facts.parameters


def test_bytes_of_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold \*.safetensors files. Got none in"):
        checkpoint_bytes(tmp_path)


def test_a_tenth_of_the_weights_takes_a_tenth_of_the_memory() -> None:
    """At sparsity 0.9 with 16 x 16 blocks: at most 0.12 of dense, in training and on disk."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    model = toy_model(**sizes, sparsity=0.9, block_size=16)
    encoder = model_facts(model, ".encoder.")
    layers = sparse_layers(model).values()
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = [x for layer in layers for x in (*layer.parameters(), *layer.buffers())] + moments
    assert len(moments) == 2 * 2 * len(layers)
    training = sum(x.numel() * x.element_size() for x in held)
    # Weight, bias, and two moments of each, in single precision.
    dense = sum(3 * 4 * (layer.in_features + 1) * layer.out_features for layer in layers)
    assert 0.1 < training / dense < 0.12
    assert 0.1 < encoder.bytes / encoder.dense_bytes < 0.12
