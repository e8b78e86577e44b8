"""Start from dense: from a checkpoint, from a model in memory, and from weights that were pruned before."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from hf_dynsparse import (
    BlockSparseLinear,
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
    flops_per_sequence,
    prune_regrow_,
    sparse_layers,
)
from hf_dynsparse.reports.facts import dense_bytes
from tests.toy import TOY_SIZES, toy_batch, toy_config, toy_trainer


HEADS = [
    DynSparseBertModel,
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForMultipleChoice,
]
# Block sizes and sparsities: square, rectangular and unstructured blocks, and dense.
SHAPES = [(4, 0.75), (16, 0.5), (1, 0.9), ((1, 4), 0.75), ([4, 2], 0.6), (4, 0.0)]
PAIRS = [(cls, *SHAPES[number % len(SHAPES)]) for number, cls in enumerate(HEADS)]  # each head, each shape
QUERY = "bert.encoder.layer.0.attention.self.query"


def stock_model(cls=BertForMaskedLM, seed=0, **overrides):
    """A dense BERT of transformers in the sizes of the toy model, with biases that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(toy_config(**overrides).to_stock())
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.uniform_(parameter, -0.1, 0.1)
    return model.eval()


def stock_class(cls):
    return getattr(transformers, cls.__name__.removeprefix("DynSparse"))


@pytest.fixture
def dense_folder(tmp_path):
    stock_model().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def assert_kept_from(model, dense):
    """Each sparse layer is what `from_dense` makes of its dense one; the rest of the base model is equal."""
    base, dense_base = model.base_model, dense.base_model
    layers = sparse_layers(base)
    for name, layer in layers.items():
        expected = BlockSparseLinear.from_dense(dense_base.get_submodule(name), layer.block_shape, nnzb=layer.nnzb)
        assert layer.block_index.dtype == torch.int32
        assert torch.equal(layer.block_index, expected.block_index), name
        assert torch.equal(layer.values, expected.values), name
        assert layer.values.requires_grad
    dense_state = dense_base.state_dict()
    for name, tensor in base.state_dict().items():
        if name.rpartition(".")[2] not in ("values", "block_index") and not name.startswith("pooler"):
            assert torch.equal(tensor, dense_state[name]), name


def load(cls, folder, **arguments):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["mismatched_keys"]
    assert not any("encoder" in key or "embeddings" in key for key in info["missing_keys"] | info["unexpected_keys"])
    return model, info


def test_a_worked_example(tmp_path):
    # One layer of 4 x 4, blocks of 2 x 2, half of them: norms 4, 6, 6, 8 by L1 (6, 12, 12, 4 by Linf).
    dense = BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=4,
            max_position_embeddings=8,
        )
    )
    query = dense.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.weight.copy_(
            torch.tensor([[1.0, -1, 6, 0], [1, 1, 0, 0], [0, -6, 2, 2], [0, 0, -2, 2]]),
        )
    dense.save_pretrained(tmp_path)
    model, _ = load(DynSparseBertModel, tmp_path, sparsity=0.5, block_size=2)
    layer = model.encoder.layer[0].attention.self.query
    # The largest is block 3; of the two that tie the lower id.
    assert layer.block_index.tolist() == [1, 3]
    assert layer.values.tolist() == [[[6, 0], [0, 0]], [[2, 2], [-2, 2]]]
    assert torch.equal(layer.bias, query.bias)


@pytest.mark.parametrize(("cls", "block_size", "sparsity"), PAIRS)
def test_from_a_dense_checkpoint(tmp_path, cls, block_size, sparsity):
    dense = stock_model(stock_class(cls))
    dense.save_pretrained(tmp_path)
    model, info = load(cls, tmp_path, sparsity=sparsity, block_size=block_size)
    # A mapping that is looked up by the type of the model is not found here, and leaves the encoder random.
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(sparse_layers(model)) == (12 if sparsity else 0)
    assert {layer.nnzb for layer in sparse_layers(model).values()} == set(model.config.nnzb_per_layer().values())
    assert_kept_from(model, dense)
    head = {name: x for name, x in dense.state_dict().items() if not name.startswith(("bert.", "encoder.", "emb"))}
    for name, tensor in head.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, DynSparseBertForMaskedLM])
