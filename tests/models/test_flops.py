import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForSequenceClassification,
    flops_per_sequence,
    inference_flops_per_sequence,
    sparsify_,
)
from tests.toy import toy_config, toy_model


# arXiv:2108.06277, tables of the appendix: printed digits.
@pytest.mark.parametrize(
    ("preset", "sparsity", "printed"),
    [
        ("mini", 0.0, "2.617e+09"),
        ("small", 0.0, "1.007e+10"),
        ("medium", 0.9, "2.738e+09"),
        ("base", 0.9, "8.33e+09"),
    ],
)
def test_paper(preset, sparsity, printed):
    config = DynSparseBertConfig.preset(preset, sparsity=sparsity, block_size=1)
    digits = len(printed.split("e")[0]) - 2
    assert f"{flops_per_sequence(config, seq_len=128):.{digits}e}" == printed


def test_worked_example():
    # One layer, T = 2: nnz = (4 * 8 * 8 + 2 * 16 * 8) / 4 = 128.
    config = toy_config(num_hidden_layers=1, hidden_size=8, intermediate_size=16, block_size=2, sparsity=0.75)
    assert config.num_active_entries() == 128
    assert inference_flops_per_sequence(config, 2) == 2 * 2 * 128 + 4 * 2**2 * 8
    assert flops_per_sequence(config, 2) == 3 * 640


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [1, 4, (1, 4)])
@pytest.mark.parametrize("cls", [DynSparseBertForMaskedLM, DynSparseBertForSequenceClassification])
def test_model_and_config_agree(cls, sparsity, block_size):
    model = toy_model(cls=cls, sparsity=sparsity, block_size=block_size)
    for count in (flops_per_sequence, inference_flops_per_sequence):
        assert count(model, 12) == count(model.config, 12)
        assert isinstance(count(model, 12), int)


@pytest.mark.parametrize("seq_len", [1, 128, 512])
def test_inference_is_a_third(seq_len):
    config = DynSparseBertConfig.preset("medium")
    assert 3 * inference_flops_per_sequence(config, seq_len) == flops_per_sequence(config, seq_len)


def test_stock_bert():
    stock = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    expected = flops_per_sequence(DynSparseBertConfig.preset("mini", sparsity=0.0), 128)
    assert flops_per_sequence(stock, 128) == expected
    with torch.device("meta"):
        model = BertForMaskedLM(stock)
    assert flops_per_sequence(model, 128) == expected


def test_a_sparsified_stock_model_is_counted_as_it_is():
    settings = toy_config(sparsity=0).to_dict()
    stock = BertForMaskedLM(BertConfig(**{key: settings[key] for key in BertConfig().to_dict() if key in settings}))
    before = flops_per_sequence(stock, 12)
    assert before == flops_per_sequence(toy_config(sparsity=0), 12)
    sparsify_(stock, block_size=4, sparsity=0.75)
    assert flops_per_sequence(stock, 12) == flops_per_sequence(toy_config(), 12) < before
