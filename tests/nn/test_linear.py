"""The sparse layer, and putting it into a model or taking it out."""

import copy
import pickle

import pytest
import torch
from helpers import BLOCK_SIZES, dense_weight, generator, make_layer, place_
from torch import nn

from hf_dynsparse import BlockSparseLinear, densify_, sparse_layers, sparsify_, topology_summary, use_backend


class Tied(nn.Module):
    """An embedding, two linear layers, a pooler and an output layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))
        self.pooler = nn.Linear(8, 8)
        self.output = nn.Linear(8, 12)
        self.output.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.pooler(self.body(self.embedding(ids))))


def kinds(model: nn.Module) -> dict[str, str]:
    """Type of every linear layer."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | BlockSparseLinear)
    }


def test_a_new_layer_follows_the_paper() -> None:
    layer = BlockSparseLinear(256, 128, block_size=4, sparsity=0.75)
    assert (layer.shape, layer.grid, layer.num_blocks, layer.nnzb, layer.sparsity) == (
        (128, 256),
        (32, 64),
        2048,
        512,
        0.75,
    )
    assert layer.values.shape == (512, 4, 4)
    assert layer.values.abs().max() <= 0.04
    assert 0.0170 < layer.values.std() < 0.0182  # 0.02, cut at two standard deviations: 0.0176
    assert layer.bias.tolist() == [0.0] * 128
    layer.layout.validate()


def test_reset_depends_on_the_generator_alone() -> None:
    layers = [BlockSparseLinear(64, 32, 4), BlockSparseLinear(64, 32, 4)]
    assert not torch.equal(layers[0].values, layers[1].values)
    for layer in layers:
        layer.reset_parameters(generator=generator(3))
    assert torch.equal(layers[0].values, layers[1].values)
    assert torch.equal(layers[0].block_index, layers[1].block_index)


# torch says of its own format that it is young.
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_every_dense_form_is_the_same(block_size: int | tuple[int, int]) -> None:
    layer = make_layer((3, 5), block_size, 6)
    weight = dense_weight(layer.values, layer.block_index, layer.shape)
    linear = layer.to_linear()
    assert torch.equal(layer.to_dense(), weight)
    assert torch.equal(layer.to_sparse_bsr().to_dense(), weight)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, layer.bias)
    assert linear.bias is not layer.bias
    input = torch.randn(2, layer.in_features, generator=generator())
    torch.testing.assert_close(linear(input), layer(input))


def test_to_dense_is_differentiable() -> None:
    layer = make_layer((2, 2), 2, 2)
    (3 * layer.to_dense()).sum().backward()
    assert torch.equal(layer.values.grad, torch.full((2, 2, 2), 3.0))


def test_from_dense_keeps_the_largest_blocks_by_hand() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():  # L1 norms 4, 3 / 3, 5; the largest entry is in block 2
        linear.weight.copy_(torch.tensor([[1, -1, 0, 3], [1, 1, 0, 0], [-3, 0, 2, 0], [0, 0, -2, 1]]))
    layer = BlockSparseLinear.from_dense(linear.eval(), 2, nnzb=3)
    assert layer.block_index.tolist() == [0, 1, 3]  # blocks 1 and 2 tie
    assert layer.values.tolist() == [[[1, -1], [1, 1]], [[0, 3], [0, 0]], [[2, 0], [-2, 1]]]
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    assert not layer.training


def test_from_dense_of_everything_loses_nothing() -> None:
    linear = nn.Linear(12, 8, bias=False, dtype=torch.float64)
    layer = BlockSparseLinear.from_dense(linear, (2, 3), sparsity=0.0)
    assert torch.equal(layer.to_dense(), linear.weight)
    assert layer.bias is None
    assert torch.equal(layer.to_linear().weight, linear.weight)


def test_the_meta_device_needs_no_values() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(32, 32, device="meta"), 4, 0.5)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer.nnzb == 32
    assert BlockSparseLinear(32, 32, 4, device="meta").values.device.type == "meta"


def test_only_values_index_and_bias_are_saved() -> None:
    layer, other = make_layer(seed=1), make_layer(seed=2)
    assert list(layer.state_dict()) == ["values", "bias", "block_index"]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.to_dense(), layer.to_dense())
    assert torch.equal(other.block_index, layer.block_index)