def test_with_a_configuration(dense_folder, auto, caplog):
    model, info = load(auto, dense_folder, config=toy_config(distribution="erk"))
    assert type(model) is DynSparseBertForMaskedLM
    assert not info["missing_keys"]
    assert len({layer.sparsity for layer in sparse_layers(model).values()}) > 1
    assert_kept_from(model, stock_model())
    assert "dense BERT" not in caplog.text


def test_arguments_taken_from_a_stock_configuration(dense_folder):
    arguments = {**BertConfig.from_pretrained(dense_folder).to_dict(), "sparsity": 0.75, "block_size": 4}
    model, _ = load(DynSparseBertForMaskedLM, dense_folder, **arguments)
    assert model.config.model_type == "dynsparse_bert"


def test_what_was_done_is_said_once(dense_folder, caplog):
    caplog.set_level(logging.INFO, "hf_dynsparse")
    load(DynSparseBertForMaskedLM, dense_folder, sparsity=0.75, block_size=4)
    assert [record.levelname for record in caplog.records if record.name.startswith("hf_dynsparse")] == ["INFO"]
    assert "model.safetensors is dense: 12 layers" in caplog.text
    assert "block size 4, sparsity 0.75" in caplog.text


def test_defaults_are_a_warning(dense_folder, caplog):
    caplog.set_level(logging.WARNING, "hf_dynsparse")  # a script that ran before may have set another
    model, _ = load(DynSparseBertForMaskedLM, dense_folder)
    assert (model.config.sparsity, model.config.block_size) == (0.9, 16)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_dynsparse")]
    assert "neither `sparsity` nor `block_size` is given" in warning
    assert "sparsity 0.9 and block size 16" in warning


def test_arguments_are_checked_together_with_the_dimensions(tmp_path):
    # Neither 16, the default, nor 3 divides 8: the one must not be tried, the other not be taken.
    stock_model(hidden_size=8, intermediate_size=24, sparsity=0).save_pretrained(tmp_path)
    model, _ = load(DynSparseBertForMaskedLM, tmp_path, sparsity=0.5, block_size=8)
    assert model.config.block_shape == (8, 8)
    with pytest.raises(Exception, match="must divide both sides of `layer.0.attention.self.query`"):
        DynSparseBertForMaskedLM.from_pretrained(tmp_path, sparsity=0.5, block_size=3)
    with pytest.raises(Exception, match=r"\[0, 1\). Got 1.5"):
        DynSparseBertForMaskedLM.from_pretrained(tmp_path, sparsity=1.5, block_size=8)


@pytest.mark.parametrize(
    ("stock", "cls"),
    [
        (BertForMaskedLM, DynSparseBertForSequenceClassification),
        (BertForMaskedLM, DynSparseBertModel),
        (BertModel, DynSparseBertForSequenceClassification),  # no `bert.` before its names
        (BertModel, DynSparseBertForMaskedLM),
    ],
)
@pytest.mark.parametrize("sparsity", [0.75, 0.0])
def test_another_head(tmp_path, stock, cls, sparsity):
    dense = stock_model(stock)
    dense.save_pretrained(tmp_path)
    model, _ = load(cls, tmp_path, sparsity=sparsity, block_size=4)
    assert_kept_from(model, dense)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 5, name


def test_shards_and_a_tied_decoder(tmp_path):
    dense = stock_model()
    dense.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    model, info = load(DynSparseBertForMaskedLM, tmp_path, sparsity=0.75, block_size=4)
    assert not info["missing_keys"]
    assert_kept_from(model, dense)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_embeddings_that_a_checkpoint_keeps_as_the_decoder(dense_folder):
    tensors = load_file(dense_folder / "model.safetensors")
    embeddings = tensors.pop("bert.embeddings.word_embeddings.weight")
    save_file({**tensors, "cls.predictions.decoder.weight": embeddings}, dense_folder / "model.safetensors")
    model, _ = load(DynSparseBertForMaskedLM, dense_folder, sparsity=0.75, block_size=4)
    assert_kept_from(model, stock_model())


