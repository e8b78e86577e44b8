import json

import pytest
import torch

from hf_dynsparse import flops_per_sequence
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes
from hf_dynsparse.training.summary import format_summary, summarize_run
from tests.toy import toy_config, toy_model, toy_trainer


def finished_run(folder, sparsity, **overrides):
    trainer = toy_trainer(folder, toy_model(sparsity=sparsity), **overrides)
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
    assert summary["context_gain"] is summary["plateau_left_tokens"] is None  # nobody counted pieces
    text = format_summary(summary)
    assert "context gain" not in text
    text = format_summary(summary | {"context_gain": 0.05})
    assert "context gain     0.05 nats over the frequencies of pieces; still on their plateau" in text
    left = {"context_gain": 1.234, "plateau_left_tokens": 614_400, "plateau_left_seconds": 107.04}
    text = format_summary(summary | left)
    assert "1.23 nats over the frequencies of pieces; 0.1 reached after 0.614 M tokens, 107 s" in text
    assert "sparsity         0.7500 after 3 topology updates" in text
    assert f"{summary['flops'] / summary['dense_flops']:.1%} of the dense twin" in text


def test_summary_of_a_dense_run(tmp_path):
    _, summary = finished_run(tmp_path, 0, max_steps=2, num_topology_updates=0)
    assert (summary["sparsity"], summary["coverage"], summary["topology_updates"]) == (0.0, 1.0, 0)
    assert summary["flops"] == summary["dense_flops"]
    assert summary["checkpoint_bytes"] == summary["dense_checkpoint_bytes"]
    assert "100.0% of dense" in format_summary(summary)
