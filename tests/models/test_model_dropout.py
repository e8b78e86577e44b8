"""Seeded dropout in a whole model."""

import json

import pytest
import torch
from helpers import needs_kernels
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hf_dynsparse import TopologyUpdater, fuse_passes_, seed_dropout_
from hf_dynsparse.models import dropout as seeded_dropout
from tests.toy import toy_batch, toy_model, toy_trainer


def with_dropout(p=0.1):
    return toy_model(hidden_dropout_prob=p, attention_probs_dropout_prob=p)


def test_every_dropout_of_the_model_is_changed():
    model = with_dropout().train()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert seed_dropout_(model) == len(names) + 1
    assert {type(model.get_submodule(name)) for name in names} == {seeded_dropout.SeededDropout}
    assert model.config._attn_implementation == "sdpa_seeded_dropout"
    assert seed_dropout_(model) == 0
    assert seed_dropout_(with_dropout(0.0)) == 0
    assert seed_dropout_(nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2))) == 1


def test_without_dropout_the_model_computes_the_same():
    model, batch = with_dropout().eval(), toy_batch()
    expected = model(**batch).logits
    seed_dropout_(model)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_hand(masked, monkeypatch):
    # With a dropout that drops nothing, what is left is transformers' attention.
    monkeypatch.setattr(seeded_dropout, "seeded", lambda weights, p: weights)
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1, 1, 1, 0, 0]).bool().expand(2, 1, 5, 5) if masked else None
    module = nn.Module()
    module.is_causal = False
    found, _ = seeded_dropout.attention_forward(module, query, key, value, mask, dropout=0.5, scaling=0.3)
    expected, _ = seeded_dropout.attention_forward(module, query, key, value, mask, dropout=0.0, scaling=0.3)
    assert found.shape == (2, 5, 4, 8)
    torch.testing.assert_close(found, expected)


def test_losses_have_the_mean_of_the_usual_dropout():
    batch = toy_batch()
    usual, seeded = with_dropout(0.3).train(), with_dropout(0.3).train()
    seed_dropout_(seeded)
    torch.manual_seed(0)
    losses = torch.tensor([[model(**batch).loss.item() for _ in range(60)] for model in (usual, seeded)])
    error = (losses.var(dim=1) / 60).sum().sqrt()
    assert losses.var(dim=1).min() > 0
    assert (losses[0].mean() - losses[1].mean()).abs() < 4 * error


@needs_kernels
def test_no_mask_is_kept_for_the_backward_pass():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda nothing: None):
        seeded_dropout.SeededDropout(0.5)(torch.ones(10_000, requires_grad=True))
    assert saved == [1]


def test_the_trainer_uses_it_and_what_it_saves_does_not_show_it(tmp_path):
    trainer = toy_trainer(tmp_path, with_dropout())
    trainer.train()
    trainer.save_model()
    assert trainer.model.config._attn_implementation == "sdpa_seeded_dropout"
    assert "seeded" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert json.loads((tmp_path / "config.json").read_text())["hidden_dropout_prob"] == 0.1
    trainer = toy_trainer(tmp_path / "off", with_dropout(), seeded_dropout=False)
    assert trainer.model.config._attn_implementation == "sdpa"


def test_a_stock_model_too():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).train()
    assert seed_dropout_(model) == 5  # embeddings, three of the layer, and attention itself
    batch = toy_batch()
    torch.manual_seed(0)
    first = model(**batch).loss
    first.backward()
    torch.manual_seed(0)
    assert torch.equal(model(**batch).loss, first)


def test_one_graph_survives_updates():
    model = with_dropout().train()
    seed_dropout_(model)
    fuse_passes_(model)  # the compiler makes passes of its own
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(model.parameters())
    updater = TopologyUpdater(model, optimizer, total_steps=6, num_topology_updates=3)
    losses = []
    for step in range(1, 5):
        loss = compiled(**toy_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step(step)
        losses.append(loss.item())
    assert counter.frame_count == 1
    assert len(set(losses)) == 4
