"""Fused passes in a whole model: the same to rounding, and nothing of them in what is saved."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import needs_kernels
from transformers import BertConfig, BertForMaskedLM, TrainerState

from hf_dynsparse import KernelCallback, fuse_passes_, seed_dropout_
from tests.toy import toy_batch, toy_model, toy_trainer


def losses_and_gradients(model):
    torch.manual_seed(0)
    loss = model(**toy_batch()).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def with_dropout(p):
    model = toy_model(hidden_dropout_prob=p, attention_probs_dropout_prob=p).train()
    seed_dropout_(model)
    return model


@needs_kernels
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_loss_and_gradients_are_the_same(p):
    model = with_dropout(p)
    fused = copy.deepcopy(model)
    layers = model.config.num_hidden_layers
    assert fuse_passes_(fused) == 2 * layers + 1
    assert fuse_passes_(fused) == 0
    expected = losses_and_gradients(model)
    torch.testing.assert_close(losses_and_gradients(fused), expected, rtol=1e-4, atol=1e-6)
    kinds = {node.split(".")[0] for node in graph_of(fused)}
    assert {"_ResidualNormBackward", "_CrossEntropyBackward"} <= kinds
    assert "NllLossBackward0" not in kinds
    fused.zero_grad()
    assert fuse_passes_(fused, False) == 2 * layers + 1
    assert all(torch.equal(*pair) for pair in zip(losses_and_gradients(fused), expected, strict=True))


def graph_of(model):
    """Names of the nodes that the loss of a model depends on."""
    nodes, names = [model(**toy_batch()).loss.grad_fn], set()
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            nodes += [other for other, _ in node.next_functions]
    return names


@needs_kernels
def test_dropout_of_torch_and_hooks_stay():
    model = toy_model(hidden_dropout_prob=0.1).train()
    fuse_passes_(model)
    assert "_ResidualNormBackward" not in graph_of(model)
    met = []
    first = model.bert.encoder.layer[0].output
    first.LayerNorm.register_forward_hook(lambda *call: met.append(call))
    model(**toy_batch())
    assert len(met) == 1


def test_a_stock_model_too():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).eval()
    expected = model(**toy_batch())
    assert fuse_passes_(model) == 2
    assert all(torch.equal(*pair) for pair in zip(model(**toy_batch())[:2], expected[:2], strict=True))
    seed_dropout_(model)
    assert "_ResidualNormBackward" in graph_of(model.train())


@pytest.mark.parametrize("said", [{"fused_passes": True}, {"fused_passes": False}, {}])
def test_a_run_goes_on_as_it_began(said):
    # Checkpoints of earlier versions say nothing of it.
    fused = said.get("fused_passes", False)
    model, state = toy_model(), TrainerState(global_step=2)
    state.stateful_callbacks = {"KernelCallback": {"args": said, "attributes": {"choices": []}}}
    callback = KernelCallback("off", fused_passes=not fused)
    callback.on_train_begin(SimpleNamespace(device=torch.device("cpu")), state, None, model=model)
    assert (model.row_losses is not None) == fused == callback.state()["args"]["fused_passes"]


def test_the_trainer_uses_it_and_what_it_saves_does_not_show_it(tmp_path):
    trainer = toy_trainer(tmp_path, with_dropout(0.1), max_steps=1, num_topology_updates=0)
    trainer.train()
    trainer.save_model()
    assert trainer.model.row_losses is not None
    assert "fused" not in (tmp_path / "config.json").read_text()
    off = toy_trainer(tmp_path, toy_model(), max_steps=1, num_topology_updates=0, fused_passes=False)
    off.train()
    assert off.model.row_losses is None