def test_load_into_a_layer_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="loads as many active blocks as it has. Got `values` with 9 for 8: another"):
        make_layer(nnzb=8).load_state_dict(make_layer(nnzb=9).state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_separate(duplicate: object) -> None:
    layer = make_layer()
    other = duplicate(layer)
    assert torch.equal(other.to_dense(), layer.to_dense())
    before = layer.to_dense()
    with torch.no_grad():
        other.values.zero_()
        other.block_index.zero_()
    assert torch.equal(layer.to_dense(), before)


def test_the_layout_is_never_stale() -> None:
    layer = place_(make_layer((2, 2), 1, 2), [2, 1], [1.0, 2.0])
    assert layer.layout.by_row.slots.tolist() == [1, 0]
    layer.block_index[1] = 3
    assert layer.layout.by_row.slots.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_change_of_dtype_leaves_the_index(dtype: torch.dtype) -> None:
    layer = make_layer()
    index = layer.block_index.clone()
    layer.to(dtype)
    assert (layer.values.dtype, layer.bias.dtype, layer.block_index.dtype) == (dtype, dtype, torch.int32)
    assert torch.equal(layer.block_index, index)


def test_repr_tells_what_is_sparse() -> None:
    text = "in_features=24, out_features=16, bias=True, block=4x4, nnzb=8, sparsity=0.6667"
    assert repr(make_layer()) == f"BlockSparseLinear({text})"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 5}, r"must divide both sides of the matrix \(16 x 24\). Got 5 x 5. Choose 1, 2, 4, 8.$"),
        ({"block_size": 0}, "must be a positive integer .* Got 0. Choose"),
        ({"block_size": 4, "sparsity": 1.0}, r"must lie in \[0, 1\). Got 1.0. Choose"),
        ({"block_size": 4, "nnzb": 25}, r"`nnzb` must lie in \[1, 24\]. Got 25"),
        ({"block_size": 4, "nnzb": 0}, r"`nnzb` must lie in \[1, 24\]. Got 0"),
    ],
)
def test_bad_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparseLinear(24, 16, **arguments)


def test_sparsify_replaces_the_body_and_densify_brings_it_back() -> None:
    model = Tied()
    before, embedding = kinds(model), model.embedding.weight
    assert sparsify_(model, 4, 0.5) is model
    expected = before | {"body.0": "BlockSparseLinear", "body.2": "BlockSparseLinear"}
    assert kinds(model) == expected
    assert list(sparse_layers(model)) == ["body.0", "body.2"]
    assert [layer.nnzb for layer in sparse_layers(model).values()] == [4, 4]
    assert model.body[2].bias is None
    assert model.output.weight is model.embedding.weight is embedding
    ids = torch.tensor([0, 5, 11])
    output = model(ids)
    assert densify_(model) is model
    assert kinds(model) == before
    torch.testing.assert_close(model(ids), output)


def test_sparsity_zero_changes_no_output() -> None:
    model, ids = Tied(), torch.tensor([0, 5, 11])
    output = model(ids)
    torch.testing.assert_close(sparsify_(model, 4, 0.0)(ids), output)


@pytest.mark.parametrize(
    ("patterns", "replaced"),
    [
        ({"targets": ["body.0"]}, ["body.0"]),
        ({"targets": ["*"], "ignore": ["*.2"]}, ["body.0", "pooler"]),
        ({"targets": ["*", "nothing"], "ignore": []}, ["body.0", "body.2", "pooler"]),  # the output layer is tied
        ({"targets": iter(["body.*"]), "ignore": iter(["*.0"])}, ["body.2"]),
    ],
)
def test_targets_and_ignore(patterns: dict, replaced: list[str]) -> None:
    assert list(sparse_layers(sparsify_(Tied(), 4, 0.5, **patterns))) == replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["encoder.*"]}, r"At least one linear layer of Tied .* targets=\['encoder.\*'\] .* body.0"),
        ({"targets": ["output"]}, "Got none"),
        ({"block_size": 16}, r"both sides of `body.0` \(16 x 8\). Got 16 x 16. Choose 1, 2, 4, 8"),
        ({"sparsity": 1.5}, "`sparsity` is the share"),
        ({"distribution": "even"}, "`distribution` must be one of"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(arguments: dict, message: str) -> None:
    model = Tied()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify_(model, **{"block_size": 4, "sparsity": 0.5, **arguments})
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_densify_of_a_dense_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one `BlockSparseLinear`. Got none: the model is dense already"):
        densify_(Tied())


def test_sparsify_spreads_by_erk() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(32, 8))
    sparsify_(model, 1, 1 - 28 / 320, distribution="erk")
    assert [layer.nnzb for layer in sparse_layers(model).values()] == [8, 20]


def test_names_do_not_depend_on_compilation() -> None:
    model = nn.ModuleDict({"up": make_layer()})
    compiled = torch.compile(model, backend="eager")
    assert list(sparse_layers(compiled)) == ["up"]


def test_topology_summary_by_hand() -> None:
    model = nn.ModuleDict({"query": make_layer((4, 6), 4, 8), "up": make_layer((2, 3), (1, 8), 1)})
    with use_backend("tiled"):
        summary = topology_summary(model)
    assert (summary.nnz, summary.positions, summary.sparsity) == (136, 432, 1 - 136 / 432)
    assert str(summary).splitlines() == [
        "layer        shape    block       nnzb  density  backend",
        "query        16x24      4x4          8   0.3333  tiled",
        "up            2x24      1x8          1   0.1667  tiled",
        "2 sparse layers, 136 of 432 entries active",
        "16x24 nnzb=8 by tiled: asked for with `use_backend`",
        "2x24 nnzb=1 by tiled: asked for with `use_backend`",
    ]


def test_topology_summary_of_a_dense_model() -> None:
    summary = topology_summary(Tied())
    assert summary.sparsity == 0.0
    assert str(summary).endswith("0 sparse layers, 0 of 0 entries active")
