"""`slim`: a dense model without some heads and neurons computes what it would with their outputs set to zero."""

import random

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

import hf_dynsparse
from hf_dynsparse import slim, sparse_layers
from tests.toy import toy_batch, toy_config, toy_model


HEADS, NEURONS = [[0, 2], [3]], [[5, 1, 2], [*range(0, 64, 2)]]


def stock_model(cls=BertForMaskedLM, seed=0, **sizes):
    """A dense model of four heads with biases and norms that a mistake would show in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(toy_config(num_attention_heads=4, sparsity=0, **sizes).to_stock())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def drawn_gates(counts, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=draw, dtype=torch.float64) for count in counts]


def gate_(model, units, size):
    """Multiply what enters `attention.output.dense` (heads of `size` rows) or `output.dense` by gates, by hooks."""
    for layer, gates in zip(model.base_model.encoder.layer, units, strict=True):
        dense = layer.attention.output.dense if size > 1 else layer.output.dense
        wide = gates.repeat_interleave(size)
        dense.register_forward_pre_hook(lambda module, args, wide=wide: (args[0] * wide,))


def without(gates, kept):
    """Gates that are zero for what does not stay."""
    zeroed = [torch.zeros_like(of_layer) for of_layer in gates]
    for zero, of_layer, staying in zip(zeroed, gates, kept, strict=True):
        zero[staying] = of_layer[staying]
    return zeroed


def outputs_of(model):
    batch = {key: value for key, value in toy_batch().items() if key != "labels"}
    with torch.no_grad():
        return [output for output in model(**batch).values() if torch.is_tensor(output)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification, BertForQuestionAnswering])
def test_slimming_is_gating_with_zeros(cls, seed):
    dense, draw = stock_model(cls, seed).double(), random.Random(seed)
    heads = [draw.sample(range(4), draw.randint(1, 4)) for _ in range(2)]
    neurons = [draw.sample(range(64), draw.randint(1, 63)) for _ in range(2)]
    head_gates, neuron_gates = drawn_gates([4, 4], seed), drawn_gates([64, 64], seed + 10)
    slimmed = slim(dense, heads, neurons, head_gates=head_gates, neuron_gates=neuron_gates)
    before = outputs_of(dense)
    gate_(dense, without(head_gates, heads), size=8)
    gate_(dense, without(neuron_gates, neurons), size=1)
    for expected, unchanged, got in zip(outputs_of(dense), before, outputs_of(slimmed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert (got - unchanged).abs().max() > 1e-3
    assert type(slimmed).__name__ == f"DynSparse{cls.__name__}"
    assert slimmed.config.heads_per_layer == [len(kept) for kept in heads]
    assert slimmed.config.intermediate_sizes == [len(kept) for kept in neurons]
    assert not slimmed.training
    assert not sparse_layers(slimmed)


def test_what_stays_is_bit_identical_and_not_shared():
    dense = stock_model().train()
    slimmed = slim(dense, HEADS, NEURONS)
    attention, old = slimmed.bert.encoder.layer[1].attention, dense.bert.encoder.layer[1].attention
    assert torch.equal(attention.self.key.weight, old.self.key.weight[24:])
    assert torch.equal(attention.self.value.bias, old.self.value.bias[24:])
    assert torch.equal(attention.output.dense.weight, old.output.dense.weight[:, 24:])
    assert torch.equal(attention.output.dense.bias, old.output.dense.bias)
    layer, old = slimmed.bert.encoder.layer[0], dense.bert.encoder.layer[0]
    assert torch.equal(layer.attention.self.query.weight[8:], old.attention.self.query.weight[16:24])
    assert torch.equal(layer.intermediate.dense.weight, old.intermediate.dense.weight[[1, 2, 5]])
    assert torch.equal(layer.output.dense.weight, old.output.dense.weight[:, [1, 2, 5]])
    assert slimmed.training
    assert slimmed.get_output_embeddings().weight is slimmed.get_input_embeddings().weight
    pointers = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in slimmed.state_dict().values()}


def test_slimming_by_steps_is_slimming_at_once():
    dense = stock_model(BertModel)
    at_once = slim(dense, [[2], [1, 3]], [[4, 9], [60]])
    by_steps = slim(slim(dense, [[0, 2], [1, 2, 3]], [[2, 4, 9], [7, 60]]), [[1], [0, 2]], [[1, 2], [1]])
    assert at_once.config.to_dict() == by_steps.config.to_dict()
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, by_steps.state_dict()[name]), name


def test_keeping_everything_changes_nothing():
    dense = toy_model(sparsity=0).eval()
    whole = slim(dense, [range(2)] * 2, [torch.arange(64)] * 2)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [[0], []]}, "`heads` must leave every layer at least one. Got none for layer 1"),
        ({"heads": [[0], [4]]}, r"`heads` of layer 1 must be different indices in \[0, 3\]. Got \[4\]"),
        ({"heads": [[-1], [0]]}, r"`heads` of layer 0 .* Got \[-1\]"),
        ({"heads": [[0]]}, "`heads` must have an entry for each of 2 layers. Got 1"),
        ({"neurons": [[0], [3, 3]]}, r"`neurons` of layer 1 must be different .* Got \[3, 3\]"),
        ({"neurons": [range(65), [3]]}, "`neurons` of layer 0 .* and more"),
        ({"head_gates": [torch.ones(4)]}, "`head_gates` must have an entry for each of 2 layers. Got 1"),
        ({"neuron_gates": [torch.ones(64), torch.ones(3)]}, r"`neuron_gates` of layer 1 must have shape \(64,\)"),
    ],
)
def test_wrong_units(change, message):
    with pytest.raises(ValueError, match=message):
        slim(stock_model(), **{"heads": HEADS, "neurons": NEURONS, **change})


def test_only_dense_models_with_a_head_of_ours():
    with pytest.raises(ValueError, match="dense model. Got DynSparseBertForMaskedLM with 12 sparse layers, such as"):
        slim(toy_model(), HEADS, NEURONS)
    with pytest.raises(ValueError, match=r"Got BertForNextSentencePrediction. Choose from BertForMaskedLM"):
        slim(stock_model(BertForNextSentencePrediction), HEADS, NEURONS)
    assert "slim" in hf_dynsparse.__all__