def test_a_checkpoint_with_old_names(tmp_path):
    dense = stock_model()
    dense.config.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in dense.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, tmp_path / "model.safetensors")
    model, info = load(DynSparseBertForMaskedLM, tmp_path, sparsity=0.75, block_size=4)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert_kept_from(model, dense)
    # A resumed run looks for the names of today.
    model.save_pretrained(tmp_path / "sparse")
    assert load_file(tmp_path / "sparse" / "model.safetensors").keys() <= model.state_dict().keys()


def test_bfloat16(dense_folder):
    model, _ = load(DynSparseBertForMaskedLM, dense_folder, sparsity=0.75, block_size=4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_kept_from(model, stock_model().bfloat16())


def outputs(model):
    batch = {name: x for name, x in toy_batch().items() if name != "labels"}
    return model.eval()(**batch)[0]


def test_saved_sparse_ever_after(dense_folder, tmp_path):
    model, _ = load(DynSparseBertForMaskedLM, dense_folder, sparsity=0.75, block_size=4)
    assert model.config.model_type == "dynsparse_bert"
    for layer in sparse_layers(model).values():
        # Regrown blocks are zero; a dense file would lose them.
        prune_regrow_(layer, pruning_ratio=0.5, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "sparse"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("dynsparse_bert", ["DynSparseBertForMaskedLM"])
    assert (config["sparsity"], config["block_size"]) == (0.75, 4)
    names = load_file(folder / "model.safetensors").keys()
    assert f"{QUERY}.values" in names
    assert f"{QUERY}.weight" not in names
    loaded, info = load(AutoModelForMaskedLM, folder)
    assert not info["missing_keys"]
    for name, layer in sparse_layers(loaded).items():
        assert torch.equal(layer.block_index, sparse_layers(model)[name].block_index)
        assert torch.equal(layer.values, sparse_layers(model)[name].values)
    assert not sparse_layers(loaded)[QUERY].values.any(dim=(1, 2)).all()
    assert torch.equal(outputs(loaded), outputs(model))
    # And once more, through another head.
    load(DynSparseBertForSequenceClassification, folder)[0].save_pretrained(tmp_path / "again")
    assert f"{QUERY}.block_index" in load_file(tmp_path / "again" / "model.safetensors")


def test_training_from_dense_can_be_resumed(dense_folder, tmp_path):
    def start():
        return load(DynSparseBertForMaskedLM, dense_folder, sparsity=0.75, block_size=4)[0]

    steps = {"max_steps": 4, "num_topology_updates": 1}
    whole = toy_trainer(tmp_path / "whole", start(), **steps)
    whole.train()
    first = toy_trainer(tmp_path / "parts", start(), save_strategy="steps", save_steps=2, **steps)
    first.train()
    second = toy_trainer(tmp_path / "parts", start(), **steps)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


# In memory


@pytest.mark.parametrize(("cls", "block_size", "sparsity"), [pair for pair in PAIRS if pair[2] > 0.6])
def test_from_a_model_in_memory(tmp_path, cls, block_size, sparsity):
    dense = stock_model(stock_class(cls)).train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config = DynSparseBertConfig.from_stock(dense.config, sparsity=sparsity, block_size=block_size)
    model = cls.from_dense(dense, config)
    assert model.training
    assert (type(model), model.config.model_type) == (cls, "dynsparse_bert")
    dense.save_pretrained(tmp_path)
    loaded, _ = load(cls, tmp_path, sparsity=sparsity, block_size=block_size)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    buffers = dict(loaded.named_buffers())
    assert {name for name, _ in model.named_buffers()} == buffers.keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, {**dict(loaded.named_parameters()), **buffers}[name]), name
        # Nothing of it is the source's.
        with torch.no_grad():
            tensor.zero_()
    for name, tensor in before.items():
        assert torch.equal(dense.state_dict()[name], tensor), name


def test_from_a_base_model_in_memory():
    dense = stock_model(BertModel)
    model = DynSparseBertForMaskedLM.from_dense(dense, toy_config())
    assert not model.training
    assert_kept_from(model, dense)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert_kept_from(DynSparseBertModel.from_dense(dense.bfloat16(), toy_config()), dense)


@pytest.mark.parametrize(
    ("size", "tensor"),
    [
        ({"hidden_size": 16}, r"bert\.embeddings\.\S+"),
        ({"intermediate_size": 128}, r"bert\.encoder\.layer\.0\.intermediate\.dense\.\S+"),
        ({"vocab_size": 100}, r"bert\.embeddings\.word_embeddings\.weight"),
    ],
)
def test_other_dimensions_in_memory(size, tensor):
    with pytest.raises(ValueError, match=f"`{tensor}` must have shape .* Got .* in the given `state_dict`"):
        DynSparseBertForMaskedLM.from_dense(stock_model(), toy_config(**size))


def test_stock_and_ours_and_back():
    stock = toy_config(num_labels=5, hidden_dropout_prob=0.3).to_stock()
    ours = DynSparseBertConfig.from_stock(stock, sparsity=0.5, block_size=(1, 4))
    assert (ours.num_labels, ours.hidden_dropout_prob, ours.sparsity, ours.block_shape) == (5, 0.3, 0.5, (1, 4))
    assert ours.to_stock().to_dict() == stock.to_dict()


# Pruned before


def pruned_model(cls=BertForMaskedLM, block=(1, 1), sparsity=0.8, seed=0):
    """A dense model with zeros, another share of them in every layer, and two layers almost or wholly without."""
    dense, draw = stock_model(cls, seed), torch.Generator().manual_seed(seed)
    for number, layer in enumerate(dense.base_model.encoder.layer):
        for offset, linear in enumerate(m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            rows, columns = linear.weight.shape
            share = sparsity - 0.05 * (6 * number + offset) % 0.4
            keep = torch.rand(rows // block[0], columns // block[1], generator=draw) >= share
            with torch.no_grad():
                linear.weight *= keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    first = dense.base_model.encoder.layer[0]
    with torch.no_grad():
        first.output.dense.weight.fill_(0.01)
        first.intermediate.dense.weight.fill_(0.02)
        first.intermediate.dense.weight[0, :16] = 0  # 16 of 2048
        if getattr(dense.base_model, "pooler", None) is not None:
            dense.base_model.pooler.dense.weight[:, ::2] = 0
    return dense


DENSE = {"layer.0.output.dense", "layer.0.intermediate.dense"}


@pytest.mark.parametrize(
    ("cls", "block"),
    [
        (DynSparseBertForMaskedLM, (1, 1)),
        (DynSparseBertForSequenceClassification, (4, 4)),
        (DynSparseBertModel, (1, 4)),
    ],
)
def test_from_nonzeros(tmp_path, cls, block):
    dense = pruned_model(stock_class(cls), block)
    dense.save_pretrained(tmp_path / "pruned")
    for source in (dense, tmp_path / "pruned", str(tmp_path / "pruned")):
        model = cls.from_nonzeros(source, block_size=block if block != (1, 1) else 1)
        layers = sparse_layers(model.base_model.encoder)
        assert len(layers) == 10
        assert not DENSE & layers.keys()
        for name, layer in layers.items():
            weight = dense.base_model.encoder.get_submodule(name).weight
            assert layer.block_shape == block
            assert torch.equal(layer.to_dense(), weight), name
            assert layer.values.ne(0).any(dim=2).any(dim=1).all()
        assert {layer.nnzb for layer in layers.values()} == set(model.config.nnzb.values())
        torch.testing.assert_close(outputs(model), outputs(dense), rtol=0, atol=1e-5)
    assert len(set(model.config.nnzb.values())) > 4
    # The shapes are known before the file is opened.
    model.save_pretrained(tmp_path / "sparse")
    loaded, info = load(cls, tmp_path / "sparse")
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.config.nnzb == model.config.nnzb
    torch.testing.assert_close(outputs(loaded.to_dense()), outputs(dense), rtol=0, atol=1e-5)


def test_what_is_counted_of_a_model_from_nonzeros():
    model = DynSparseBertForMaskedLM.from_nonzeros(pruned_model())
    config, encoder = model.config, model.bert.encoder
    nnz = sum(
        m.values.numel() if isinstance(m, BlockSparseLinear) else m.weight.numel()
        for m in encoder.modules()
        if isinstance(m, BlockSparseLinear | torch.nn.Linear)
    )
    assert config.num_active_entries() == nnz
    assert config.sparsity == pytest.approx(1 - nnz / (2 * (4 * 32 * 32 + 2 * 64 * 32)))
    assert flops_per_sequence(config, 16) == flops_per_sequence(model, 16)
    assert dense_bytes(model) == dense_bytes(DynSparseBertForMaskedLM(toy_config(sparsity=0)))
    assert not {"nnzb", "sparsity"} & config.to_stock().to_dict().keys()


def test_a_model_from_nonzeros_trains_dynamically(tmp_path):
    model = DynSparseBertForMaskedLM.from_nonzeros(pruned_model())
    trainer = toy_trainer(tmp_path, model, max_steps=3, num_topology_updates=1)
    trainer.train()
    trainer.save_model()
    loaded, _ = load(AutoModel, tmp_path)
    assert len(sparse_layers(loaded)) == 10


def test_a_layer_of_zeros_keeps_one_block():
    dense = pruned_model()
    with torch.no_grad():
        dense.bert.encoder.layer[1].output.dense.weight.zero_()
    model = DynSparseBertForMaskedLM.from_nonzeros(dense)
    assert model.config.nnzb["layer.1.output.dense"] == 1
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 16])
def test_nothing_pruned(block_size):
    # Unstructured zeros leave no block of 16 x 16 empty.
    dense = stock_model() if block_size == 1 else pruned_model()
    size = f"{block_size} x {block_size}"
    with pytest.raises(ValueError, match=f"must find zero blocks of {size}. Got none in .*BertForMaskedLM"):
        DynSparseBertForMaskedLM.from_nonzeros(dense, block_size=block_size)


def test_wrong_arguments_of_from_nonzeros():
    with pytest.raises(ValueError, match="must divide both sides of `layer.0.attention.self.query`"):
        DynSparseBertForMaskedLM.from_nonzeros(pruned_model(), block_size=3)
    with pytest.raises(ValueError, match="Only a checkpoint takes .* Got a model and num_labels"):
        DynSparseBertForMaskedLM.from_nonzeros(pruned_model(), num_labels=3)


@pytest.mark.parametrize(
    ("nnzb", "message"),
    [
        (
            {"layer.9.output.dense": 3},
            "must name layers of the encoder. Got 'layer.9.output.dense'.*layer.0.attention",
        ),
        ({"layer.0.output.dense": 0}, r"`nnzb` of layer.0.output.dense must lie in \[1, 128\]. Got 0"),
        ({"layer.0.output.dense": 129}, r"must lie in \[1, 128\]. Got 129"),
        ({"layer.0.output.dense": 0.5}, "nnzb"),
    ],
)
def test_wrong_numbers_of_active_blocks(nnzb, message):
    with pytest.raises(Exception, match=message):
        toy_config(nnzb=nnzb)


def test_numbers_of_active_blocks_override_sparsity():
    config = toy_config(nnzb={"layer.0.output.dense": 5}, sparsity=0.9, distribution="erk")
    assert config.nnzb_per_layer() == {"layer.0.output.dense": 5}
    assert config.num_active_entries() == 5 * 16 + 2 * (4 * 32 * 32 + 2 * 64 * 32) - 64 * 32
    assert list(sparse_layers(DynSparseBertForMaskedLM(config))) == ["bert.encoder.layer.0.output.dense"]
    sizes = {**TOY_SIZES, "nnzb": {"layer.1.output.dense": 7}}
    assert DynSparseBertConfig.preset("tiny", **sizes).nnzb_per_layer() == {"layer.1.output.dense": 7}
    assert toy_config(nnzb={}).num_active_entries() == toy_config(sparsity=0).num_active_entries()
