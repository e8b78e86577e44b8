"""Gates: they scale heads and neurons, close like slimming, and leave no trace in a loaded model."""

import copy
import logging

import pytest
import torch
from helpers import generator
from toy import TOY_SIZES, toy_batch, toy_model
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_dynsparse import DynSparseBertForMaskedLM, DynSparseBertForSequenceClassification, slim
from hf_dynsparse.compress.slimming import (
    add_gates_,
    close_gates_,
    draw_ticket,
    gates_of,
    random_ticket,
    remove_gates_,
)


STOCK = {name: value for name, value in TOY_SIZES.items() if name not in ("block_size", "sparsity")}
BUILDERS = {
    "sparse": lambda: toy_model(cls=DynSparseBertForSequenceClassification, sparsity=0.0),
    "stock": lambda: BertForSequenceClassification(BertConfig(**STOCK, num_hidden_layers=2)),
}


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]().eval()


@torch.no_grad()
def logits(model):
    return model(**{name: rows for name, rows in toy_batch().items() if name != "labels"}).logits


@torch.no_grad()
def scatter_(model, seed=0):
    """Gates as after a search, some of them negative."""
    for part in gates_of(model):
        for gates in part:
            gates.copy_(torch.randn(gates.shape, generator=generator(seed)))


def test_gates_of_one_change_nothing_and_go_again(model):
    before = logits(model)
    add_gates_(model)
    assert [len(gates) for gates in gates_of(model).heads] == [2, 2]
    assert [len(gates) for gates in gates_of(model).neurons] == [64, 64]
    assert torch.equal(logits(model), before)
    scatter_(model)
    twin = copy.deepcopy(model)  # scaled by its own gates
    assert not torch.allclose(logits(model), before)
    removed = remove_gates_(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(removed.neurons[1], gates_of(twin).neurons[1])
    assert not torch.allclose(logits(twin), before)
    with pytest.raises(ValueError, match="must have gates. Got .*Call `add_gates_` first"):
        gates_of(model)


def test_a_head_gate_scales_attention_probabilities(model):
    """By hand, on the output of one layer's self-attention: probabilities after softmax, before the values."""
    add_gates_(model)
    scatter_(model)
    layer = model.bert.encoder.layer[0].attention
    hidden = torch.randn(2, 5, 32, generator=generator(1))
    query, key, value = (
        linear(hidden).view(2, 5, 2, 16).transpose(1, 2)
        for linear in (layer.self.query, layer.self.key, layer.self.value)
    )
    probabilities = (query @ key.transpose(2, 3) / 4).softmax(-1) * gates_of(model).heads[0][:, None, None]
    by_hand = (probabilities @ value).transpose(1, 2).reshape(2, 5, 32) @ layer.output.dense.weight.T
    context = layer.self(hidden)[0]
    torch.testing.assert_close(layer.output.dense(context), by_hand + layer.output.dense.bias)


@pytest.mark.parametrize("seed", [0, 1])
def test_closed_gates_equal_the_slimmed_model(model, seed):
    add_gates_(model)
    scatter_(model, seed)
    gates = gates_of(model)
    ticket = draw_ticket(*gates, head_ratio=0.5)
    detached = [[gate.detach().clone() for gate in part] for part in gates]
    close_gates_(model, ticket)
    closed = logits(model)
    slimmed = slim(model, ticket.heads, ticket.neurons, head_gates=detached[0], neuron_gates=detached[1]).eval()
    torch.testing.assert_close(logits(slimmed), closed)
    assert not any("gates" in name for name in slimmed.state_dict())
    remove_gates_(model)
    assert not torch.allclose(logits(model), closed)


def test_a_slimmed_model_can_be_searched_again(model):
    first = random_ticket([2, 2], [64, 64], seed=0, head_ratio=0.0, neuron_ratio=0.25)
    slimmed = slim(model, first.heads, first.neurons).eval()
    add_gates_(slimmed)
    assert [len(gates) for gates in gates_of(slimmed).neurons] == [48, 48]
    ticket = draw_ticket(*gates_of(slimmed), head_ratio=0.5, neuron_ratio=0.5, neurons="layer")
    close_gates_(slimmed, ticket)
    torch.testing.assert_close(logits(slim(slimmed, ticket.heads, ticket.neurons).eval()), logits(slimmed))


def test_checkpoint_of_a_search_loads_as_a_plain_model(tmp_path, caplog):
    model = toy_model(sparsity=0.0).eval()
    before = logits(model)
    add_gates_(model).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = DynSparseBertForMaskedLM.from_pretrained(tmp_path).eval()
    assert not caplog.records
    assert torch.equal(logits(loaded), before)
    assert not any("gates" in name for name in loaded.state_dict())


def test_gates_stay_precise_in_a_bfloat16_model():
    model = add_gates_(BertForMaskedLM(BertConfig(**STOCK, num_hidden_layers=1)).to(torch.bfloat16))
    assert gates_of(model).heads[0].dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_refused():
    with pytest.raises(ValueError, match="dense BERT without gates. Got one with BlockSparseLinear"):
        add_gates_(toy_model())
    gated = add_gates_(toy_model(sparsity=0.0))
    with pytest.raises(ValueError, match="Got one with gates"):
        add_gates_(gated)
    gated.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="Gates need a BERT. Got a model of type gpt2"):
        gates_of(gated)
