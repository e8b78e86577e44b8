"""How a model begins: values by the active inputs of their block row, and topologies with level rows and columns."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForMaskedLM

from hf_dynsparse import BlockSparseLinear, DynSparseBertConfig, sparse_layers
from hf_dynsparse.blocks.layout import BlockLayout
from hf_dynsparse.nn.linear import fan_in_scale
from tests.toy import toy_config, toy_model


CUT = 0.8796  # of the standard deviation, in a normal distribution cut at two of them


def test_scale_by_hand():
    # Block rows with one, three and two of four blocks.
    layout = BlockLayout(torch.tensor([6, 0, 5, 9, 4, 11], dtype=torch.int32), (6, 8), (2, 2))
    scale = fan_in_scale(layout)
    assert scale.shape == (6, 1, 1)
    assert scale.flatten().square().tolist() == pytest.approx([4 / 3, 4, 4 / 3, 2, 4 / 3, 2])


@pytest.mark.parametrize("topology", ["random", "balanced"])
@torch.no_grad()
def test_fan_in_gives_outputs_the_variance_of_a_dense_layer(topology):
    layer = BlockSparseLinear(512, 1024, 4, 0.9)
    input = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    dense = (512**0.5) * 0.02 * CUT
    for sparse_init, expected in (("fan_in", dense), ("normal", dense * 0.1**0.5)):
        draw = torch.Generator().manual_seed(0)
        layer.reset_parameters(generator=draw, sparse_init=sparse_init, initial_topology=topology)
        assert float(layer(input).std()) == pytest.approx(expected, rel=0.03)
    layer.reset_parameters(generator=torch.Generator().manual_seed(0), sparse_init="fan_in")
    of_rows = layer(input).view(256, 256, 4).std((0, 2))
    assert float(of_rows.std() / of_rows.mean()) < 0.12  # each row by its own inputs: 0.25 with one factor for all


@pytest.mark.parametrize("topology", ["random", "balanced"])
def test_a_model_draws_as_its_configuration_says(topology):
    plain, scaled = (toy_model(sparse_init=how, initial_topology=topology) for how in ("normal", "fan_in"))
    levels = []
    for name, layer in sparse_layers(scaled).items():
        twin = sparse_layers(plain)[name]
        assert torch.equal(layer.block_index, twin.block_index)
        torch.testing.assert_close(layer.values, twin.values * fan_in_scale(layer.layout))
        levels += [
            int(active.max() - active.min()) for side in (0, 1) for active in [layer.layout.to_mask().sum(side)]
        ]
    assert max(levels) <= 1 if topology == "balanced" else max(levels) > 2


def test_the_defaults_draw_what_they_always_drew():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = BlockSparseLinear(32, 32, 4, 0.75)
        torch.manual_seed(0)
        index = torch.randperm(64)[:16].sort().values
        values = torch.nn.init.trunc_normal_(torch.empty(16, 4, 4), std=0.02, a=-0.04, b=0.04)
    assert torch.equal(layer.block_index, index.int())
    assert torch.equal(layer.values, values)


def test_loading_keeps_what_the_file_holds(tmp_path):
    model = toy_model(sparse_init="fan_in", initial_topology="balanced")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert (loaded.config.sparse_init, loaded.config.initial_topology) == ("fan_in", "balanced")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.device("meta"):
        assert toy_model(sparse_init="fan_in").bert.encoder.layer[0].output.dense.values.is_meta


def test_given_on_a_command_line():
    config = toy_config()
    config.update_from_string("sparse_init=fan_in,initial_topology=balanced,sparsity=0.5,block_size=8")
    again = DynSparseBertConfig.from_dict(config.to_dict())
    assert (again.sparse_init, again.initial_topology) == ("fan_in", "balanced")
    assert (again.sparsity, again.block_size) == (0.5, 8)
    assert not {"sparse_init", "initial_topology"} & again.to_stock().to_dict().keys()


@pytest.mark.parametrize(
    ("name", "known"), [("sparse_init", "normal, fan_in"), ("initial_topology", "random, balanced")]
)
def test_unknown_names(name, known):
    with pytest.raises((StrictDataclassError, ValueError), match=f"`{name}` must be one of {known}. Got 'even'"):
        toy_config(**{name: "even"})
