import json

import pytest
import torch

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseBertForSequenceClassification,
    flops_per_sequence,
    sparse_layers,
)
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes
from hf_dynsparse.training.summary import format_summary, summarize_run
from tests.toy import toy_config, toy_model, toy_trainer


@pytest.mark.parametrize(
    "cls", [DynSparseBertForMaskedLM, DynSparseBertForPreTraining, DynSparseBertForSequenceClassification]
)
@pytest.mark.parametrize("part", ["", ".encoder."])
def test_bytes_against_a_saved_dense_twin(tmp_path, cls, part):
    model, twin = toy_model(cls=cls), toy_model(cls=cls, sparsity=0)
    twin.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sparse", max_shard_size="10KB")
    assert dense_bytes(model, part) == checkpoint_bytes(tmp_path / "dense", part)
    layers = sparse_layers(model).values()
    saved = sum(4 * 32 * 32 * 4 + 2 * 32 * 64 * 4 for _ in range(2)) - sum(
        layer.values.numel() * 4 + layer.nnzb * 4 for layer in layers
    )
    assert checkpoint_bytes(tmp_path / "sparse", part) == dense_bytes(model, part) - saved


def test_dense_bytes_allocates_nothing_and_draws_nothing():
    model = toy_model()
    state = torch.get_rng_state()
    dense_bytes(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_bytes_of_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold \*.safetensors files. Got none in"):
        checkpoint_bytes(tmp_path)


def test_a_tenth_of_the_weights_takes_a_tenth_of_the_bytes(tmp_path):
    """What must be seen at sparsity 0.9 with 16 x 16 blocks: at most 0.12 of dense, in training and on disk."""
    model = DynSparseBertForMaskedLM(DynSparseBertConfig.preset("small", sparsity=0.9, block_size=16, vocab_size=64))
    model.save_pretrained(tmp_path)
    checkpoint = checkpoint_bytes(tmp_path, ".encoder.") / dense_bytes(model, ".encoder.")

    layers = sparse_layers(model).values()
    assert len(layers) == 24
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = [x for layer in layers for x in (*layer.parameters(), *layer.buffers())] + moments
    assert len(moments) == 2 * 2 * 24
    training = sum(x.numel() * x.element_size() for x in held)
    # Weight, bias, and two moments of each, in single precision.
    dense = sum(3 * 4 * (layer.in_features + 1) * layer.out_features for layer in layers)
    print(f"training {training / dense:.4f}, checkpoint {checkpoint:.4f} of dense")  # noqa: T201  (shown by pytest -s)
    assert 0.1 < training / dense < 0.12
    assert 0.1 < checkpoint < 0.12


def finished_run(folder, sparsity):
    trainer = toy_trainer(folder, toy_model(sparsity=sparsity))
    trainer.train()
    trainer.save_model()
    return trainer, summarize_run(trainer, trainer.evaluate(), seq_len=16)


def test_summary_of_a_run(tmp_path):
    trainer, summary = finished_run(tmp_path, 0.75)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["steps"], summary["topology_updates"], summary["block_size"]) == (12, 3, 4)
    assert summary["sparsity"] == 0.75
    assert summary["coverage"] == trainer.topology.metrics["coverage"]
    assert summary["flops"] == 12 * 4 * flops_per_sequence(toy_config(), 16)
    assert summary["dense_flops"] == pytest.approx(12 * 4 * flops_per_sequence(toy_config(sparsity=0), 16))
    assert summary["checkpoint_bytes"] == checkpoint_bytes(tmp_path)
    assert summary["dense_encoder_bytes"] == dense_bytes(trainer.model, ".encoder.")
    assert torch.tensor(summary["perplexity"]).log().item() == pytest.approx(summary["eval_loss"], rel=1e-5)
    text = format_summary(summary)
    assert "sparsity         0.7500 after 3 topology updates" in text
    assert f"{summary['flops'] / summary['dense_flops']:.1%} of the dense twin" in text


def test_summary_of_a_dense_run(tmp_path):
    _, summary = finished_run(tmp_path, 0)
    assert (summary["sparsity"], summary["coverage"], summary["topology_updates"]) == (0.0, 1.0, 0)
    assert summary["flops"] == summary["dense_flops"]
    assert summary["checkpoint_bytes"] == summary["dense_checkpoint_bytes"]
    assert "100.0% of dense" in format_summary(summary)
