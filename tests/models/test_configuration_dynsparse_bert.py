import json
import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_dynsparse import DynSparseBertConfig
from hf_dynsparse.models.bert.configuration_dynsparse_bert import PRESETS, encoder_shapes
from tests.toy import toy_config


@pytest.mark.parametrize(
    ("wrong", "rule", "received", "fix"),
    [
        ({"sparsity": "a"}, "sparsity", "'a'", "float"),
        ({"sparsity": 1.0}, r"\[0, 1\)", "1.0", "0.9"),
        ({"sparsity": -0.1}, r"\[0, 1\)", "-0.1", "0.9"),
        ({"sparsity": math.nan}, r"\[0, 1\)", "nan", "0.9"),
        ({"block_size": 3}, "must divide .*layer.0.attention.self.query", "Got 3", "Choose .*1, 2, 4, 8, 16, 32"),
        ({"block_size": [1, 5]}, "must divide", r"\(1, 5\)|1 ?x ?5|\[1, 5\]", "Choose|choose"),
        ({"block_size": 0}, "`block_size`", "0", "16|positive"),
        ({"block_size": 2.5}, "block_size", "2.5", "int"),
        ({"block_size": [4]}, "block_size", r"\[4\]", "rows"),
        ({"distribution": "even"}, "must be one of", "'even'", "uniform, erk"),
    ],
)
def test_strict_errors(wrong, rule, received, fix):
    with pytest.raises((StrictDataclassError, ValueError)) as caught:
        toy_config(**wrong)
    text = str(caught.value)
    for part in (rule, received, fix):
        assert re.search(part, text), f"{part!r} is missing in: {text}"


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="`preset` must be one of tiny, mini, .*large. Got 'huge'"):
        DynSparseBertConfig.preset("huge")


@pytest.mark.parametrize(
    ("name", "sizes", "dropout"),
    [
        ("tiny", (2, 128, 2, 512), 0.0),
        ("mini", (4, 256, 4, 1024), 0.0),
        ("small", (4, 512, 8, 2048), 0.0),
        ("medium", (8, 512, 8, 2048), 0.1),
        ("base", (12, 768, 12, 3072), 0.1),
        ("large", (24, 1024, 16, 4096), 0.1),
    ],
)
def test_presets(name, sizes, dropout):
    config = DynSparseBertConfig.preset(name)
    layers, hidden, heads, intermediate = sizes
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.num_attention_heads, config.intermediate_size) == (heads, intermediate)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (dropout, dropout)
    assert (config.sparsity, config.block_size, config.distribution) == (0.9, 16, "uniform")
    assert len(PRESETS) == 6
    shapes = encoder_shapes(config)
    assert len(shapes) == 6 * layers
    assert sum(rows * columns for rows, columns in shapes.values()) == 12 * layers * hidden**2


def test_a_preset_can_be_overridden():
    config = DynSparseBertConfig.preset("medium", hidden_dropout_prob=0.0, sparsity=0.5)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.sparsity) == (0.0, 0.1, 0.5)


def test_active_entries_of_a_worked_example():
    # 8 x 8 and 16 x 8 blocks of 4 x 4 at density 1/4; four square and two long matrices in each of two layers.
    config = toy_config()
    assert sorted(config.nnzb_per_layer().values()) == [16] * 8 + [32] * 4
    assert config.num_active_entries() == (8 * 16 + 4 * 32) * 16
    assert toy_config(sparsity=0).nnzb_per_layer() == {}
    assert toy_config(sparsity=0).num_active_entries() == 2 * (4 * 32 * 32 + 2 * 64 * 32)


@pytest.mark.parametrize("block_size", [1, 16, [1, 4], (4, 2)])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_json_round_trip(tmp_path, block_size, distribution):
    config = toy_config(block_size=block_size, distribution=distribution, sparsity=0.8, sparse_prediction=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DynSparseBertConfig
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dynsparse_bert"
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.block_shape == config.block_shape
    assert loaded.nnzb_per_layer() == config.nnzb_per_layer()
    assert not loaded.sparse_prediction
    assert DynSparseBertConfig.from_dict(json.loads(config.to_json_string())).block_shape == config.block_shape
